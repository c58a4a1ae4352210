"""What two poses see in common, for retrieval by pose (Matrix-Game 3.0). No tensor, no model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worldsim.cache.policy import Pose

BEARINGS, DEPTHS = 9, 6  # points of a view that are tried


@dataclass(frozen=True)
class Camera:
    """Geometry of a world's pictures.

    Attributes:
        field_of_view: in radians.
        reach: how far a view counts, in the units of a pose.
        period: side of a world that wraps round, or None.
    """

    field_of_view: float
    reach: float
    period: float | None = None

    def overlap(self, pose: Pose, others: Sequence[Pose]) -> NDArray[np.float64]:
        """Share of the points of one view that each of the others sees as well, those that it is
        near to counting more; walls are unknown here. ``[n]`` in 0…1."""
        poses = np.array(others, dtype=np.float64)
        half = self.field_of_view / 2
        bearing, depth = np.meshgrid(
            np.linspace(-half, half, BEARINGS), (np.arange(DEPTHS) + 1) / DEPTHS * self.reach
        )
        x = pose[0] + (depth * np.cos(pose[2] + bearing)).ravel()
        y = pose[1] + (depth * np.sin(pose[2] + bearing)).ravel()
        there = np.stack([x, y], axis=-1)[None] - poses[:, None, :2]
        if self.period is not None:
            there = (there + self.period / 2) % self.period - self.period / 2
        far = np.hypot(there[..., 0], there[..., 1])
        aside = np.arctan2(there[..., 1], there[..., 0]) - poses[:, None, 2]
        aside = (aside + math.pi) % (2 * math.pi) - math.pi
        seen = (np.abs(aside) <= half + 1e-9) & (far <= self.reach * (1 + 1e-9))
        nearness = 1 - far / (2 * self.reach)
        return (seen * nearness).mean(axis=1)
