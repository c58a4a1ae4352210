"""Figures of clips: known values, and that each falls for what it is meant to see."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from worldsim import metrics


def clip(pictures: int = 4, height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    """A picture of soft spots that wanders to the left."""
    generator = torch.Generator().manual_seed(seed)
    spots = torch.rand(1, 3, height // 4, width // 4, generator=generator)
    texture = interpolate(spots, (height, width), mode="bilinear")[0].permute(1, 2, 0)
    return torch.stack([(255 * texture.roll(-i, 1)).byte() for i in range(pictures)])


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


def test_ssim() -> None:
    x = clip()
    assert metrics.ssim(x, x.numpy()) == pytest.approx(1, abs=1e-9)
    assert metrics.ssim(flat(0), flat(255)) == pytest.approx(0, abs=1e-3)
    assert metrics.ssim(x, blurred(x)) == pytest.approx(metrics.ssim(blurred(x), x))
    figures = [metrics.ssim(x, y) for y in (x, blurred(x, 3), blurred(x, 7), clip(seed=1))]
    assert figures == sorted(figures, reverse=True)
    assert figures[1] > 0.9 > figures[2]
    # a mean over pictures: one picture of two is the same
    half = torch.stack([x[0], blurred(x)[1]])
    assert metrics.ssim(x[:2], half) == pytest.approx((1 + metrics.ssim(x[1:2], half[1:])) / 2)
    with pytest.raises(ValueError, match=r"6 or more pixels a side, got \[5, 32\]$"):
        metrics.ssim(x[:, :5], x[:, :5])


def test_colour() -> None:
    x = clip(height=48, width=64)
    assert metrics.colour(flat(7)).tolist() == [7, 7, 7]
    red = flat(0)
    red[..., 0] = 90
    assert metrics.colour(red).tolist() == [90, 0, 0]
    distance = metrics.colour_distance
    assert distance(x, x[:2].numpy()) < 1e-9  # the same pixels at other places
    assert distance(flat(0), flat(255)) == 255
    assert distance(flat(0), red) == 30
    stripes = np.concatenate([flat(0), flat(100)])
    assert distance(stripes, flat(50)) == pytest.approx(25)  # spread alone, by half
    little = max(distance(x, y) for y in (blurred(x, 3), clip(height=48, width=64, seed=1)))
    much = min(distance(x, y) for y in ((x * 0.8).byte(), x // 2 + 64))
    assert much > 2 * little


def test_vde() -> None:
    assert metrics.vde([1, 0.9, 0.8]) == pytest.approx(0.4)
    assert metrics.vde([5.0] * 10) == 0
    assert metrics.vde([2, 3]) == metrics.vde([2, 1]) == 0.5
    assert metrics.vde([1, 0.5, 1]) > metrics.vde([1, 1, 0.5])  # early drift weighs more
    for values, message in (([0.0, 1.0], "above 0, got 0"), ([float("nan"), 1], "above 0")):
        with pytest.raises(ValueError, match=message):
            metrics.vde(values)
    with pytest.raises(ValueError, match=r"two or more parts of a video, got 1$"):
        metrics.vde([1.0])


@pytest.mark.parametrize("figure", ["sharpness", "motion", "colour"])
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


@pytest.mark.parametrize("figure", ["psnr", "ssim"])
def test_what_is_no_pair(figure: str) -> None:
    measure = getattr(metrics, figure)
    with pytest.raises(ValueError, match=r"one shape .* \[4, 24, 32, 3\], \[3, 24, 32, 3\]$"):
        measure(clip(), clip(3))
    with pytest.raises(ValueError, match="a clip is uint8"):
        measure(clip(), clip().double())
