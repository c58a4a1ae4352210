"""LoRA: what is added is the sum by hand, in all names there are, and comes off without a trace."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeWorld
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worldsim.world import World

pytest.importorskip("peft")

GOLDEN = Path(__file__).parent / "golden"
RENAMED = json.loads((GOLDEN / "key_map_sf_to_diffusers.json").read_text())
WAN = {theirs: ours for ours, theirs in RENAMED.items()}  # diffusers' names → Wan's
RANK, ALPHA = 4, 10.0

Tensors = dict[str, Tensor]


@pytest.fixture
def world() -> World:
    return World.from_single_file(GOLDEN / "model_sf.safetensors")


@pytest.fixture(scope="module")
def lora() -> Tensors:
    """Additions to most linears, in diffusers' names; alpha is not told."""
    world = World.from_single_file(GOLDEN / "model_sf.safetensors")
    draw = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in linears(world).items():
        if name.startswith("blocks.0.ffn"):
            continue
        rank = RANK + 1 if "attn2" in name else RANK
        a = torch.randn(rank, module.in_features, generator=draw)
        b = torch.randn(module.out_features, rank, generator=draw)
        tensors |= {f"{name}.lora_A.weight": 0.1 * a, f"{name}.lora_B.weight": 0.1 * b}
    return tensors


def linears(world: World) -> dict[str, nn.Linear]:
    modules = world.transformer.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def named(tensors: Tensors, ours: Callable[[str], str]) -> Tensors:
    """The same tensors, with the name of each linear changed."""
    return {
        f"{ours(name.partition('.lora_')[0])}.lora_{name.partition('.lora_')[2]}": tensor
        for name, tensor in tensors.items()
    }


def in_wan(name: str) -> str:
    return WAN[f"{name}.weight"].removesuffix(".weight")


def summed(world: World, lora: Tensors, scale: float, alpha: float | None = None) -> None:
    """By hand: ``W + scale · alpha / r · B A``."""
    for name, module in linears(world).items():
        if f"{name}.lora_A.weight" in lora:
            a, b = lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]
            module.weight += scale * (len(a) if alpha is None else alpha) / len(a) * b @ a


def effective(world: World) -> Tensors:
    """What each linear multiplies by, by diffusers' names."""
    weights = {}
    for name, module in world.transformer.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            name = name.removesuffix(".base_layer")
            whole = world.transformer.get_submodule(name)
            assert isinstance(module.bias, Tensor)
            weights[name] = (whole(torch.eye(module.in_features)) - module.bias).T
    return weights


def assert_equal_weights(world: World, other: World) -> None:
    wanted = effective(other)
    made = effective(world)
    assert made.keys() == wanted.keys()
    for name in wanted:
        assert (made[name] - wanted[name]).abs().max() <= 1e-6, name


def played(world: World, blocks: int = 3) -> Tensor:
    embeds = load_file(GOLDEN / "inputs.safetensors")["prompt_embeds"]
    with world.session(prompt_embeds=embeds, window=6, height=64, width=96) as session:
        return torch.cat([session.step().latents for _ in range(blocks)], dim=2)


def with_alpha(tensors: Tensors) -> Tensors:
    targets = dict.fromkeys(name.partition(".lora_")[0] for name in tensors)
    return tensors | {f"{name}.alpha": torch.tensor(ALPHA) for name in targets}


def kohya(tensors: Tensors) -> Tensors:
    old = (("lora_A", "lora_down"), ("lora_B", "lora_up"))
    for new, name in old:
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    return with_alpha(tensors)


@pytest.mark.parametrize(
    ("wrap", "alpha"),
    [
        (lambda t: t, None),
        (lambda t: {f"transformer.{name}": t[name] for name in t}, None),
        (with_alpha, ALPHA),
        (lambda t: named(t, lambda name: f"diffusion_model.{in_wan(name)}"), None),
        (lambda t: kohya(named(t, lambda name: f"diffusion_model.{in_wan(name)}")), ALPHA),
        (lambda t: {f"diffusion_model.{name}": w for name, w in kohya(t).items()}, ALPHA),
        (
            lambda t: {
                "step": 3,
                "critic_lora": {},
                "generator_lora": named(t, lambda name: f"base_model.model.{in_wan(name)}"),
            },
            None,
        ),
        (
            lambda t: {
                f"base_model.model.{name.replace('.weight', '.default.weight')}": t[name]
                for name in t
            },
            None,
        ),
    ],
    ids=["diffusers", "pipeline", "alpha", "wan", "kohya", "mixed", "longlive", "peft"],
)
@torch.inference_mode()
def test_a_lora_is_the_sum_by_hand(
    world: World, lora: Tensors, wrap: Callable[[Tensors], Any], alpha: float | None, tmp_path: Path
) -> None:
    torch.save(wrap(lora), tmp_path / "lora.pt")
    world.load_lora(tmp_path / "lora.pt", scale=0.7)
    other = World.from_single_file(GOLDEN / "model_sf.safetensors")
    summed(other, lora, 0.7, alpha)
    assert_equal_weights(world, other)


@torch.inference_mode()
def test_musubis_names(world: World) -> None:
    """They are all there, or none is read."""
    draw = torch.Generator().manual_seed(4)
    lora, musubi = {}, {}
    for name, module in linears(world).items():
        if name.startswith("blocks."):
            a = 0.1 * torch.randn(RANK, module.in_features, generator=draw)
            b = 0.1 * torch.randn(module.out_features, RANK, generator=draw)
            lora |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            theirs = f"lora_unet_{in_wan(name).replace('.', '_')}"
            musubi |= {f"{theirs}.lora_down.weight": a, f"{theirs}.lora_up.weight": b}
            musubi[f"{theirs}.alpha"] = torch.tensor(ALPHA)
    world.load_lora(musubi)
    other = World.from_single_file(GOLDEN / "model_sf.safetensors")
    summed(other, lora, 1.0, ALPHA)
    assert_equal_weights(world, other)


@torch.inference_mode()
def test_blocks_are_those_of_the_sum_and_the_bits_come_back(world: World, lora: Tensors) -> None:
    before = played(world)
    state = {name: tensor.clone() for name, tensor in world.transformer.state_dict().items()}
    world.load_lora(lora)
    made = played(world)
    other = World.from_single_file(GOLDEN / "model_sf.safetensors")
    summed(other, lora, 1.0)
    wanted = played(other)
    assert (wanted - before).abs().max() > 0.1
    assert (made - wanted).abs().max() <= 2e-5

    world.unload_lora()
    assert world.transformer.state_dict().keys() == state.keys()
    for name, tensor in world.transformer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(played(world), before)
    with pytest.raises(ValueError, match="no LoRA to unload"):
        world.unload_lora()


@torch.inference_mode()
@pytest.mark.filterwarnings("error::UserWarning")
def test_several_keep_their_scales(world: World, lora: Tensors) -> None:
    half = {name: tensor for name, tensor in lora.items() if "attn1" in name}
    world.load_lora(lora, scale=0.5, name="style")
    world.load_lora(half, scale=-2.0, name="motion")
    other = World.from_single_file(GOLDEN / "model_sf.safetensors")
    summed(other, lora, 0.5)
    summed(other, half, -2.0)
    assert_equal_weights(world, other)
    with pytest.raises(ValueError, match="'style' already"):
        world.load_lora(lora, name="style")
    with pytest.raises(ValueError, match="no dot"):
        world.load_lora(lora, name="a.b")
    world.unload_lora()
    assert not any("lora" in name for name in world.transformer.state_dict())


@torch.inference_mode()
def test_files_of_diffusers_and_peft_tell_alpha(
    world: World, lora: Tensors, tmp_path: Path
) -> None:
    """Alpha 12 for all but the queries, which have 6."""
    told = {"r": RANK, "lora_alpha": 12, "alpha_pattern": {"to_q": 6}, "rank_pattern": {}}
    save_file(lora, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in lora.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    queries = {name: tensor for name, tensor in lora.items() if "to_q" in name}
    other = World.from_single_file(GOLDEN / "model_sf.safetensors")
    summed(other, queries, 1.0, 6.0)
    summed(other, {name: lora[name] for name in lora.keys() - queries.keys()}, 1.0, 12.0)
    for file in ("x.safetensors", "adapter_model.safetensors"):
        world.load_lora(tmp_path / file)
        assert_equal_weights(world, other)
        world.unload_lora()


@torch.inference_mode()
def test_biases_of_wan(world: World, lora: Tensors) -> None:
    target = "blocks.1.attn1.to_q"
    wan = named(lora, lambda name: f"diffusion_model.{in_wan(name)}")
    bias = torch.randn(64, generator=torch.Generator().manual_seed(1))
    wan[f"diffusion_model.{in_wan(target)}.diff_b"] = bias
    wan["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(64)  # for completeness only
    world.load_lora(wan, scale=0.5)
    nothing = torch.zeros(1, 64)
    linear = world.transformer.get_submodule(target)
    assert torch.allclose(linear(nothing), linear.base_layer.bias + 0.5 * bias, atol=1e-6)


def test_low_precision_keeps_float32_where_it_must(lora: Tensors) -> None:
    world = World.from_single_file(GOLDEN / "model_sf.safetensors", torch_dtype=torch.bfloat16)
    world.load_lora(lora)
    for name, parameter in world.transformer.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == (
                torch.float32 if "time_embedder" in name else torch.bfloat16
            ), name
        assert not parameter.requires_grad
    assert not any(module.training for module in world.transformer.modules())
    assert torch.isfinite(played(world, 1)).all()


def test_open_sessions_and_encoded_prompts_are_forgotten(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    world = make_world()
    session = world.session()
    session.step()
    assert world._texts
    target = "blocks.0.attn2.to_k"
    width = linears(world)[target].in_features
    lora = {
        f"{target}.lora_A.weight": torch.ones(1, width),
        f"{target}.lora_B.weight": torch.ones(width, 1),
    }
    keys, _ = world.text("brick")
    world.load_lora(lora)
    assert not world._texts
    with pytest.raises(ValueError, match="open a new one"):
        session.step()
    assert not torch.equal(world.text("brick")[0][0], keys[0])
    with pytest.raises(ValueError, match="unload_lora"):
        world.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    world.session().step()
    world.unload_lora()
    assert torch.equal(world.text("brick")[0][0], keys[0])
    world.save_pretrained(tmp_path / "saved")


@torch.inference_mode()
def test_what_is_compiled_sees_it(world: World, lora: Tensors) -> None:
    """In one graph still, and it does not go on with the old one."""
    embedder = world.transformer.condition_embedder
    compiled = torch.compile(embedder, fullgraph=True, backend="eager")
    given = torch.full((1, 3), 500.0), None
    before = compiled(*given)[1]
    world.load_lora(lora)
    made = compiled(*given)[1]
    assert (made - before).abs().max() > 0.1
    assert torch.equal(made, embedder(*given)[1])


A, B = "blocks.0.attn1.to_q.lora_A.weight", "blocks.0.attn1.to_q.lora_B.weight"
PAIR = {A: torch.zeros(2, 64), B: torch.zeros(64, 2)}


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({}, "no dictionary of tensors"),
        ({A: 3}, "which is no tensor"),
        ({A: torch.zeros(2, 64)}, r"incomplete: blocks\.0\.attn1\.to_q"),
        ({B: torch.zeros(64, 2)}, "incomplete"),
        (PAIR | {B: torch.zeros(64, 3)}, r"to_q is 64×64.*\[64, 3\]"),
        (PAIR | {A: torch.zeros(2, 65)}, r"\[2, 65\]"),
        (PAIR | {A: torch.full((2, 64), torch.nan)}, "not finite"),
        (PAIR | {f"transformer.{A}": torch.zeros(2, 64)}, "twice"),
        (PAIR | {"blocks.0.attn1.to_q.lora_magnitude_vector": torch.zeros(64)}, "no place for"),
        (PAIR | {"blocks.9.attn1.to_q.lora_A.weight": torch.zeros(2, 64)}, r"blocks\.9"),
        (PAIR | {"patch_embedding.lora_A.weight": torch.zeros(2, 64)}, "patch_embedding"),
        (PAIR | {"blocks.0.attn1.to_w.lora_A.weight": torch.zeros(2, 64)}, "to_w"),
        (PAIR | {"blocks.0.norm2.diff": torch.ones(64)}, "only linears"),
        (PAIR | {"blocks.0.attn1.to_q.diff": torch.ones(64, 64)}, "only linears"),
        ({"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(2, 64)}, "lora_unet"),
        (
            {
                "diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(2, 64),
                "diffusion_model.blocks.9.self_attn.q.lora_B.weight": torch.zeros(64, 2),
            },
            r"no place for blocks\.9",
        ),
        ({"diffusion_model.time_projection.1.diff_b": torch.ones(384)}, "time_projection"),
        (
            {
                "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 64),
                "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(64, 2),
                "diffusion_model.time_projection.1.diff_b": torch.ones(384),
            },
            "3 tensors, of which diffusers reads 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(world: World, tensors: dict[str, Any], line: str) -> None:
    names = world.transformer.state_dict().keys()
    session = world.session(prompt_embeds=torch.zeros(1, 4, 32), height=64, width=96, window=6)
    with pytest.raises(ValueError, match=line) as error:
        world.load_lora(tensors)
    assert "\n" not in str(error.value)
    assert world.transformer.state_dict().keys() == names
    session.settle()


def test_files_that_are_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    (tmp_path / "lora.bin").write_bytes(b"")
    for name, line in (
        ("none.pt", "no LoRA file"),
        ("cut.safetensors", "is damaged"),
        ("lora.bin", "must end in"),
    ):
        with pytest.raises(ValueError, match=line):
            world.load_lora(tmp_path / name)


def test_peft_is_asked_for_in_one_line(
    world: World, lora: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'worldsim\[lora\]'"):
        world.load_lora(lora)


def test_fused_weights_are_multiplied_by(world: World, lora: Tensors) -> None:
    """diffusers' fusing writes behind torch's back; packed copies follow all the same."""

    def played() -> Tensor:
        with world.session(prompt_embeds=torch.ones(1, 16, 32), height=64, width=96) as session:
            return session.step().latents

    without = played()
    world.load_lora(lora, scale=0.5)
    beside = played()
    world.transformer.fuse_lora()
    fused = played()
    world.transformer.unfuse_lora()
    assert (fused - beside).abs().max() < 1e-3 < 0.1 < (fused - without).abs().max()
    assert (played() - beside).abs().max() < 1e-3
