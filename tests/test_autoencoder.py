"""The autoencoder as a stream: explicit carry, and the same bits however a clip is cut."""

from pathlib import Path

import pytest
import torch
from carries import check_streams_apart, decoded, encoded
from torch import Tensor

from worldsim.models.autoencoder import CausalAutoencoder, from_pictures, to_pictures
from worldsim.models.weights import cast, load_model

LATENTS, CHANNELS, SIZE = 7, 4, (24, 32)
PICTURES = 1 + 4 * (LATENTS - 1)
CUTS = ([1] * 7, [1, 6], [2, 2, 3], [4, 1, 2])  # latent frames of each call; they add up to 7


def tiny(dtype: torch.dtype = torch.float32) -> CausalAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CausalAutoencoder(
            CHANNELS, widths=(12, 8, 6), depths=(2, 1, 1),
            latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[0.5, 1.5, 0.8, 1.1],
        )  # fmt: skip
    return cast(model.eval().requires_grad_(False), dtype)


def pictures(seed: int = 0, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, 3, PICTURES, *SIZE, generator=generator) - 1


def latents(seed: int = 0, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, LATENTS, SIZE[0] // 8, SIZE[1] // 8, generator=generator)


# --- streams ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@torch.inference_mode()
def test_streaming_encode_is_the_whole_clip(cuts: list[int], dtype: torch.dtype) -> None:
    model, clip = tiny(dtype), pictures(batch=2).to(dtype)
    whole, last = model.encode(clip)
    assert whole.shape == (2, CHANNELS, LATENTS, 3, 4)
    parts, carry = encoded(model, clip, cuts)
    assert torch.equal(parts, whole)
    assert carry is not None and last is not None
    assert all(map(torch.equal, carry, last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@torch.inference_mode()
def test_streaming_decode_is_the_whole_clip(cuts: list[int], dtype: torch.dtype) -> None:
    model, z = tiny(dtype), latents(batch=2)
    whole, last = model.decode(z)
    assert whole.shape == (2, 3, PICTURES, *SIZE)
    parts, carry = decoded(model, z, cuts)
    assert torch.equal(parts, whole)
    assert carry is not None and last is not None
    assert all(map(torch.equal, carry, last))


@torch.inference_mode()
def test_time_is_causal_and_remembered() -> None:
    model = tiny()
    clip, z = pictures(), latents()
    later_clip, later_z = clip.clone(), z.clone()
    later_clip[:, :, 9:] += 0.5  # pictures of latent frames 3 and on
    later_z[:, :, 3:] += 0.5
    coded, coded_later = model.encode(clip)[0], model.encode(later_clip)[0]
    assert torch.equal(coded[:, :, :3], coded_later[:, :, :3])
    shown, shown_later = model.decode(z)[0], model.decode(later_z)[0]
    assert torch.equal(shown[:, :, :9], shown_later[:, :, :9])
    # And the past does count: the same latent frame decodes otherwise after another one.
    begun = model.decode(z[:, :, 3:4])[0]
    _, carry = model.decode(z[:, :, :3])
    assert (model.decode(z[:, :, 3:4], carry)[0][:, :, 3:] - begun).abs().max() > 1e-3


@torch.inference_mode()
def test_interleaved_streams_do_not_disturb_each_other() -> None:
    clips, codes = [pictures(seed) for seed in (1, 2)], [latents(seed) for seed in (3, 4)]
    check_streams_apart(tiny(), clips, codes)


@torch.inference_mode()
def test_a_carry_is_never_written() -> None:
    # A fork goes on from the same carry twice.
    model, z = tiny(), latents()
    _, carry = model.decode(z[:, :, :4])
    assert carry is not None
    kept = [tensor.clone() for tensor in carry]
    first, _ = model.decode(z[:, :, 4:], carry)
    second, _ = model.decode(z[:, :, 4:], carry)
    assert torch.equal(first, second)
    assert all(map(torch.equal, carry, kept))


# --- the training path ------------------------------------------------------------------------
@torch.inference_mode()
def test_the_training_path_is_the_stream() -> None:
    model, clip, z = tiny(), pictures(batch=2), latents(batch=2)
    assert (model.normalised(model.encode_clip(clip)) - model.encode(clip)[0]).abs().max() <= 1e-5
    assert (model.decode_clip(model.denormalised(z)) - model.decode(z)[0]).abs().max() <= 1e-5


@torch.inference_mode()
def test_latents_are_normalised_by_channel() -> None:
    model = tiny()
    raw = latents().transpose(1, 2)
    normal = model.normalised(raw)
    for channel, (mean, std) in enumerate(
        zip((0.3, -0.2, 0.1, 0.0), (0.5, 1.5, 0.8, 1.1), strict=True)
    ):
        assert (normal[:, channel] - (raw[:, :, channel] - mean) / std).abs().max() <= 1e-6
    assert (model.denormalised(normal) - raw).abs().max() <= 1e-6


# --- what does not fit ------------------------------------------------------------------------
@pytest.mark.parametrize("count", [2, 4, 7])
def test_a_stream_begins_with_one_more_than_fours(count: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^{count} pictures do not fill latent frames: give 1 \+ 4·n"
    ):
        tiny().encode(pictures()[:, :, :count])


@pytest.mark.parametrize("count", [0, 1, 5])
@torch.inference_mode()
def test_a_stream_goes_on_in_fours(count: int) -> None:
    model = tiny()
    _, carry = model.encode(pictures()[:, :, :1])
    with pytest.raises(ValueError, match=f"^{count} pictures do not fill latent frames: give 4·n$"):
        model.encode(pictures()[:, :, :count], carry)


@pytest.mark.parametrize(("height", "width"), [(20, 32), (32, 30), (0, 8)])
def test_sizes_that_eight_does_not_divide(height: int, width: int) -> None:
    message = f"^picture size {height}×{width} must be a multiple of 8$"
    with pytest.raises(ValueError, match=message):
        tiny().latent_size(height, width)
    with pytest.raises(ValueError, match=message):
        tiny().encode(torch.zeros(1, 3, 1, height, width))


# --- dtypes, files, pixels --------------------------------------------------------------------
@torch.inference_mode()
def test_bfloat16_is_close_to_float32() -> None:
    full, half = tiny(), tiny(torch.bfloat16)
    exact, rough = full.decode(latents())[0], half.decode(latents())[0]  # latents stay float32
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() <= 0.05 * exact.abs().max()
    clip = pictures()
    exact, rough = full.encode(clip)[0], half.encode(clip.bfloat16())[0]
    assert (rough - exact).abs().max() <= 0.05 * exact.abs().max()


@torch.inference_mode()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    theirs = CausalAutoencoder.from_pretrained(tmp_path)
    for loaded in (load_model(CausalAutoencoder, tmp_path), theirs):
        # Weights, and the statistics, which are part of the configuration.
        assert torch.equal(loaded.decode(latents())[0], model.decode(latents())[0])
        assert torch.equal(loaded.encode(pictures())[0], model.encode(pictures())[0])


def test_pixels_there_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, -1, -1, 3)
    for dtype in (torch.float32, torch.float64):
        signal = from_pictures(every[None], dtype)
        assert signal.shape == (1, 3, 2, 16, 16)
        assert (float(signal.min()), float(signal.max())) == (-1.0, 1.0)
        assert torch.equal(to_pictures(signal), every)
    # What the decoder overshoots is cut off, not wrapped round.
    loud = torch.tensor([-1.5, 1.5]).reshape(1, 1, 1, 1, 2).expand(1, 3, 1, 1, 2)
    assert to_pictures(loud)[0, 0].tolist() == [[0] * 3, [255] * 3]
