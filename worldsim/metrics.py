"""Figures of clips: likeness of two, looks of one, drift of a long one. No model, no world.

A clip is uint8 ``[P, H, W, 3]``, a torch tensor or a numpy array: P pictures of H × W pixels, RGB.
Anything else is refused with a `ValueError`, since a float clip in 0…1 would give a wrong figure.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Clip: TypeAlias = Tensor | NDArray[Any]
LEVELS = 255.0  # from black to white
LEAST_SIDE = 6  # pixels that the window of `ssim` needs, borders mirrored


def psnr(a: Clip, b: Clip) -> float:
    """PSNR in dB of two clips of one shape, over all their pictures.

    At most 48.1: an error of one level is the finest that counts, so that a second in which
    nothing moves cannot swamp a mean.
    """
    x, y = (clip.to(torch.float64) for clip in _pair(a, b))
    error = float((x - y).square().mean())
    return 10 * float(np.log10(LEVELS**2 / max(error, 1.0)))


def ssim(a: Clip, b: Clip) -> float:
    """Structural similarity of two clips of one shape: the mean over pictures, 1 for equal ones.

    That of Wang et al. 2004 as torchmetrics computes it: a Gaussian window of 11 × 11 pixels for
    each channel, borders mirrored (which asks for 6 or more pixels a side).
    """
    # Here, not above: torchmetrics loads for seconds.
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (clip.permute(0, 3, 1, 2) for clip in _pair(a, b))
    if min(x.shape[-2:]) < LEAST_SIDE:
        raise ValueError(f"ssim needs {LEAST_SIDE} or more pixels a side, got {list(x.shape[-2:])}")
    total = 0.0
    for ours, theirs in zip(x.double().split(1), y.double().split(1), strict=True):  # less memory
        likeness = structural_similarity_index_measure(ours, theirs, data_range=LEVELS)
        assert isinstance(likeness, Tensor), "a pair comes only where one asks for it"
        total += float(likeness)
    return total / len(x)


def sharpness(clip: Clip) -> float:
    """Mean absolute difference of neighbouring pixels, 0…255."""
    x = _checked(clip).to(torch.float32)
    return float(x.diff(dim=-2).abs().mean() + x.diff(dim=-3).abs().mean()) / 2


def motion(clip: Clip) -> float:
    """Mean absolute difference of successive pictures, 0…255."""
    return float(_checked(clip, least=2).to(torch.float32).diff(dim=0).abs().mean())


def colour(clip: Clip) -> Tensor:
    """Mean colour, float64 ``[3]``, 0…255."""
    return _levels(clip).mean(dim=1)


def colour_distance(a: Clip, b: Clip) -> float:
    """How far apart the colours of two clips are, 0…255; their sizes may differ.

    The difference of the means plus half of the difference of the standard deviations, averaged
    over channels. Where a colour stands does not count: a cast or a fade shows, blur hardly does,
    nor does another view of the same things.
    """
    x, y = _levels(a), _levels(b)
    means = (x.mean(dim=1) - y.mean(dim=1)).abs()
    spreads = (x.std(dim=1, correction=0) - y.std(dim=1, correction=0)).abs()
    return float((means + spreads / 2).mean())


def vde(values: Sequence[float]) -> float:
    """Video Drift Error of a figure over N equal parts of a video, 0 where it never changes.

    As LV-Bench defines it, ``Σ (N - i + 1) · |mᵢ - m₁| / m₁`` for i = 2…N: early drift weighs most,
    since all that follows is built on it.

    Raises:
        ValueError: for fewer than two parts, or a first one that is not above 0.
    """
    if len(values) < 2:
        raise ValueError(f"drift needs two or more parts of a video, got {len(values)}")
    first = values[0]
    if not first > 0:
        raise ValueError(f"drift is relative to the first part, which must be above 0, got {first}")
    weights = range(len(values) - 1, 0, -1)
    drifts = (abs(value - first) / first for value in values[1:])
    return sum(weight * drift for weight, drift in zip(weights, drifts, strict=True))


def _levels(clip: Clip) -> Tensor:
    """All pixels of each channel, float64 ``[3, P · H · W]``."""
    return _checked(clip).to(torch.float64).flatten(0, 2).T


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
