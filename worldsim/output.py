"""What calling a world returns, in the shapes of diffusers' video pipelines."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

OUTPUTS = ("np", "pil", "pt", "latent")


@dataclass
class WorldOutput:
    """``frames`` has one entry for each video, as in diffusers."""

    frames: Any


def as_output(frames: NDArray[np.uint8], output_type: str) -> Any:
    """Pictures ``[F, H, W, 3]`` as ``np``, ``pil`` or ``pt``, see `World.__call__`."""
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in frames]]
    scaled = frames.astype(np.float32)[None] / 255
    if output_type == "pt":
        return torch.from_numpy(scaled).permute(0, 1, 4, 2, 3)
    return scaled
