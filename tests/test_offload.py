"""Offloading, without a GPU: what is called is there, what is not called is away."""

from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any

import pytest
import torch
from conftest import MakeWorld
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from worldsim.offload import Turns
from worldsim.world import World

FAR = torch.device("meta")


def played(world: World, schedule: str | None = None) -> Tensor:
    """Latents and pictures; the change of prompt commits blocks anew."""
    cache = "sink=1,recent=5,prompt=recache"
    with world.session("brick", cache=cache, schedule=schedule) as session:
        blocks = [session.step() for _ in range(3)]
        session.control({"KeyW"}, "night, fog")
        blocks.append(session.step())
    pictures = [torch.from_numpy(block.frames).flatten() for block in blocks]
    return torch.cat([*(block.latents.flatten() for block in blocks), *pictures])


# --- layer by layer -------------------------------------------------------------------------------
class Transfers:
    """In place of diffusers' transfers: a group that is away is full of NaN."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.away: dict[nn.Parameter, Tensor] = {}
        self.came: list[ModuleGroup] = []
        patch.setattr(ModuleGroup, "onload_", lambda group: self.come(group))
        patch.setattr(ModuleGroup, "offload_", lambda group: self.leave(group))

    def come(self, group: ModuleGroup) -> None:
        self.came.append(group)
        for parameter in held(group):
            parameter.data = self.away.pop(parameter)

    def leave(self, group: ModuleGroup) -> None:
        for parameter in held(group):
            self.away[parameter] = parameter.data
            parameter.data = torch.full_like(parameter.data, torch.nan)


def held(group: ModuleGroup) -> set[nn.Parameter]:
    return {p for module in group.modules for p in module.parameters()} | {*group.parameters}


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_layers_are_there_when_they_are_called_and_only_then(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """Denoising, committing and encoding a prompt: bit for bit what they are without."""
    wanted = played(make_world())
    world = make_world()
    transfers = Transfers(monkeypatch)
    world.enable_group_offload("cpu", num_blocks_per_group=layers)
    everything = set(world.transformer.parameters())
    assert transfers.away.keys() == everything
    assert torch.equal(played(world), wanted)
    assert transfers.away.keys() == everything
    came = len(transfers.came)
    assert came > 20
    # Where a context pass shares that of a step, layers come once for both.
    assert torch.equal(played(world, "fused"), wanted)
    assert transfers.away.keys() == everything
    assert came / 2 < len(transfers.came) - came < came


def test_libraries_own_transfers(make_world: MakeWorld) -> None:
    wanted = played(make_world())
    world = make_world()
    world.enable_group_offload("cpu")
    assert torch.equal(played(world), wanted)
    for module in (world.transformer, *world.transformer.layers):
        assert HookRegistry.check_if_exists_or_initialize(module).get_hook("group_offloading")


def test_a_lora_on_offloaded_layers(make_world: MakeWorld) -> None:
    pytest.importorskip("peft")
    target = "blocks.1.attn2.to_k"
    width = make_world().transformer.layers[1].attn2.to_k.in_features
    draw = torch.Generator().manual_seed(0)
    lora = {
        f"{target}.lora_A.weight": torch.randn(2, width, generator=draw),
        f"{target}.lora_B.weight": torch.randn(width, 2, generator=draw),
    }
    world = make_world()
    before = played(world)
    world.load_lora(lora)
    wanted = played(world)
    assert not torch.equal(wanted, before)

    world = make_world()
    world.enable_group_offload("cpu")
    world.load_lora(lora)
    assert torch.equal(played(world), wanted)
    world.unload_lora()
    assert torch.equal(played(world), before)


# --- model by model -------------------------------------------------------------------------------
class Model(nn.Module):
    """Knows where it is; it calls itself, as text encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.place = ""

    def _apply(self, fn: Any, recurse: bool = True) -> "Model":  # what `nn.Module.to` calls
        self.place = fn(torch.empty(1)).device.type
        return self

    def forward(self) -> str:
        return self.place

    def encode(self) -> str:
        return self()

    def decode(self) -> str:
        before = self.place
        sleep(0.002)
        return before if self.place == before else "moved"


def test_one_model_at_a_time() -> None:
    models = first, second = Model(), Model()
    turns = Turns(FAR)
    for model in models:
        turns.take(model)
    assert [model.place for model in models] == ["cpu", "cpu"]
    assert first() == "meta"
    assert first.encode() == "meta"
    assert [model.place for model in models] == ["meta", "cpu"]
    assert second.encode() == "meta"
    assert [model.place for model in models] == ["cpu", "meta"]
    guest = Model()
    turns.take(guest, stays=False)
    assert guest.encode() == "meta"
    assert [model.place for model in (*models, guest)] == ["cpu"] * 3


def test_threads_wait_for_their_turn() -> None:
    turns, models = Turns(FAR), (Model(), Model())
    for model in models:
        turns.take(model)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(model.decode) for _ in range(10) for model in models]
    assert {call.result() for call in calls} == {"meta"}


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules that came to a device with a number (+) or left it (-)."""
    moves: list[str] = []
    to = nn.Module.to

    def recorded(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if args and isinstance(args[0], torch.device):
            moves.append(f"{'-' if args[0].index is None else '+'}{type(module).__name__}")
        return to(module, *args, **options)

    monkeypatch.setattr(nn.Module, "to", recorded)
    return moves


DIT, TEXT, VAE = "CausalWanTransformer3DModel", "WordEncoder", "CausalAutoencoder"


def test_models_of_a_world_take_turns(make_world: MakeWorld, moved: list[str]) -> None:
    wanted = played(make_world())
    world = make_world()
    moved.clear()
    world.enable_model_cpu_offload("cpu:0")
    assert sorted(moved) == [f"-{VAE}", f"-{DIT}", f"-{TEXT}"]
    moved.clear()
    assert torch.equal(played(world), wanted)
    read = [f"+{TEXT}", f"-{TEXT}", f"+{DIT}"]
    seen = [f"-{DIT}", f"+{VAE}"]
    again = [f"-{VAE}", f"+{DIT}"]
    # Two blocks and the next one; then a prompt is read while the autoencoder is there.
    assert moved == [*read, *seen, *again, *seen, *again, *seen, f"-{VAE}", *read, *seen]


def test_beside_layers_only_the_text_encoder_comes_and_goes(
    make_world: MakeWorld, moved: list[str]
) -> None:
    wanted = played(make_world())
    world = make_world()
    moved.clear()
    world.enable_group_offload("cpu:0")
    mine = [move for move in moved if move[1:] in (DIT, TEXT, VAE)]
    assert mine == [f"-{TEXT}", f"+{VAE}"]
    moved.clear()
    assert torch.equal(played(world), wanted)
    mine = [move for move in moved if move[1:] in (DIT, TEXT, VAE)]
    assert mine == [f"+{TEXT}", f"-{TEXT}"] * 2


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there(make_world: MakeWorld) -> None:
    world = make_world()
    session = world.session()
    for enable in (world.enable_model_cpu_offload, world.enable_group_offload):
        with pytest.raises(ValueError, match="no device 'cuda' here: use 'cpu'"):
            enable()
    session.step()  # nothing has changed


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_group_offload"])
def test_what_does_not_go_together(make_world: MakeWorld, way: str) -> None:
    world = make_world()
    session = world.session()
    getattr(world, way)("cpu")
    with pytest.raises(ValueError, match="open a new one"):
        session.step()
    for act, line in (
        (lambda: getattr(world, way)("cpu"), "offloaded already"),
        (lambda: world.to("cpu"), "stays where it is"),
        (lambda: world.to(torch.bfloat16), "stays where it is"),
        (world.compile, "not compiled"),
    ):
        with pytest.raises(ValueError, match=line):
            act()
    compiled = make_world()
    compiled.compile()
    with pytest.raises(ValueError, match="compiled world"):
        getattr(compiled, way)("cpu")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"use_stream": True}, "use_stream=False"),
        ({"record_stream": True}, "record_stream"),
        ({"num_blocks_per_group": 0}, "1 or more"),
    ],
)
def test_options_that_cannot_be(make_world: MakeWorld, options: dict[str, Any], line: str) -> None:
    world = make_world()
    with pytest.raises(ValueError, match=line) as error:
        world.enable_group_offload("cpu", **options)
    assert "\n" not in str(error.value)
    world.session().step()
    world.enable_group_offload("cpu")
