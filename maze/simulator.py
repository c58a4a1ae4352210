"""The maze in motion: controls, collisions and what lies ahead; pictures come from raycast.py.

All tensors; the same code runs on a CPU and on a GPU. A map is a torus: positions wrap.
A pose is [..., 3] = x, y in cells and the heading in radians (0 looks along +x, and a
growing heading turns right, because +y points right of +x).
Letters in shapes: B maps, N latent frames, F pictures, K angles.
"""

import math

import torch

from worldsim.maze.layout import MazeMaps, maps
from worldsim.maze.raycast import cast, render

__all__ = ["KEYS", "MazeMaps", "advance", "clearance", "maps", "render", "trajectory"]

Tensor = torch.Tensor

KEYS = ("KeyW", "KeyS", "KeyA", "KeyD", "KeyJ", "KeyL")
PICTURES_PER_LATENT = 4
SPEED = 0.10  # cells per picture
TURN = math.radians(4.5)  # per picture: five latent frames turn a quarter
BODY = 0.25  # half the width of the player, in cells
GAP = 1e-3  # left between the body and a wall, so that rounding never puts it inside


def advance(mazes: MazeMaps, pose: Tensor, keys: Tensor) -> Tensor:
    """One picture's worth of motion: pose [B, 3], keys bool [B, 6] -> pose [B, 3].

    Turns first, then moves along the new heading; slides along walls axis by axis."""
    # Columns are copied: strided sines may differ in the last bit from contiguous ones.
    x, y, heading = (column.contiguous() for column in pose.unbind(1))
    held = keys.to(pose.dtype)
    heading = (heading + TURN * (held[:, 5] - held[:, 4])) % (2 * math.pi)
    forward, right = SPEED * (held[:, 0] - held[:, 1]), SPEED * (held[:, 3] - held[:, 2])
    cos, sin = heading.cos(), heading.sin()
    x = _slide(mazes, x, y, forward * cos - right * sin, flip=False)
    y = _slide(mazes, y, x, forward * sin + right * cos, flip=True)
    return torch.stack([x % mazes.size, y % mazes.size, heading], dim=1)


def trajectory(mazes: MazeMaps, start: Tensor, keys: Tensor) -> Tensor:
    """Poses of every picture: start [B, 3], keys bool [B, N, 6] -> [B, 1 + 4 * (N - 1), 3].

    Latent frame 0 is the start pose alone (its keys move nothing); the four pictures of latent
    frame n are moved by keys[:, n], so pose 4 * n is where latent frame n ends."""
    poses = [start]
    for latent in range(1, keys.shape[1]):
        for _ in range(PICTURES_PER_LATENT):
            poses.append(advance(mazes, poses[-1], keys[:, latent]))
    return torch.stack(poses, dim=1)


def _slide(mazes: MazeMaps, along: Tensor, across: Tensor, step: Tensor, flip: bool) -> Tensor:
    """Move the body by `step` along one axis, at most up to the wall; `flip`: that axis is y."""
    edge = along + step + BODY * step.sign()
    blocked = torch.zeros_like(step, dtype=torch.bool)
    for corner in (across - BODY, across + BODY):
        x, y = (corner, edge) if flip else (edge, corner)
        blocked |= mazes.walls.take(mazes.cells(mazes.rows(), x.floor(), y.floor()).long())
    line = edge.floor()
    stop = torch.where(step > 0, line - BODY - GAP, line + 1 + BODY + GAP)
    return torch.where(blocked, stop, along + step)


def clearance(mazes: MazeMaps, pose: Tensor, turned: Tensor) -> Tensor:
    """Free cells ahead: pose [B, 3], angles off the heading [B, K] or [K] -> distance [B, K]."""
    angle = pose[:, 2:].contiguous() + turned
    return cast(mazes, mazes.rows(), pose, angle.cos(), angle.sin()).distance
