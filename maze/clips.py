"""Which frames of a walk make a clip of stage three: returns, theme changes, and plain stretches.

A returning clip is a few remembered frames, a gap, and the run of frames that comes back to what
they show. That is what a sink, or pages found again by their pose, leave in a context.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worldsim.maze.layout import short_way

REMEMBERED = 3  # at most one in so many frames of a returning clip
FROM_START = 0.3  # share of plain stretches that begin with the first picture of a walk
SINK = 0.6  # share of returning clips that remember the first frames of their walk
NEAR, TURNED = 0.7, 0.6  # cells and radians over which two views stop being of the same thing

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Clip:
    """Frames of one walk: ``remembered`` of them first, the others in one run."""

    row: int
    frames: Indices
    remembered: int = 0


class Clips:
    """Draws clips of ``frames`` latent frames out of walks.

    Args:
        poses: true poses at the end of each latent frame, ``[B, N, 3]``.
        themes: ``[B, N, 4]``.
        cells: side of the (toroidal) maps.
        returning, switching: shares of clips; the rest are plain stretches.
    """

    def __init__(
        self,
        poses: Tensor,
        themes: Tensor,
        frames: int,
        cells: int,
        returning: float,
        switching: float,
    ) -> None:
        self.frames = frames
        self.returning = returning
        self.switching = switching
        self._most = max(1, frames // REMEMBERED)
        self._alike = alike(poses.numpy(), cells)
        self._length = poses.shape[1]
        self._chances = self._weights(self._to_start()).cumsum()
        self._changed = (themes.numpy()[:, 1:] != themes.numpy()[:, :-1]).any(-1)  # [B, N - 1]

    def draw(self, random: np.random.Generator) -> Clip:
        kind = random.random()
        if kind < self.returning:
            return self._returning(random)
        if kind < self.returning + self.switching and self._changed.any():
            return self._switching(random)
        row = int(random.integers(len(self._alike)))
        if random.random() < FROM_START:
            return Clip(row, np.arange(self.frames))
        return self._run(row, int(random.integers(1, self._length - self.frames + 1)))

    def _run(self, row: int, first: int) -> Clip:
        return Clip(row, np.arange(first, first + self.frames))

    def _switching(self, random: np.random.Generator) -> Clip:
        """The theme changes at one of the run's later frames."""
        rows, before = np.nonzero(self._changed)
        chosen = int(random.integers(len(rows)))
        first = int(before[chosen] + 1 - random.integers(1, self.frames))
        return self._run(int(rows[chosen]), int(np.clip(first, 0, self._length - self.frames)))

    def _returning(self, random: np.random.Generator) -> Clip:
        remembered = int(random.integers(1, self._most + 1))
        run = self.frames - remembered
        # What `random.choice` does with weights, with their sums made once.
        chosen = int(self._chances.searchsorted(random.random() * self._chances[-1], "right"))
        row, last = divmod(chosen, self._length)
        back = int(random.integers(0, min(4, run)))  # the view returns up to so long before the end
        last = min(last + back, self._length - 1)
        first = max(last - run + 1, remembered)
        present = np.arange(first, first + run)
        if random.random() < SINK:
            return Clip(row, np.concatenate((np.arange(remembered), present)), remembered)
        # The most alike of a random half of all earlier frames, in the order of time.
        score = self._alike[row, last, :first] * (random.random(first) < 0.5)
        found = np.sort(np.argsort(-score, kind="stable")[:remembered])
        return Clip(row, np.concatenate((found, present)), remembered)

    def _to_start(self) -> NDArray[np.float64]:
        """How alike each frame's view is to one of the first, ``[B, N]``."""
        return self._alike[:, :, : self._most].max(-1)

    def _weights(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = score + 0.01
        weights[:, : 2 * self.frames] = 1e-9  # no return so soon: the place was hardly left
        return weights / weights.sum()


def alike(poses: NDArray[np.float32], cells: int) -> NDArray[np.float64]:
    """How much two views of a walk show the same, by pose alone: ``[B, N, 3] → [B, N, N]`` in 0…1.

    The field-of-view rule of Matrix-Game 3.0 in its simplest form: near and alike in heading.
    """
    apart = poses[:, :, None, :].astype(np.float64) - poses[:, None, :, :]
    place = short_way(apart[..., :2], cells)
    heading = (apart[..., 2] + np.pi) % (2 * np.pi) - np.pi
    return np.exp(-np.square(place).sum(-1) / NEAR**2 - np.square(heading / TURNED))
