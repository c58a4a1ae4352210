"""The ray-caster: first-person pictures of mazes, from tables painted in textures.py.

It knows where the eye is and what hangs where; nothing of controls and motion.
Letters in shapes: B maps, F or P pictures, R rays of one picture, S cells along a side,
H and W picture height and width, T times of day, A weathers.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from worldsim.maze.layout import MazeMaps
from worldsim.maze.textures import (
    ELEVATIONS,
    FLOOR_CELLS,
    HEADINGS,
    LEVELS,
    SHARPEST,
    SIDE,
    SKY_TOP,
    Tables,
    tables,
)
from worldsim.maze.themes import AIR, EMBLEM_COLOURS, SKIES, TIMES, WEATHERS

Tensor = torch.Tensor

EYE, WALL_HEIGHT = 0.46, 0.88  # in cells
FIELD_OF_VIEW = math.radians(75.0)  # across the picture
REACH = 16  # a ray tries this many grid lines each way; air hides what is farther
SAMPLES = 2  # rays per picture column
SOFTNESS = 0.55  # blur of what is drawn, in picture elements
FACE_LIGHT = (1.0, 0.70, 0.90, 0.80)  # by the side a ray enters from: -x, +x, -y, +y
CHUNK = 1 << 17  # samples drawn at once on a CPU: few enough to stay in its cache


# --- rays ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Hits:
    """What rays [P, R] meet first: distance in lengths of the ray's vector (at most REACH), flat
    cell [B, S, S], face 0..3 (entered from -x, +x, -y, +y), place 0..1 along the face."""

    distance: Tensor
    cell: Tensor
    face: Tensor
    along: Tensor


def cast(mazes: MazeMaps, rows: Tensor, origin: Tensor, ray_x: Tensor, ray_y: Tensor) -> Hits:
    """Nearest walls: rows int32 [P] name the maps, origin [P, 3] the poses, rays are [P, R].

    A ray can only enter a wall where it crosses a grid line: try the first REACH lines of either
    direction all at once and take the nearest that has a wall behind it."""
    rows = rows[:, None]
    x, y = origin[:, 0, None].expand_as(ray_x), origin[:, 1, None].expand_as(ray_x)
    by_x = _nearest_line(mazes, rows, (x, y), (ray_x, ray_y), flip=False)
    by_y = _nearest_line(mazes, rows, (y, x), (ray_y, ray_x), flip=True)
    crosses_x = by_x < by_y
    distance = torch.minimum(by_x, by_y)
    at_x, at_y = x + distance * ray_x, y + distance * ray_y
    sign_x, sign_y = ray_x.sign(), ray_y.sign()
    cell_x = torch.where(crosses_x, at_x + 0.5 * sign_x, at_x).floor()
    cell_y = torch.where(crosses_x, at_y, at_y + 0.5 * sign_y).floor()
    face = torch.where(crosses_x, (ray_x < 0).int(), 2 + (ray_y < 0).int())
    along = torch.where(crosses_x, at_y - cell_y, at_x - cell_x)
    along = torch.where((face == 0) | (face == 3), along, 1 - along)  # never mirrored to the eye
    return Hits(distance, mazes.cells(rows, cell_x, cell_y), face, along)


def _nearest_line(
    mazes: MazeMaps,
    rows: Tensor,
    origin: tuple[Tensor, Tensor],
    ray: tuple[Tensor, Tensor],
    flip: bool,
) -> Tensor:
    """Distance [P, R] to the first wall behind a line of the first axis; REACH where there is none.

    `origin` and `ray` give the first axis, then the other; `flip`: the first axis is y."""
    (here, other), (speed, drift) = ((a[..., None], b[..., None]) for a, b in (origin, ray))
    onward = speed > 0
    count = torch.arange(REACH, device=here.device, dtype=here.dtype)
    cell = here.floor()
    entered = torch.where(onward, cell + 1 + count, cell - 1 - count)
    line = torch.where(onward, entered, entered + 1)
    speed = torch.where(onward, speed.clamp(min=1e-6), speed.clamp(max=-1e-6))
    distance = ((line - here) / speed).clamp(max=REACH)
    side = (other + distance * drift).floor()
    x, y = (side, entered) if flip else (entered, side)
    index = mazes.cells(rows[..., None], x, y)
    wall = mazes.walls.flatten().index_select(0, index.flatten()).view(index.shape)
    return torch.where(wall, distance, REACH).amin(-1)


# --- pictures ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Paint:
    """Theme colours by index on one device, 0..255 or factors; T times, A weathers."""

    light: Tensor  # [T, 3]
    emblem: Tensor  # [T, colours, 3]
    haze: Tensor  # [T * A, 3]
    half: Tensor  # [A] distance at which half is hidden
    face: Tensor  # [4] light on each face


@cache
def _paint(device: torch.device) -> Paint:
    skies = [SKIES[time] for time in TIMES]
    haze = [
        sky.fog if AIR[air][1] else tuple(map(_mean, sky.horizon, sky.far_hills))
        for sky in skies
        for air in WEATHERS
    ]
    glow = torch.tensor([sky.glow for sky in skies])[:, None]
    return Paint(
        light=torch.tensor([sky.light for sky in skies]).to(device),
        emblem=(255 * glow * torch.tensor(EMBLEM_COLOURS)).to(device),
        haze=(255 * torch.tensor(haze)).to(device),
        half=torch.tensor([AIR[air][0] for air in WEATHERS]).to(device),
        face=torch.tensor(FACE_LIGHT).to(device),
    )


def _mean(first: float, second: float) -> float:
    return (first + second) / 2


def render(
    mazes: MazeMaps, poses: Tensor, themes: Tensor, height: int = 64, width: int = 64
) -> Tensor:
    """First-person pictures: poses [B, F, 3], theme indices int [B, F, 4] -> uint8 [B, F, H, W, 3].

    Raises ValueError when the shapes disagree or a picture side is odd."""
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(f"picture sides must be even, not {height} x {width}")
    if poses.shape[:1] != (len(mazes),) or themes.shape != (*poses.shape[:2], 4):
        raise ValueError("render needs poses [B, F, 3] and themes [B, F, 4] for B maps")
    count, pictures = poses.shape[:2]
    out = poses.new_empty((count * pictures, height, width, 3), dtype=torch.uint8)
    rows = torch.arange(count, device=poses.device, dtype=torch.int32).repeat_interleave(pictures)
    poses, themes = poses.flatten(0, 1), themes.flatten(0, 1).to(torch.int32)
    at_once = CHUNK if poses.device.type == "cpu" else 64 * CHUNK
    chunk = max(1, at_once // (height * width * SAMPLES))
    for first in range(0, len(out), chunk):
        part = slice(first, first + chunk)
        out[part] = _draw(mazes, rows[part], poses[part], themes[part], height, width)
    return out.view(count, pictures, height, width, 3)


def _draw(
    mazes: MazeMaps, rows: Tensor, poses: Tensor, themes: Tensor, height: int, width: int
) -> Tensor:
    """Pictures uint8 [P, H, W, 3] of poses [P, 3] in the maps `rows` int32 [P]."""
    table, device = tables(poses.device), poses.device
    half_width = math.tan(FIELD_OF_VIEW / 2)
    focal = width / 2 / half_width
    # All first samples of the columns, then all second ones: halves are then averaged.
    columns = torch.arange(width, device=device) + (
        (torch.arange(SAMPLES, device=device)[:, None] + 0.5) / SAMPLES
    )
    slope = (columns.flatten() / width * 2 - 1) * half_width
    down = (torch.arange(height, device=device) + 0.5 - height / 2)[:, None] / focal
    cos, sin = poses[:, 2].cos()[:, None], poses[:, 2].sin()[:, None]
    ray_x, ray_y = cos - slope * sin, sin + slope * cos
    sky = _sky(table, themes, ray_x, ray_y, down[: height // 2])
    floor = _floor(table, poses, themes, (ray_x, ray_y), down[height // 2 :], focal)
    hits = cast(mazes, rows, poses, ray_x, ray_y)
    wall, cover = _wall(mazes, table, hits, themes, (ray_x, ray_y), down, focal)
    planes = []
    for behind_up, behind_down, front in zip(sky, floor, wall, strict=True):
        behind = torch.cat([behind_up, behind_down], dim=1)
        samples = torch.lerp(behind, front, cover).view(len(rows), height, SAMPLES, width)
        planes.append((samples.sum(2) / SAMPLES + 0.5).clamp_(0, 255).to(torch.uint8))
    return torch.stack(planes, dim=-1)


def _unpack(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Red, green, blue 0..255 of packed colours at int32 `index`, each float in its shape."""
    packed = table.index_select(0, index.flatten()).view(index.shape)
    return (packed & 255).float(), ((packed >> 8) & 255).float(), (packed >> 16).float()


def _level(footprint: Tensor) -> Tensor:
    """Blur level int32 for texels per picture element, any shape."""
    level = 2 * torch.log2(footprint * (SOFTNESS / SHARPEST))
    return level.round().clamp(0, LEVELS - 1).int()


def _haze(distance: Tensor, half: Tensor) -> Tensor:
    """Share 0..1 that the air hides at `distance`; all of it at REACH."""
    soft = 1 - torch.exp2(-((distance / half) ** 1.5))
    return torch.maximum(soft, ((distance - 0.7 * REACH) / (0.25 * REACH)).clamp(0, 1))


def _sky(
    table: Tables, themes: Tensor, ray_x: Tensor, ray_y: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes [P, H/2, R] of the upper half."""
    turn = (torch.atan2(ray_y, ray_x) / (2 * math.pi)) % 1.0
    column = (turn * HEADINGS).int().clamp(max=HEADINGS - 1)
    climb = (ELEVATIONS / SKY_TOP) / torch.hypot(ray_x, ray_y)
    row = (-down * climb[:, None]).int().clamp(max=ELEVATIONS - 1)
    page = (themes[:, 2] * len(WEATHERS) + themes[:, 3])[:, None] * (ELEVATIONS * HEADINGS)
    return _unpack(table.skies, row * HEADINGS + (page + column)[:, None])


def _floor(
    table: Tables,
    poses: Tensor,
    themes: Tensor,
    ray: tuple[Tensor, Tensor],
    down: Tensor,
    focal: float,
) -> list[Tensor]:
    """Planes [P, H/2, R] of the lower half."""
    distance = EYE / down
    # A picture element covers `distance / focal` across and more in depth: blur by their mean.
    across = distance / focal * (SIDE / FLOOR_CELLS)
    level = _level(across * (distance / EYE).clamp(min=1).sqrt())
    x, y = (
        (((start[:, None, None] + distance * way[:, None]) / FLOOR_CELLS) % 1.0 * SIDE)
        .int()
        .clamp_(max=SIDE - 1)
        for start, way in zip((poses[:, 0], poses[:, 1]), ray, strict=True)
    )
    page = (themes[:, 1, None, None] * LEVELS + level) * (SIDE * SIDE)
    planes = _unpack(table.floors, x * SIDE + y + page)
    paint = _paint(poses.device)
    veil = _haze(distance, paint.half[themes[:, 3]][:, None, None])
    air = paint.haze[themes[:, 2] * len(WEATHERS) + themes[:, 3]][:, :, None, None]
    light = paint.light[themes[:, 2]][:, :, None, None] * (1 - veil)[:, None]
    return [torch.addcmul(air[:, c] * veil, planes[c], light[:, c]) for c in range(3)]


def _wall(
    mazes: MazeMaps,
    table: Tables,
    hits: Hits,
    themes: Tensor,
    ray: tuple[Tensor, Tensor],
    down: Tensor,
    focal: float,
) -> tuple[list[Tensor], Tensor]:
    """Planes [P, H, R] of the walls and how much of each picture element they cover, 0..1."""
    paint = _paint(down.device)
    distance, cell, face = hits.distance, hits.cell.long(), hits.face.long()
    length = torch.hypot(*ray)
    facing = torch.where(face < 2, ray[0].abs(), ray[1].abs()) / length
    level = _level(distance / focal * SIDE * facing.clamp(min=0.04).rsqrt())
    u = (hits.along * SIDE).int().clamp(0, SIDE - 1)
    texel = (level * SIDE + u) * SIDE
    page = LEVELS * SIDE * SIDE
    shape = mazes.shape.flatten().take(cell * 4 + face).int()
    colour = mazes.colour.flatten().take(cell * 4 + face)

    above = WALL_HEIGHT - EYE
    near = distance[:, None]
    v = (down * near + above) * (SIDE / WALL_HEIGHT)
    v = v.clamp_(0, SIDE - 1).int()
    edge = torch.minimum(down + above / near, EYE / near - down)
    cover = (edge * focal + 0.5).clamp_(0, 1)

    emblem = table.emblems.index_select(0, (v + (texel + shape * page)[:, None]).flatten())
    planes = _unpack(table.walls, v + (texel + themes[:, :1] * page)[:, None])
    time, air = themes[:, 2], themes[:, 3]
    veil = _haze(distance * length, paint.half[air][:, None])[..., None]
    lit = paint.face[face][..., None]
    tint = mazes.tint.flatten(0, 2)[cell] * paint.light[time][:, None] * lit * (1 - veil)
    glow = paint.emblem[time[:, None], colour] * (0.3 + 0.7 * lit) * (1 - veil)
    haze = paint.haze[time * len(WEATHERS) + air][:, None] * veil
    emblem = emblem.view(v.shape)
    walls = [
        torch.lerp(planes[c] * tint[:, None, :, c], glow[:, None, :, c], emblem)
        + haze[:, None, :, c]
        for c in range(3)
    ]
    return walls, cover
