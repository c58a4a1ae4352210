"""Ground truth for evaluation: walks on maps that training never saw, and what follows them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldsim.controls import Keys
from worldsim.maze.layout import short_way
from worldsim.maze.simulator import (
    KEYS,
    PICTURES_PER_LATENT,
    MazeMaps,
    maps,
    render,
    trajectory,
)
from worldsim.maze.themes import Theme
from worldsim.maze.walks import HELD_OUT, theme_track, walks

GIVEN = 5  # latent frames that a rollout is given: one picture and one true second
FIRST = 1 + PICTURES_PER_LATENT * (GIVEN - 1)  # number of the first picture that is not given
SECOND = 4  # latent frames
HOME = 1e-3  # cells and radians: how near to a pose one is back at it
WANDER = 25  # a held-out walk is cut out anywhere in its first latent frames
FORKS: dict[str, Keys] = {
    "forward": frozenset({"KeyW"}),
    "back": frozenset({"KeyS"}),
    "left": frozenset({"KeyJ"}),
    "right": frozenset({"KeyL"}),
    "idle": frozenset(),
}


@dataclass(frozen=True)
class Truth:
    """Held-out walks, one theme each.

    Attributes:
        mazes: their maps.
        poses: of every picture, ``[B, P, 3]``.
        keys: held keys of each latent frame, bool ``[B, N, 6]``.
        themes: theme indices, ``[B, 4]``.
        size: height and width of a picture.
    """

    mazes: MazeMaps
    poses: Tensor
    keys: Tensor
    themes: Tensor
    size: tuple[int, int]

    def pictures(self, row: int, first: int = 0, last: int | None = None) -> Tensor:
        """True pictures ``first…last`` of a walk, uint8 ``[P, H, W, 3]``."""
        return self._render(row, self.poses[row, first:last])

    def theme(self, row: int) -> Theme:
        return Theme.from_indices(tuple(self.themes[row].tolist()))

    def prompt(self, row: int) -> str:
        return self.theme(row).prompt()

    def track(self, row: int) -> list[Keys]:
        """Held keys of each latent frame."""
        return [
            frozenset(key for key, down in zip(KEYS, held, strict=True) if down)
            for held in self.keys[row].tolist()
        ]

    def continued(self, row: int, picture: int, keys: Keys, latents: int) -> Tensor:
        """What follows picture ``picture`` while ``keys`` are held, ``[4 · latents, H, W, 3]``."""
        held = torch.tensor([key in keys for key in KEYS]).expand(1, 1 + latents, -1)
        start = self.poses[row : row + 1, picture]
        poses = trajectory(self.mazes[row : row + 1], start, held)
        return self._render(row, poses[0, 1:])

    def comes_back(self, row: int, picture: int, track: Sequence[Keys]) -> bool:
        """Whether these controls lead from a picture's pose back to that pose."""
        held = torch.tensor([[key in keys for key in KEYS] for keys in ((), *track)])
        start = self.poses[row : row + 1, picture]
        end = trajectory(self.mazes[row : row + 1], start, held[None])[0, -1]
        apart = (end - start[0]).abs()
        apart[2] = torch.minimum(apart[2], 2 * math.pi - apart[2])
        return bool(apart.max() < HOME)

    def room(
        self, row: int, pictures: Sequence[int], tried: Sequence[Keys], latents: int
    ) -> NDArray[np.float64]:
        """How far one comes from each picture's pose with any of the ``tried`` keys held, the
        least of them, in cells ``[len(pictures)]``."""
        start = self.poses[row, list(pictures)]
        mazes = self.mazes[[row] * len(start)]
        far = []
        for keys in tried:
            held = torch.tensor([key in keys for key in KEYS]).expand(len(start), 1 + latents, -1)
            way = trajectory(mazes, start, held)[..., :2].double().diff(dim=1)
            far.append(short_way(way).sum(1).norm(dim=-1))
        return torch.stack(far).amin(0).numpy()

    def in_theme(self, row: int) -> "Truth":
        """The same walks, all in the theme of one of them."""
        return replace(self, themes=self.themes[row].expand_as(self.themes))

    def of_another_map(self, row: int) -> "Truth":
        """The walk ``row`` as it would have been in the next row's map: one row, same theme."""
        here, there = slice(row, row + 1), (row + 1) % len(self.poses)
        other = slice(there, there + 1)
        return Truth(
            self.mazes[other], self.poses[other], self.keys[here], self.themes[here], self.size
        )

    def _render(self, row: int, poses: Tensor) -> Tensor:
        themes = self.themes[row].expand(1, len(poses), 4)
        return render(self.mazes[row : row + 1], poses[None], themes, *self.size)[0]


def held_out(
    count: int,
    latents: int,
    size: tuple[int, int],
    first_seed: int = 0,
    standing: bool = False,
) -> Truth:
    """``count`` stretches of walks of ``latents`` latent frames on held-out maps.

    A pure function. Each stretch begins anywhere in the first seconds of its walk, so that states
    are those of somebody on the way, not of somebody who just arrived. ``standing``: nobody moves
    from there on.
    """
    seed = HELD_OUT + first_seed
    mazes = maps([seed + i for i in range(count)])
    walk = walks(mazes, mazes.start, WANDER + latents, seed)
    begins = np.random.default_rng(seed).integers(0, WANDER, count)
    pictures = 1 + PICTURES_PER_LATENT * (latents - 1)
    poses, keys = [], []
    for row, begin in enumerate(begins):
        first = PICTURES_PER_LATENT * int(begin)
        poses.append(walk.poses[row, first : first + pictures])
        keys.append(walk.keys[row, begin : begin + latents].clone())
        keys[-1][0] = False  # what led to the first picture is before this stream
        if standing:
            keys[-1][:] = False
            poses[-1] = poses[-1][:1].expand_as(poses[-1])
    themes = theme_track(count, 1, seed, switch_probability=0.0)[:, 0]
    return Truth(mazes, torch.stack(poses), torch.stack(keys), themes, size)
