"""Wan's VAE as a stream: diffusers' bits however a clip is cut, and a model without state."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from carries import check_streams_apart, decoded, encoded
from diffusers import AutoencoderKLWan
from torch import Tensor

from worldsim.models.autoencoder import Carry
from worldsim.models.wan_vae import WanAutoencoder, load_vae
from worldsim.models.weights import cast

LATENTS, SIZE = 7, (16, 24)
PICTURES = 1 + 4 * (LATENTS - 1)
CUTS = ([7], [1] * 7, [3, 3, 1], [1, 2, 4])  # latent frames of each call; they add up to 7
MEAN, STD = [0.3, -0.2, 0.1, 0.0], [0.5, 1.5, 0.8, 1.1]
WAN21: dict[str, Any] = {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]}
WAN22: dict[str, Any] = {
    "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "is_residual": True,
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 12,
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}  # where that convolution is rounded differently
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def diffusers_vae(kind: dict[str, Any] = WAN21, **config: Any) -> AutoencoderKLWan:
    sizes = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae = AutoencoderKLWan(
            **sizes | {"latents_mean": MEAN, "latents_std": STD} | kind | config,
        )
    return vae.eval().requires_grad_(False)


def tiny(kind: dict[str, Any] = WAN21, dtype: torch.dtype = torch.float32) -> WanAutoencoder:
    return WanAutoencoder(cast(diffusers_vae(kind), dtype))


@contextmanager
def frame_by_frame(vae: AutoencoderKLWan) -> Iterator[None]:
    """diffusers takes the 1×1 convolution at either end over the whole clip at once, and everything
    else frame by frame. Such a convolution is the same for every frame, but some CPUs round it
    differently where there are more of them (float32, last bit)."""
    convolutions = (vae.quant_conv, vae.post_quant_conv)
    for convolution in convolutions:
        at_once = type(convolution).forward.__get__(convolution)
        convolution.forward = lambda x, at_once=at_once: torch.cat(
            [at_once(frame) for frame in x.split(1, dim=2)], dim=2
        )
    try:
        yield
    finally:
        for convolution in convolutions:
            del convolution.forward


def pictures(seed: int = 0, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, 3, PICTURES, *SIZE, generator=generator) - 1


def latents(seed: int = 0, batch: int = 1, count: int = LATENTS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, count, SIZE[0] // 8, SIZE[1] // 8, generator=generator)


def by_channel(numbers: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype).reshape(1, -1, 1, 1, 1)


def tensors(carry: Carry) -> list[Tensor]:
    assert carry is not None
    return [entry for entry in carry if isinstance(entry, Tensor)]


# --- the same bits as diffusers ---------------------------------------------------------------
@DTYPES
@KINDS
@torch.inference_mode()
def test_streaming_decode_is_diffusers_whole_clip(kind: dict[str, Any], dtype: torch.dtype) -> None:
    model, z = tiny(kind, dtype), latents(batch=2)
    raw = z.to(dtype) * by_channel(STD, dtype) + by_channel(MEAN, dtype)
    with frame_by_frame(model.vae):
        whole = model.vae.decode(raw).sample
    assert whole.shape == (2, 3, PICTURES, *SIZE)
    assert (model.vae.decode(raw).sample - whole).abs().max() <= CLOSE[dtype]
    for cuts in CUTS:
        assert torch.equal(decoded(model, z, cuts)[0], whole), cuts


@DTYPES
@KINDS
@torch.inference_mode()
def test_streaming_encode_is_diffusers_whole_clip(kind: dict[str, Any], dtype: torch.dtype) -> None:
    model, clip = tiny(kind, dtype), pictures(batch=2)
    with frame_by_frame(model.vae):
        mode = model.vae.encode(clip.to(dtype)).latent_dist.mode()
    at_once = model.vae.encode(clip.to(dtype)).latent_dist.mode()
    assert (at_once - mode).abs().max() <= CLOSE[dtype]
    whole = (mode - by_channel(MEAN, dtype)) / by_channel(STD, dtype)
    assert whole.shape == (2, 4, LATENTS, 2, 3)
    for cuts in CUTS:
        assert torch.equal(encoded(model, clip, cuts)[0], whole), cuts


@torch.inference_mode()
def test_what_the_decoder_overshoots_is_cut_off_as_diffusers_does() -> None:
    model = tiny()
    model.vae.decoder.conv_out.weight *= 20
    z = latents()
    with frame_by_frame(model.vae):
        whole = model.vae.decode(z * by_channel(STD, z.dtype) + by_channel(MEAN, z.dtype)).sample
    assert (float(whole.min()), float(whole.max())) == (-1.0, 1.0)
    assert torch.equal(model.decode(z)[0], whole)


@torch.inference_mode()
def test_blocks_of_three_give_nine_then_twelve_pictures() -> None:
    model = tiny()
    carry: Carry = None
    counts = []
    for block in latents(count=9).split(3, dim=2):
        shown, carry = model.decode(block, carry)
        counts.append(shown.shape[2])
    assert counts == [9, 12, 12]


# --- state ------------------------------------------------------------------------------------
@torch.inference_mode()
def test_interleaved_streams_share_one_model_that_holds_no_state() -> None:
    model = tiny()
    before = set(vars(model.vae))
    clips, codes = [pictures(seed) for seed in (1, 2)], [latents(seed) for seed in (3, 4)]
    check_streams_apart(model, clips, codes)
    assert set(vars(model.vae)) == before  # diffusers would put its feature maps there


@pytest.mark.parametrize("cut", [1, 4])  # after one latent frame some entries are only marks
@torch.inference_mode()
def test_a_carry_is_never_written(cut: int) -> None:
    # A fork goes on from the same carry twice.
    model, z = tiny(), latents()
    _, carry = model.decode(z[:, :, :cut])
    kept = [tensor.clone() for tensor in tensors(carry)]
    first, _ = model.decode(z[:, :, cut:], carry)
    second, _ = model.decode(z[:, :, cut:], carry)
    assert torch.equal(first, second)
    assert all(map(torch.equal, tensors(carry), kept))


@DTYPES
@KINDS
@torch.inference_mode()
def test_bytes_of_a_carry_are_known_beforehand(kind: dict[str, Any], dtype: torch.dtype) -> None:
    model, z = tiny(kind, dtype), latents(count=3)
    _, carry = model.decode(z)
    held = [tensor.untyped_storage() for tensor in tensors(carry)]
    assert len({storage.data_ptr() for storage in held}) == len(held) == len(carry or ())
    assert model.carry_nbytes(*z.shape[-2:]) == sum(storage.nbytes() for storage in held)


# --- the model around it ----------------------------------------------------------------------
def test_sizes_are_those_of_the_config() -> None:
    for model in (tiny(), tiny(WAN22)):
        assert (model.latent_channels, model.group, model.space) == (4, 4, 8)
        assert model.latent_size(*SIZE) == (2, 3)
    short = tiny({"dim_mult": [1, 2], "temperal_downsample": [True]})
    assert (short.group, short.space) == (2, 2)
    published = WanAutoencoder(AutoencoderKLWan(base_dim=2, num_res_blocks=1))
    assert (published.latent_channels, published.group, published.space) == (16, 4, 8)


def test_it_moves_and_counts_as_a_module() -> None:
    model = tiny()
    assert len(list(model.parameters())) == len(list(model.vae.parameters()))
    assert {name for name, _ in model.named_buffers()} == {"mean", "std"}
    model.to(torch.bfloat16)
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.bfloat16}


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_stream_begins_with_one_more_than_fours(count: int) -> None:
    message = rf"^{count} pictures do not fill latent frames: give 1 \+ 4·n at the beginning"
    with pytest.raises(ValueError, match=message):
        tiny().encode(pictures()[:, :, :count])


@pytest.mark.parametrize("count", [0, 1, 5])
@torch.inference_mode()
def test_a_stream_goes_on_in_fours(count: int) -> None:
    model = tiny()
    _, carry = model.encode(pictures()[:, :, :1])
    with pytest.raises(ValueError, match=f"^{count} pictures do not fill latent frames: give 4·n$"):
        model.encode(pictures()[:, :, :count], carry)


def test_what_does_not_fit() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"^picture size 20×32 must be a multiple of 8$"):
        model.encode(torch.zeros(1, 3, 1, 20, 32))
    for shape in ([1, 1, 2, 2, 3], [1, 4, 0, 2, 3]):
        with pytest.raises(ValueError, match=r"^latents \[.*\] must be \[B, 4, T ≥ 1, h, w\]$"):
            model.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^latents_std has 2 numbers, not 4$"):
        WanAutoencoder(diffusers_vae(latents_std=[1.0, 2.0]))


# --- files ------------------------------------------------------------------------------------
@torch.inference_mode()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    for loaded in (
        load_vae(tmp_path),
        WanAutoencoder(AutoencoderKLWan.from_pretrained(tmp_path)),
    ):
        assert torch.equal(loaded.decode(latents())[0], model.decode(latents())[0])
        assert torch.equal(loaded.encode(pictures())[0], model.encode(pictures())[0])
    half = load_vae(tmp_path, torch.bfloat16)
    assert half.decode(latents())[0].dtype == torch.bfloat16


def test_a_folder_in_shards(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "whole")
    tiny().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = (load_vae(tmp_path / name) for name in ("whole", "shards"))
    assert torch.equal(shards.decode(latents())[0], whole.decode(latents())[0])
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="the weights are incomplete"):
        load_vae(tmp_path / "shards")


def test_folders_that_are_no_vae(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json: the weights are incomplete$"):
        load_vae(tmp_path)
    tiny().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"is damaged \(.*\); fetch it again$"):
        load_vae(tmp_path)
    weights.write_bytes(data)
    config.write_text(text.replace("AutoencoderKLWan", "AutoencoderKL"))
    with pytest.raises(ValueError, match=r"holds a AutoencoderKL, not a AutoencoderKLWan$"):
        load_vae(tmp_path)
    config.write_text(text.replace('"num_res_blocks": 1', '"num_res_blocks": 2'))
    with pytest.raises(ValueError, match=r"does not fit AutoencoderKLWan: missing: decoder"):
        load_vae(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_vae(tmp_path)
