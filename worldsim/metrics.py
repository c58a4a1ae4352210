"""Figures of clips: likeness of two, looks of one, drift of a long one. No model, no world.

A clip is uint8 ``[P, H, W, 3]``, a torch tensor or a numpy array: P pictures of H × W pixels, RGB.
Anything else is refused with a `ValueError`, since a float clip in 0…1 would give a wrong figure.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Clip: TypeAlias = Tensor | NDArray[Any]


def psnr(a: Clip, b: Clip) -> float:
    """PSNR in dB of two clips of one shape, over all their pictures.

    At most 48.1: an error of one level is the finest that counts, so that a second in which
    nothing moves cannot swamp a mean.
    """
    x, y = (clip.to(torch.float64) for clip in _pair(a, b))
    error = float((x - y).square().mean())
    return 10 * float(np.log10(255.0**2 / max(error, 1.0)))


def sharpness(clip: Clip) -> float:
    """Mean absolute difference of neighbouring pixels, 0…255."""
    x = _checked(clip).to(torch.float32)
    return float(x.diff(dim=-2).abs().mean() + x.diff(dim=-3).abs().mean()) / 2


def motion(clip: Clip) -> float:
    """Mean absolute difference of successive pictures, 0…255."""
    return float(_checked(clip, least=2).to(torch.float32).diff(dim=0).abs().mean())


def _pair(a: Clip, b: Clip) -> tuple[Tensor, Tensor]:
    x, y = _checked(a), _checked(b)
    if x.shape != y.shape:
        raise ValueError(f"two clips of one shape are needed, got {list(x.shape)}, {list(y.shape)}")
    return x, y


def _checked(clip: Clip, least: int = 1) -> Tensor:
    x = torch.as_tensor(clip)
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        given = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise ValueError(f"a clip is uint8 [pictures, height, width, 3], got {given}")
    if len(x) < least:
        raise ValueError(f"a clip of {least} or more pictures is needed, got {len(x)}")
    return x
