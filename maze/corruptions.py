"""Known faults of the truth, by which the scoreboard is checked."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

from worldsim.maze.streams import Fault, Pictures

NOISE = 12.0  # levels
TINT = (1.2, 0.9, 0.75)  # what a shift of colour does to red, green and blue


def blurred(pictures: Pictures) -> Pictures:
    """A 5×5 mean of every picture."""
    x = torch.as_tensor(pictures).permute(0, 3, 1, 2).float()
    x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return _levels(x.permute(0, 2, 3, 1).numpy())


def tinted(pictures: Pictures) -> Pictures:
    """Warmer colours."""
    return _levels(pictures * np.array(TINT, dtype=np.float32))


def noisy(pictures: Pictures) -> Pictures:
    """Normal noise; the same for the same pictures."""
    random = np.random.default_rng(int(pictures.astype(np.int64).sum()))
    return _levels(pictures + NOISE * random.standard_normal(pictures.shape).astype(np.float32))


def _levels(x: np.ndarray) -> Pictures:
    return x.round().clip(0, 255).astype(np.uint8)


MIRRORED = {
    "KeyW": "KeyS", "KeyS": "KeyW", "KeyA": "KeyD", "KeyD": "KeyA", "KeyJ": "KeyL", "KeyL": "KeyJ",
}  # fmt: skip

FAULTS: Mapping[str, Fault] = {
    "truth": Fault(),
    "frozen": Fault(still=True),
    "blur": Fault(pictures=blurred),
    "colour shift": Fault(pictures=tinted),
    "noise": Fault(pictures=noisy),
    "wrong controls": Fault(keys=MIRRORED),
    "another map": Fault(elsewhere=True),
}
