"""Quantised weights: smaller by what they say, and the blocks hardly change."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from worldsim.quantize import is_quantized, nbytes
from worldsim.world import World

GOLDEN = Path(__file__).parent / "golden"
FILE = GOLDEN / "model_sf.safetensors"
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="pip install 'worldsim[quantize]'"
)


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def played(world: World) -> Tensor:
    """One block from one step: later ones, made of their own mistakes, tell less."""
    embeds = load_file(GOLDEN / "inputs.safetensors")["prompt_embeds"]
    with world.session(
        prompt_embeds=embeds.to(world.dtype), height=64, width=96, window=6
    ) as session:
        return session.step().latents


def assert_quantized(world: World, but: tuple[str, ...] = ()) -> None:
    kept = ("time_embedder", *but)
    for name, module in world.transformer.named_modules():
        if isinstance(module, nn.Linear):
            assert is_quantized(module) != any(part in name for part in kept), name
            assert module.weight.dtype == (
                torch.float32 if "time_embedder" in name else world.dtype
            ), name


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_blocks_are_almost_the_same(dtype: torch.dtype) -> None:
    plain = World.from_single_file(FILE, torch_dtype=dtype)
    world = World.from_single_file(FILE, torch_dtype=dtype, quantization_config=int8())
    assert_quantized(world)
    wanted = played(plain)
    assert (played(world) - wanted).norm() <= 0.02 * wanted.norm()


@needs_torchao
def test_the_report_counts_what_is_held() -> None:
    plain = World.from_single_file(FILE)
    world = World.from_single_file(FILE, quantization_config=int8())
    least, scales = 0, 0
    for name, module in plain.transformer.named_modules():
        for parameter in module.parameters(recurse=False):
            fewer = isinstance(module, nn.Linear) and parameter.ndim == 2
            fewer &= "time_embedder" not in name
            least += parameter.numel() if fewer else parameter.nbytes
            scales += 8 * len(parameter) if fewer else 0  # of each row, and its zero point
    given = world.memory_report("recent=3").weights
    assert least < given <= least + scales
    assert given < 0.5 * plain.memory_report("recent=3").weights
    weight = world.transformer.proj_out.weight
    assert nbytes(weight) < weight.nbytes == plain.transformer.proj_out.weight.nbytes


@needs_torchao
def test_diffusers_config_and_modules_to_leave_out(tmp_path: Path) -> None:
    from diffusers import TorchAoConfig

    left_out = ["proj_out", "blocks.0", "attn1.to_q"]
    config = TorchAoConfig(int8(), modules_to_not_convert=left_out)
    World.from_single_file(FILE).save_pretrained(tmp_path / "plain")
    world = World.from_pretrained(
        tmp_path / "plain", torch_dtype=torch.bfloat16, quantization_config=config
    )
    assert_quantized(world, tuple(left_out))


@needs_torchao
def test_a_quantised_world_moves_and_takes_a_lora(tmp_path: Path) -> None:
    world = World.from_single_file(FILE, quantization_config=int8())
    before = played(world)
    assert torch.equal(played(world.to("cpu")), before)
    for act, line in (
        (lambda: world.to(torch.bfloat16), "keep their dtype"),
        (lambda: world.save_pretrained(tmp_path / "saved"), "are not saved"),
    ):
        with pytest.raises(ValueError, match=line):
            act()
    assert not (tmp_path / "saved").exists()

    pytest.importorskip("peft")
    name = "blocks.0.attn1.to_q"
    lora = {
        f"{name}.lora_A.weight": torch.ones(1, 64),
        f"{name}.lora_B.weight": torch.ones(64, 1),
    }
    world.load_lora(lora)
    given = torch.zeros(1, 64)
    given[0, 0] = 1
    linear = world.transformer.layers[0].attn1.to_q
    assert torch.allclose(linear(given), linear.base_layer(given) + 1)
    assert not torch.equal(played(world), before)
    world.unload_lora()
    assert torch.equal(played(world), before)
    world.enable_group_offload("cpu")
    assert torch.equal(played(world), before)


@needs_torchao
@pytest.mark.parametrize(
    "config",
    [3, "int8", {"quant_type": "int8"}, torch.int8, object()],
    ids=["number", "word", "dict", "dtype", "object"],
)
def test_other_configs_are_refused_before_anything_is_read(config: Any) -> None:
    with pytest.raises(ValueError, match="must be diffusers' TorchAoConfig or a torchao config"):
        World.from_single_file("none.safetensors", quantization_config=config)


@needs_torchao
def test_what_torchao_cannot_do_here_is_one_line() -> None:
    from torchao.quantization import Int4WeightOnlyConfig

    with pytest.raises(ValueError, match="cannot quantise this model by Int4") as error:
        World.from_single_file(FILE, quantization_config=Int4WeightOnlyConfig())
    assert "\n" not in str(error.value)


def test_torchao_is_asked_for_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    for load in (World.from_single_file, World.from_pretrained):
        with pytest.raises(ValueError, match=r"pip install 'worldsim\[quantize\]'"):
            load("none", quantization_config=object())


def test_plain_tensors_count_as_ever() -> None:
    assert nbytes(torch.zeros(3, 5, dtype=torch.bfloat16)) == 30
    assert not is_quantized(nn.Linear(2, 2))
