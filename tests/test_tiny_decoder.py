"""The tiny decoder as a stream, against a slow and obvious whole-clip one on the same weights."""

from pathlib import Path

import pytest
import torch
from carries import decoded
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from worldsim.models.autoencoder import Carry
from worldsim.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from worldsim.models.weights import cast

LATENTS, CHANNELS, SIZE = 7, 4, (16, 24)
PICTURES = 1 + 4 * (LATENTS - 1)
WIDTHS = (10, 8, 6, 5)
CUTS = ([7], [1] * 7, [3, 3, 1], [1, 2, 4])  # latent frames of each call; they add up to 7
Weights = dict[str, Tensor]


def tiny(dtype: torch.dtype = torch.float32) -> TinyDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = TinyDecoder(CHANNELS, WIDTHS)
        # Twice the usual size: the pictures then fill 0…1 and sometimes leave it.
        for parameter in model.parameters():
            parameter.data *= 2
    return cast(model.eval().requires_grad_(False), dtype)


def latents(seed: int = 0, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, LATENTS, SIZE[0] // 8, SIZE[1] // 8, generator=generator)


def published(model: TinyDecoder) -> Weights:
    """A file's content: the decoder's tensors in half precision, and some of an encoder."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    return weights | {"encoder.0.weight": torch.full((64, 3, 3, 3), float("nan")).half()}


# --- the slow and obvious way -----------------------------------------------------------------
def whole_clip(weights: Weights, z: Tensor) -> Tensor:
    """All frames ``[B, C, T, h, w]`` at once, one clip after the other → ``[B, 3, P, H, W]``."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    shown = []
    for clip in z.transpose(1, 2):
        x = F.relu(conv(3 * torch.tanh(clip / 3), "1"))
        for start, growth in ((3, 1), (9, 2), (15, 2)):
            for block in range(start, start + 3):
                past = torch.cat((torch.zeros_like(x[:1]), x))[: len(x)]
                y = F.relu(conv(torch.cat((x, past), dim=1), f"{block}.conv.0"))
                y = F.relu(conv(y, f"{block}.conv.2"))
                x = F.relu(conv(y, f"{block}.conv.4") + x)
            x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
            grown = conv(x, f"{start + 4}.conv").chunk(growth, dim=1)
            x = torch.stack(grown, dim=1).flatten(0, 1)
            x = conv(x, str(start + 5))
        shown.append(conv(F.relu(x), "22")[3:].clamp(0, 1))
    return torch.stack(shown).transpose(1, 2) * 2 - 1


# --- streams ----------------------------------------------------------------------------------
@torch.inference_mode()
def test_it_is_the_slow_and_obvious_way() -> None:
    model, z = tiny(torch.float64), latents(batch=2).double()
    shown, _ = model.decode(z)
    assert shown.shape == (2, 3, PICTURES, *SIZE)
    slow = whole_clip(model.state_dict(), z)
    assert (shown - slow).abs().max() <= 1e-12
    # Nothing trivial: pictures differ, and both ends of the range are met.
    assert (float(shown.min()), float(shown.max())) == (-1.0, 1.0)
    assert shown.diff(dim=2).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_however_a_clip_is_cut_the_bits_are_the_same(dtype: torch.dtype) -> None:
    model, z = tiny(dtype), latents(batch=2)  # latents stay float32
    whole, last = model.decode(z)
    assert whole.dtype == dtype
    for cuts in CUTS:
        # The first picture alone, then four for each latent frame.
        parts, carry = decoded(model, z, cuts)
        assert torch.equal(parts, whole), cuts
        assert carry is not None and last is not None
        assert all(map(torch.equal, carry, last))


@torch.inference_mode()
def test_interleaved_streams_and_forks_do_not_disturb_each_other() -> None:
    model, codes = tiny(), [latents(seed) for seed in (1, 2)]
    carries: list[Carry] = [None, None]
    shown: list[list[Tensor]] = [[], []]
    for frame in range(LATENTS):
        for stream in range(2):
            part = codes[stream][:, :, frame : frame + 1]
            forked, _ = model.decode(part, carries[stream])
            x, carries[stream] = model.decode(part, carries[stream])
            assert torch.equal(forked, x)
            shown[stream].append(x)
    for stream in range(2):
        assert torch.equal(torch.cat(shown[stream], dim=2), model.decode(codes[stream])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_bytes_of_a_carry_are_known_beforehand(dtype: torch.dtype) -> None:
    model, z = tiny(dtype), latents()
    _, carry = model.decode(z[:, :, :3])
    assert carry is not None
    held = sum(tensor.untyped_storage().nbytes() for tensor in carry)
    assert model.carry_nbytes(*z.shape[-2:]) == held


# --- what does not fit ------------------------------------------------------------------------
def test_sizes() -> None:
    model = tiny()
    assert (model.latent_channels, model.group, model.space) == (CHANNELS, 4, 8)
    assert model.latent_size(*SIZE) == (2, 3)
    with pytest.raises(ValueError, match=r"^picture size 20×32 must be a multiple of 8$"):
        model.latent_size(20, 32)
    for shape in ([1, 1, 2, 2, 3], [1, 4, 0, 2, 3]):
        with pytest.raises(ValueError, match=r"^latents \[.*\] must be \[B, 4, T ≥ 1, h, w\]$"):
            model.decode(torch.zeros(shape))


# --- files ------------------------------------------------------------------------------------
@torch.inference_mode()
def test_both_kinds_of_file(tmp_path: Path) -> None:
    model = tiny(torch.float16)
    torch.save(published(model), tmp_path / "t.pth")
    save_file(published(model), tmp_path / "t.safetensors")
    expected = cast(model, torch.float32).decode(latents())[0]
    for name in ("t.pth", "t.safetensors"):
        assert torch.equal(load_tiny_decoder(tmp_path / name).decode(latents())[0], expected)
        half = load_tiny_decoder(tmp_path / name, torch.bfloat16)
        assert half.decode(latents())[0].dtype == torch.bfloat16


def test_names_and_shapes_are_the_published_ones() -> None:
    """Layout of ``taew2_1``: the places in one flat list."""
    shapes = {
        name: list(tensor.shape) for name, tensor in TinyDecoder().to("meta").state_dict().items()
    }
    conv = {"1": [256, 16, 3, 3], "22": [3, 64, 3, 3]}
    plain = {"8": [128, 256, 3, 3], "14": [64, 128, 3, 3], "20": [64, 64, 3, 3]}
    plain |= {"7.conv": [256, 256, 1, 1], "13.conv": [256, 128, 1, 1], "19.conv": [128, 64, 1, 1]}
    for start, width in ((3, 256), (9, 128), (15, 64)):
        for block in range(start, start + 3):
            for layer, seen in ((0, 2 * width), (2, width), (4, width)):
                conv[f"{block}.conv.{layer}"] = [width, seen, 3, 3]
    expected = {f"decoder.{name}.weight": shape for name, shape in (conv | plain).items()}
    expected |= {f"decoder.{name}.bias": shape[:1] for name, shape in conv.items()}
    assert shapes == expected


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    weights = published(tiny())
    del weights["decoder.9.conv.0.weight"]
    weights["decoder.13.conv.weight"] = torch.zeros(8, 8, 1, 1)
    weights["decoder.23.weight"] = torch.zeros(1)
    weights["decoder.22.bias"] = torch.full((3,), float("nan"))
    save_file(weights, path)
    message = (
        r"does not fit TinyDecoder: missing: decoder\.9\.conv\.0\.weight; "
        r"unexpected: decoder\.23\.weight; wrong shape: decoder\.13\.conv\.weight .*; "
        r"not finite: decoder\.22\.bias$"
    )
    with pytest.raises(ValueError, match=message):
        load_tiny_decoder(path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"missing: decoder\.1\.bias, .* unexpected: other$"):
        load_tiny_decoder(path)


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.ckpt must be a \.pth or a \.safetensors file$"):
        load_tiny_decoder(tmp_path / "t.ckpt")
    with pytest.raises(ValueError, match=r"^there is no file .*t\.pth$"):
        load_tiny_decoder(tmp_path / "t.pth")
    tensors = published(tiny())
    for name in ("t.pth", "t.safetensors"):
        path = tmp_path / name
        (torch.save if name == "t.pth" else save_file)(tensors, path)
        whole = path.read_bytes()
        for damaged in (b"", b"not weights", whole[:7], whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged") as caught:
                load_tiny_decoder(path)
            assert "\n" not in str(caught.value)


def test_a_pth_with_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "t.pth"
    torch.save({"decoder.1.weight": Path("/")}, path)
    with pytest.raises(ValueError, match="holds more than tensors, and loading it could run"):
        load_tiny_decoder(path)
    for content in ({"state_dict": {}}, [torch.zeros(1)], {1: torch.zeros(1)}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"does not hold tensors by name$"):
            load_tiny_decoder(path)
