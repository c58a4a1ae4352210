"""Figures of clips: known values, and that each falls for what it is meant to see."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from worldsim import metrics


def clip(pictures: int = 4, height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    """A textured picture that wanders to the left."""
    generator = torch.Generator().manual_seed(seed)
    texture = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return torch.stack([texture.roll(-i, 1) for i in range(pictures)])


def blurred(x: torch.Tensor, size: int = 5) -> torch.Tensor:
    soft = avg_pool2d(x.permute(0, 3, 1, 2).float(), size, 1, size // 2, count_include_pad=False)
    return soft.permute(0, 2, 3, 1).round().to(torch.uint8)


def flat(level: int, pictures: int = 2, height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((pictures, height, width, 3), level, np.uint8)


def test_psnr() -> None:
    x = clip()
    assert metrics.psnr(x, x) == metrics.psnr(flat(7), flat(8)) == pytest.approx(48.13, abs=0.01)
    assert metrics.psnr(flat(0), flat(255)) == 0
    assert metrics.psnr(flat(0), flat(10)) == pytest.approx(20 * np.log10(25.5))
    assert metrics.psnr(x, blurred(x, 3)) > metrics.psnr(x, blurred(x, 7))
    assert metrics.psnr(x.numpy(), blurred(x)) == metrics.psnr(blurred(x), x)


def test_sharpness() -> None:
    stripes = flat(0)
    stripes[:, :, ::2] = 100
    assert metrics.sharpness(flat(9)) == 0
    assert metrics.sharpness(stripes) == 50  # 100 across, 0 down
    x = clip()
    assert (
        metrics.sharpness(x) > metrics.sharpness(blurred(x, 3)) > metrics.sharpness(blurred(x, 7))
    )


def test_motion() -> None:
    x = clip()
    assert metrics.motion(x[:1].expand_as(x)) == 0
    assert metrics.motion(np.concatenate([flat(0, 1), flat(30, 1), flat(20, 1)])) == 20
    assert metrics.motion(x) > metrics.motion(blurred(x))


@pytest.mark.parametrize("figure", ["sharpness", "motion"])
def test_what_is_no_clip(figure: str) -> None:
    measure = getattr(metrics, figure)
    with pytest.raises(ValueError, match=r"a clip is uint8 .*, got float32 \[4, 24, 32, 3\]$"):
        measure(clip().float())
    with pytest.raises(ValueError, match=r"got uint8 \[24, 32, 3\]$"):
        measure(clip()[0])
    with pytest.raises(ValueError, match=r"got uint8 \[4, 3, 24, 32\]$"):
        measure(clip().permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="or more pictures is needed, got 0"):
        measure(clip()[:0])


@pytest.mark.parametrize("figure", ["psnr"])
def test_what_is_no_pair(figure: str) -> None:
    measure = getattr(metrics, figure)
    with pytest.raises(ValueError, match=r"one shape .* \[4, 24, 32, 3\], \[3, 24, 32, 3\]$"):
        measure(clip(), clip(3))
    with pytest.raises(ValueError, match="a clip is uint8"):
        measure(clip(), clip().double())
