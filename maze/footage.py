"""Training material made on the fly: walks through new maps, rendered and, for the DiT, encoded.

Every batch of walks is a pure function of (recipe seed, rank, number), and so is every draw from
it, so training resumes as if it had never stopped.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from worldsim.maze.recipe import Footage
from worldsim.maze.simulator import PICTURES_PER_LATENT, MazeMaps, maps, render
from worldsim.maze.walks import TRAIN_SEEDS, homing, per_picture, theme_track, walks

Item = TypeVar("Item")


@dataclass(frozen=True)
class Walks:
    """Walks with their controls and themes; positions are along latent frames.

    Attributes:
        mazes: the maps walked through.
        poses: of every picture, ``[B, 1 + 4 (N - 1), 3]``.
        keys: held keys, bool ``[B, N, 6]``.
        themes: theme indices, ``[B, N, 4]``.
    """

    mazes: MazeMaps
    poses: Tensor
    keys: Tensor
    themes: Tensor

    def pictures(self, first: int, latents: int, size: tuple[int, int], rows: slice) -> Tensor:
        """Pictures of ``latents`` latent frames from ``first`` on, uint8 ``[B, P, H, W, 3]``.

        A clip begins a stream: its first latent frame is one picture.
        """
        shown = slice(PICTURES_PER_LATENT * first, PICTURES_PER_LATENT * (first + latents - 1) + 1)
        themes = per_picture(self.themes[rows, first : first + latents])
        return render(self.mazes[rows], self.poses[rows, shown], themes, *size)


def make_walks(
    maps_count: int,
    frames: int,
    seeds: tuple[int, ...],
    device: str,
    switches: float = 0.3,
    homing_rows: int = 0,
    drilled: bool = False,
) -> Walks:
    """``seeds`` (any non-negative numbers) name the batch; the same ones give the same walks.

    Args:
        switches: share of the walks whose theme changes once.
        homing_rows: how many walks, the first ones, keep coming back to their start.
        drilled: the others hold single keys, see `worldsim.maze.walks.walks`.
    """
    random = np.random.default_rng(np.random.SeedSequence(seeds))
    mazes = maps(random.choice(TRAIN_SEEDS.stop, maps_count, replace=False).tolist()).to(device)
    seed = int(random.integers(2**31))
    walk = walks(mazes, mazes.start, frames, seed, drilled)
    if homing_rows:
        some = slice(0, homing_rows)
        home = homing(mazes[some], mazes.start[some], frames, seed)
        walk.keys[some], walk.poses[some] = home.keys, home.poses
    themes = theme_track(maps_count, frames, seed, switches).to(device)
    return Walks(mazes, walk.poses, walk.keys, themes)


class Library(Generic[Item]):
    """The newest ``keep`` batches; which ones are there depends on the step alone."""

    def __init__(self, footage: Footage, make: Callable[[int], Item]) -> None:
        self.footage = footage
        self._make = make
        self._held: OrderedDict[int, Item] = OrderedDict()

    def at(self, step: int) -> list[Item]:
        """The batches that training reads at ``step``, made now where they are missing."""
        newest = step // self.footage.every + self.footage.keep - 1
        wanted = range(newest - self.footage.keep + 1, newest + 1)
        for number in [n for n in self._held if n not in wanted]:
            del self._held[number]
        for number in wanted:
            if number not in self._held:
                self._held[number] = self._make(number)
        return [self._held[number] for number in wanted]
