"""Maps from seeds: corridors, loops and rooms on a torus, and what hangs on their walls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from worldsim.maze.themes import EMBLEM_COLOURS, EMBLEM_SHAPES

SIZE = 16  # cells along a side of a map
WAYS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # by quarter turns to the right from +x


Apart = TypeVar("Apart", torch.Tensor, NDArray[np.float64])


def short_way(apart: Apart, size: int = SIZE) -> Apart:
    """Differences of places on the torus, the short way round: -size/2…size/2."""
    return (apart + size / 2) % size - size / 2


@dataclass(frozen=True)
class MazeMaps:
    """B toroidal grids: walls bool [B, S, S] by (x, y), tint [B, S, S, 3] about 1, shape and
    colour int [B, S, S, 4] of the emblem on each face (shape 0: none), start poses [B, 3]."""

    walls: torch.Tensor
    tint: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    start: torch.Tensor

    @property
    def size(self) -> int:
        """Cells along a side."""
        return self.walls.shape[1]

    def __len__(self) -> int:
        return self.walls.shape[0]

    def rows(self) -> torch.Tensor:
        """int32 [B]: every map once."""
        return torch.arange(len(self), device=self.walls.device, dtype=torch.int32)

    def cells(self, rows: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Flat int32 index over [B, S, S] of whole-numbered float x, y, wrapped round the torus."""
        size = self.size  # floats: whole-number division is slow, and these are exact
        x, y = x - size * (x / size).floor(), y - size * (y / size).floor()
        return rows * (size * size) + (x * size + y).int()

    def __getitem__(self, rows: slice | Sequence[int] | torch.Tensor) -> "MazeMaps":
        """The chosen maps, in that order."""
        return MazeMaps(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str) -> "MazeMaps":
        """The same maps on another device."""
        return MazeMaps(*(getattr(self, field.name).to(device) for field in fields(self)))


def maps(seeds: Sequence[int], size: int = SIZE) -> MazeMaps:
    """One map per seed, on the CPU; a pure function of each seed and the (even) size >= 6."""
    if size < 6 or size % 2:
        raise ValueError(f"a maze has an even size of at least 6, not {size}")
    if not len(seeds) or min(seeds) < 0:
        raise ValueError("maps need at least one seed, and no seed below 0")
    drawn = [_draw(int(seed), size) for seed in seeds]
    return MazeMaps(*(torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)))


def _draw(seed: int, size: int) -> tuple[NDArray[np.generic], ...]:
    """The fields of one map, in the order of MazeMaps."""
    random = np.random.Generator(np.random.Philox(key=seed))
    walls = _carve(random, size)
    light = random.uniform(0.80, 1.16, (size, size, 1))
    tint = light * random.uniform(0.93, 1.07, (size, size, 3))
    shape = random.integers(1, len(EMBLEM_SHAPES) + 1, (size, size, 4))
    shape *= random.random((size, size, 4)) < 0.4
    colour = random.integers(0, len(EMBLEM_COLOURS), (size, size, 4))
    return walls, tint.astype(np.float32), shape, colour, _start(random, walls)


def _carve(random: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Corridors (a random tree over even cells), few dead ends, and some 3 x 3 rooms."""
    walls = np.ones((size, size), dtype=bool)
    walls[::2, ::2] = False
    half = size // 2
    group = list(range(half * half))

    def root(node: int) -> int:
        while group[node] != node:
            group[node] = node = group[group[node]]
        return node

    for edge in random.permutation(2 * half * half).tolist():
        node, down = edge // 2, edge % 2
        x, y = node // half, node % half
        other = (x + 1 - down) % half * half + (y + down) % half
        first, second = root(node), root(other)
        if first != second:
            group[first] = second
            walls[2 * x + 1 - down, 2 * y + down] = False
    for x in range(0, size, 2):
        for y in range(0, size, 2):
            sides = [((x + i) % size, (y + j) % size) for i, j in WAYS]
            closed = [side for side in sides if walls[side]]
            if len(closed) == 3 and random.random() < 0.85:
                walls[closed[random.integers(3)]] = False
    for x, y in random.integers(0, half, (max(1, size * size // 100), 2)) * 2 + 1:
        walls[np.ix_((x + np.arange(-1, 2)) % size, (y + np.arange(-1, 2)) % size)] = False
    return walls


def _start(random: np.random.Generator, walls: NDArray[np.bool_]) -> NDArray[np.float32]:
    """An open cell's centre, looking where at least two cells ahead are open."""
    size = len(walls)
    ways = np.array(WAYS)
    choices = random.permutation(np.argwhere(~walls))
    turns = random.permutation(4)
    for need in (2, 1, 0):
        for cell in choices:
            for turn in turns:
                ahead = (cell + ways[turn] * np.arange(1, need + 1)[:, None]) % size
                if not walls[ahead[:, 0], ahead[:, 1]].any():
                    return np.array([*(cell + 0.5), turn * math.pi / 2], dtype=np.float32)
    raise AssertionError("a maze has open cells")
