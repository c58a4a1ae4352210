"""Which theme a clip shows: a linear discriminant of its colours, checked on true clips."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from worldsim.maze.simulator import PICTURES_PER_LATENT, maps, render
from worldsim.maze.themes import ALL_THEMES
from worldsim.maze.truth import WANDER
from worldsim.maze.walks import HELD_OUT, walks

BANDS = 8  # horizontal stripes in which colours are measured
MAPS = 24  # true clips by which each theme is known, and as many by which the method is checked
LATENTS = 8  # latent frames of a clip
EVERY = 4  # pictures; successive ones show much the same
SHRINKAGE = 0.01  # of the spread within a theme towards a ball


def features(clip: Tensor | NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean and spread of each colour in each horizontal band of a clip ``[P, H, W, 3]``."""
    x = torch.as_tensor(clip).float() / 255
    bands = rearrange(x, "p (bands h) w c -> (bands c) (p h w)", bands=BANDS)
    spread, mean = torch.std_mean(bands.contiguous(), dim=1)
    return torch.cat((mean, spread)).double().numpy()


@dataclass(frozen=True)
class Looks:
    """The true themes' centroids in a space in which clips of one theme are spread alike.

    Attributes:
        centroids: ``[72, features]``.
        whitening: ``[features, features]``.
        attributes, themes: share of attributes, and of whole themes, read right on two seconds of
            other true walks.
    """

    centroids: NDArray[np.float64]
    whitening: NDArray[np.float64]
    attributes: float
    themes: float

    def recognise(self, clip: Tensor | NDArray[np.uint8]) -> tuple[int, int, int, int]:
        """Theme indices of the nearest centroid."""
        found = int(_nearest(features(clip), self.centroids, self.whitening))
        return ALL_THEMES[found].indices()


def learn_looks(size: tuple[int, int]) -> Looks:
    """Measure every theme on true clips, and the method on true clips of other maps."""
    known, unseen = (_measured(HELD_OUT + first, size) for first in (1_000_000, 2_000_000))
    centroids = known.mean(1)
    within = (known - centroids[:, None]).reshape(-1, known.shape[-1])
    spread = within.T @ within / len(within)
    spread += SHRINKAGE * np.trace(spread) / len(spread) * np.eye(len(spread))
    whitening = np.linalg.cholesky(np.linalg.inv(spread))
    themes = np.array([theme.indices() for theme in ALL_THEMES])
    right = themes[_nearest(unseen, centroids, whitening)] == themes[:, None]
    return Looks(centroids, whitening, float(right.mean()), float(right.all(-1).mean()))


def _nearest(
    clips: NDArray[np.float64], centroids: NDArray[np.float64], whitening: NDArray[np.float64]
) -> NDArray[np.int64]:
    away = (clips @ whitening)[..., None, :] - centroids @ whitening
    return np.square(away).sum(-1).argmin(-1)


def _measured(seed: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Features ``[72, maps, …]`` of every theme in the same seconds of walks."""
    mazes = maps(range(seed, seed + MAPS))
    poses = walks(mazes, mazes.start, WANDER + LATENTS, seed).poses
    begins = PICTURES_PER_LATENT * np.random.default_rng(seed).integers(0, WANDER, MAPS)
    shown = torch.stack([
        walk[begin : begin + PICTURES_PER_LATENT * LATENTS : EVERY]
        for walk, begin in zip(poses, begins, strict=True)
    ])  # fmt: skip
    out = []
    for theme in ALL_THEMES:
        indices = torch.tensor(theme.indices()).expand(*shown.shape[:2], 4)
        out.append([features(clip) for clip in render(mazes, shown, indices, *size)])
    return np.array(out)
