"""Which theme a clip shows: a nearest-centroid reading of its colours, checked on true clips."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from worldsim.maze.simulator import maps, render
from worldsim.maze.themes import ALL_THEMES
from worldsim.maze.walks import HELD_OUT, walks

BANDS = 8  # horizontal stripes in which colours are measured
MAPS = 12  # true clips by which each theme is known
LATENTS = 9


def features(clip: Tensor | NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean and spread of each colour in each horizontal band of a clip ``[P, H, W, 3]``."""
    x = torch.as_tensor(clip).float() / 255
    bands = rearrange(x, "p (bands h) w c -> (bands c) (p h w)", bands=BANDS)
    spread, mean = torch.std_mean(bands.contiguous(), dim=1)
    return torch.cat((mean, spread)).double().numpy()


@dataclass(frozen=True)
class Looks:
    """The true themes' centroids, in feature space scaled by the spread within a theme."""

    centroids: NDArray[np.float64]  # [72, features]
    scale: NDArray[np.float64]  # [features]
    accuracy: float  # share of attributes read right on other true clips

    def recognise(self, clip: Tensor | NDArray[np.uint8]) -> tuple[int, int, int, int]:
        """Theme indices of the nearest centroid."""
        away = (self.centroids - features(clip)) / self.scale
        return ALL_THEMES[int(np.square(away).sum(-1).argmin())].indices()


def learn_looks(size: tuple[int, int]) -> Looks:
    """Measure every theme on true clips, and the method on true clips of other maps."""
    known, unseen = (_measured(HELD_OUT + first, size) for first in (1_000_000, 2_000_000))
    centroids = known.mean(1)
    scale = (known - centroids[:, None]).std((0, 1)) + 1e-3
    away = (unseen[:, :, None] - centroids[None, None]) / scale
    nearest = np.square(away).sum(-1).argmin(-1)  # [72, maps]
    themes = np.array([theme.indices() for theme in ALL_THEMES])
    return Looks(centroids, scale, float((themes[nearest] == themes[:, None]).mean()))


def _measured(seed: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """Features ``[72, maps, …]`` of every theme on the same walks."""
    mazes = maps(range(seed, seed + MAPS))
    poses = walks(mazes, mazes.start, LATENTS, seed).poses[:, ::4]
    out = []
    for theme in ALL_THEMES:
        indices = torch.tensor(theme.indices()).expand(*poses.shape[:2], 4)
        out.append([features(clip) for clip in render(mazes, poses, indices, *size)])
    return np.array(out)
