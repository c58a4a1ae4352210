"""Painted tables that the ray-caster samples: walls, floors, emblems and skies.

Everything is painted once, in numpy, as smooth pictures; each is kept at LEVELS degrees of
blur, so a far surface reads a soft copy and nothing aliases. Lookups then cost one gather.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from worldsim.maze.themes import (
    AIR,
    EMBLEM_SHAPES,
    FLOOR_PAINT,
    FLOORS,
    SKIES,
    TIMES,
    WALL_PAINT,
    WALLS,
    WEATHERS,
    Colour,
    Sky,
)

Picture = NDArray[np.float64]

SIDE = 128  # texels along one side of a wall face; a floor texture covers FLOOR_CELLS cells
FLOOR_CELLS = 2
LEVELS = 13  # blur doubles every second level
SHARPEST = 0.7  # blur of level 0, in texels
HEADINGS, ELEVATIONS = 1024, 192  # sky panorama: columns go round, rows go up from the horizon
SKY_TOP = 1.6  # tangent of the elevation of the last panorama row
SUN_HEADING = 0.6  # radians; the same in every map and at every time


@dataclass(frozen=True)
class Tables:
    """Flat lookup tables on one device; colours are packed r | g << 8 | b << 16 into int32.

    walls [W * LEVELS * SIDE * SIDE] (column, then row from the top), floors likewise (x, then y),
    emblems float32 in 0..1 (shape 0 is the empty face), skies [T * 2 * ELEVATIONS * HEADINGS].
    """

    walls: torch.Tensor
    floors: torch.Tensor
    emblems: torch.Tensor
    skies: torch.Tensor


@cache
def tables(device: torch.device) -> Tables:
    """The painted tables on `device` (painted once per process and device)."""
    walls = np.stack([_blurred(paint_wall(word), mirror=True) for word in WALLS])
    floors = np.stack([_blurred(paint_floor(word), mirror=False) for word in FLOORS])
    shapes = ("none", *EMBLEM_SHAPES)
    emblems = np.stack([_blurred(paint_emblem(word), mirror=True)[..., 0] for word in shapes])
    skies = np.stack([paint_sky(SKIES[time], air) for time in TIMES for air in WEATHERS])
    return Tables(
        walls=_packed(walls).to(device),
        floors=_packed(floors).to(device),
        emblems=torch.from_numpy(emblems.astype(np.float32).ravel()).to(device),
        skies=_packed(skies).to(device),
    )


def _packed(pictures: Picture) -> torch.Tensor:
    """[..., 3] in 0..1 -> flat int32."""
    levels = np.clip(np.rint(pictures * 255), 0, 255).astype(np.int32)
    packed = levels[..., 0] | levels[..., 1] << 8 | levels[..., 2] << 16
    return torch.from_numpy(packed.ravel())


def _blurred(picture: Picture, mirror: bool) -> Picture:
    """[SIDE, SIDE, C] -> [LEVELS, SIDE, SIDE, C]; `mirror` keeps the top out of the bottom."""
    source = np.concatenate([picture, picture[:, ::-1]], axis=1) if mirror else picture
    spectrum = np.fft.fft2(source, axes=(0, 1))
    x = np.fft.fftfreq(source.shape[0])[:, None, None]
    y = np.fft.fftfreq(source.shape[1])[None, :, None]
    radii = SHARPEST * 2.0 ** (np.arange(LEVELS) / 2)
    levels = [
        np.fft.ifft2(spectrum * np.exp(-2 * (np.pi * r) ** 2 * (x**2 + y**2)), axes=(0, 1)).real
        for r in radii
    ]
    return np.stack(levels)[:, :, : picture.shape[1]]


def _grid() -> tuple[Picture, Picture]:
    """Texel centres in 0..1: u [SIDE, 1] along the wall, v [1, SIDE] downwards."""
    line = (np.arange(SIDE) + 0.5) / SIDE
    return line[:, None], line[None, :]


def _step(edge: float, value: Picture, soft: float = 0.03) -> Picture:
    """0 below `edge`, 1 above, smooth over about 2 * `soft`."""
    t = np.clip((value - edge) / (2 * soft) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _mix(first: Picture | Colour, second: Picture | Colour, share: Picture) -> Picture:
    """Colours [..., 3] mixed by share [...]."""
    a, b = np.asarray(first), np.asarray(second)
    return np.asarray(a + (b - a) * share[..., None])


def _blobs(u: Picture, v: Picture, seed: int, waves: int, count: int = 14) -> Picture:
    """Smooth periodic noise in about -1..1 with at most `waves` waves across the picture."""
    random = np.random.Generator(np.random.Philox(key=seed))
    total = np.zeros(np.broadcast_shapes(u.shape, v.shape))
    for _ in range(count):
        kx, ky = random.integers(-waves, waves + 1, 2)
        total += np.cos(2 * np.pi * (kx * u + ky * v + random.random()))
    return np.asarray(total / np.sqrt(count))


def _courses(rows: int, bricks: int, gap: float) -> tuple[Picture, Picture]:
    """Staggered bricks: joint share [SIDE, SIDE] and a tone in 0..1 per brick."""
    u, v = _grid()
    row = np.floor(v * rows)
    along = u * bricks + 0.5 * (row % 2)
    across = v * rows
    near_u = np.abs(along - np.rint(along)) / bricks
    near_v = np.abs(across - np.rint(across)) / rows
    joint = 1 - _step(gap, np.minimum(near_u, near_v), soft=0.016)
    brick = np.floor(along) % bricks
    tone = np.mod(0.37 * brick + 0.61 * row + 0.23 * brick * row, 1.0)
    return joint, tone


def paint_wall(word: str) -> Picture:
    """One wall face, [SIDE along, SIDE down, 3] in 0..1, periodic along the wall."""
    u, v = _grid()
    main, other, trim = WALL_PAINT[word]
    if word == "brick":
        joint, tone = _courses(rows=4, bricks=2, gap=0.026)
        face = _mix(_mix(main, other, tone), trim, joint)
    elif word == "hedge":
        leaves = _blobs(u, v, seed=4, waves=3)
        face = _mix(main, other, _step(0.15, leaves, soft=0.35))
        face = _mix(face, trim, 0.9 * _step(0.75, -leaves, soft=0.30))
    elif word == "stone":
        joint, tone = _courses(rows=3, bricks=1, gap=0.030)
        face = _mix(_mix(main, other, tone), trim, joint)
        face = face * (1 + 0.06 * _blobs(u, v, seed=8, waves=3))[..., None]
    else:
        wave = v + 0.035 * np.sin(2 * np.pi * u) + 0.02 * np.sin(4 * np.pi * u + 1)
        face = _mix(main, other, 0.5 + 0.5 * np.sin(2 * np.pi * 3 * wave))
        face = _mix(face, trim, _step(0.82, wave))
    cap = 1 + 0.12 * (1 - _step(0.06, v)) - 0.38 * v**4  # lit top, shaded foot
    return np.clip(face * np.broadcast_to(cap, (SIDE, SIDE))[..., None], 0, 1)


def paint_floor(word: str) -> Picture:
    """FLOOR_CELLS x FLOOR_CELLS cells of floor, [SIDE x, SIDE y, 3] in 0..1, periodic."""
    u, v = _grid()
    main, other = FLOOR_PAINT[word]
    if word == "tiles":
        x, y = (np.sin(2 * np.pi * side * FLOOR_CELLS / 2) for side in (u, v))
        return _mix(main, other, _step(0.0, x * y, soft=0.10))
    blobs = _blobs(u, v, seed=21 if word == "grass" else 5, waves=3)
    return _mix(main, other, _step(0.1, blobs, soft=0.5))


def paint_emblem(word: str) -> Picture:
    """How much of the emblem colour covers a face, [SIDE, SIDE, 1] in 0..1."""
    u, v = _grid()
    x, y = np.broadcast_arrays(u - 0.5, v - 0.47)
    radius = np.hypot(x, y)
    inside = {
        "none": np.full((SIDE, SIDE), -1.0),
        "disc": 0.30 - radius,
        "diamond": 0.36 - np.abs(x) - np.abs(y),
        "band": 0.17 - np.abs(x),
        "ring": 0.095 - np.abs(radius - 0.25),
        "cross": np.maximum(
            np.minimum(0.095 - np.abs(x), 0.34 - np.abs(y)),
            np.minimum(0.095 - np.abs(y), 0.34 - np.abs(x)),
        ),
        "belt": 0.15 - np.abs(y),
    }[word]
    return _step(0.0, inside, soft=0.02)[..., None]


def _ridge(heading: Picture, seed: int, low: float, high: float, waves: int) -> Picture:
    """A closed skyline: tangent of its elevation by heading, between about `low` and `high`."""
    random = np.random.Generator(np.random.Philox(key=seed))
    line = np.zeros_like(heading)
    for k in range(1, waves + 1):
        line += np.cos(k * heading + 2 * np.pi * random.random()) / k**0.6
    line = (line - line.min()) / (line.max() - line.min())
    return np.asarray(low + (high - low) * line)


def paint_sky(sky: Sky, weather: str) -> Picture:
    """A panorama by heading, [ELEVATIONS up from the horizon, HEADINGS, 3] in 0..1."""
    heading = (np.arange(HEADINGS)[None, :] + 0.5) / HEADINGS * 2 * np.pi
    height = (np.arange(ELEVATIONS)[:, None] + 0.5) / ELEVATIONS * SKY_TOP
    up = np.broadcast_to(np.sqrt(np.clip(height, 0, 1)), (ELEVATIONS, HEADINGS))
    picture = _mix(sky.horizon, sky.zenith, up)
    away = np.angle(np.exp(1j * (heading - SUN_HEADING)))
    distance = np.hypot(away, height - 0.46)
    picture = _mix(picture, sky.orb, sky.halo * np.exp(-((distance / 0.42) ** 2)))
    if sky.stars:
        random = np.random.Generator(np.random.Philox(key=11))
        for x, y in zip(random.random(26) * 2 * np.pi, random.random(26) * 0.5 + 0.3, strict=True):
            gap = np.hypot(np.angle(np.exp(1j * (heading - x))), height - y)
            picture = _mix(picture, sky.orb, 0.8 * np.exp(-((gap / 0.022) ** 2)))
    picture = _mix(picture, sky.orb, 1 - _step(0.115, distance, soft=0.02))
    far = _ridge(heading, seed=3, low=0.08, high=0.44, waves=9)
    near = _ridge(heading, seed=17, low=0.03, high=0.22, waves=7)
    picture = _mix(picture, sky.far_hills, 1 - _step(0.0, height - far, soft=0.02))
    picture = _mix(picture, sky.near_hills, 1 - _step(0.0, height - near, soft=0.02))
    return _mix(picture, sky.fog, np.full_like(up, AIR[weather][1]))
