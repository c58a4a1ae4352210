"""Ready for a GPU, as far as a CPU can tell: one graph a pass, and no pass waits for the device."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeWorld, command
from test_transformer import Counting
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldsim.apps import bench
from worldsim.apps.out_of_memory import advice
from worldsim.cache.pool import PagePool
from worldsim.session import Session
from worldsim.world import World

WINDOW = "sink=1,recent=5,prompt=recache"  # full after three blocks of two latent frames
PACKED = "positions=packed"


def played(session: Session, blocks: int) -> list[Tensor]:
    made = []
    for block in range(blocks):
        session.control({"KeyW"} if block % 3 else set())
        made.append(session.denoise().latents)
    return made


# --- one graph for each pass ----------------------------------------------------------------------
class Cheap(Counting):
    """The same without functionalisation."""

    def __call__(self, graph: nn.Module, inputs: list[Tensor]) -> object:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_events_and_sessions_share_the_same_two_graphs(make_world: MakeWorld) -> None:
    eager, compiled = (make_world(block_frames=2, steps=2, cache=WINDOW) for _ in range(2))
    graphs = Counting()
    compiled.compile(backend=graphs)

    def life(world: World) -> Iterator[Tensor]:
        with world.session("red brick", seed=5) as session:
            yield from played(session, 30)
            session.control(prompt="night")  # commits all recent frames anew
            yield from played(session, 30)
            session.flush()
            yield from played(session, 10)
            session.cut()
            yield from played(session, 20)
            session.reset()
            with session.fork() as twin:
                yield from played(twin, 5)
            assert session.block == 90
        with world.session("hedge", seed=6) as second:
            yield from played(second, 5)

    for slow, fast in zip(life(eager), life(compiled), strict=True):
        assert (slow - fast).abs().max() <= 1e-5 * slow.std()
    assert graphs.graphs == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_else_is_a_graph_of_its_own(make_world: MakeWorld) -> None:
    world, graphs = make_world(block_frames=2, steps=1, cache=WINDOW), Cheap()
    world.compile(backend=graphs)

    def after(blocks: int, *args: Any, **options: Any) -> int:
        with world.session(*args, **options) as session:
            played(session, blocks)
            session.control(prompt="night")
            played(session, 2)
            session.flush()
            played(session, 2)
        return graphs.graphs

    assert after(3) == 2
    # Nothing that comes from outside.
    latents = torch.randn(1, 8, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    assert after(2, given=latents) == 2
    assert after(2, noise=lambda *_: latents[:, :, :2]) == 2
    # No form of a cache: pages in numbers of few bits are read by the passes as they are …
    for line in ("recent=all", "recent=0", f"sink=1,mid=2:pool,recent=2,{PACKED}"):
        assert after(5, cache=line) == 2
    for line in ("sink=1:int8,recent=3:int8h", "sink=1,mid=2:topk:int4,bank=4,recent=2:int4"):
        assert after(9, cache=line) == 2
    # … but for a commit that leaves queries behind, too.
    for line in (f"mid=2:participative,recent=2,{PACKED}", "sink=1,mid=2:topk,bank=4,recent=2"):
        assert after(5, cache=line) == 3
    # And a second row: one more each.
    for seed in (5, 6):
        assert after(9, "day", seed, guidance=3.0, negative_prompt="fog") == 5
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_world_runs_context_passes_apart(make_world: MakeWorld) -> None:
    eager, compiled = (make_world(block_frames=2, steps=2, cache=WINDOW) for _ in range(2))
    graphs = Counting()
    compiled.compile(backend=graphs)
    made = []
    for world in (eager, compiled):
        with world.session("red brick", seed=5, schedule="fused") as session:
            made.append(played(session, 9))
            assert session.fuses == (world is eager)
    for slow, fast in zip(*made, strict=True):
        assert (slow - fast).abs().max() <= 1e-5 * slow.std()
    assert graphs.graphs == 2
    assert not torch._dynamo.utils.counters["graph_break"]


# --- no pass waits for the device -----------------------------------------------------------------
class Elsewhere(TorchDispatchMode):
    """Notes every operation that touches another device than the one it is told."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if kinds - {self.device}:
            self.seen.append(str(func))
        return out


def on_meta(world: World) -> World:
    """The same on a device without memory: to read one number of it is an error, and so is to mix
    its tensors with the host's. All that a GPU would wait for fails."""
    for model in (world.transformer, world.text_encoder):
        torch.nn.Module.to(model, "meta")
    world.device = torch.device("meta")
    return world


@contextmanager
def within_passes(world: World, inside: Callable[[], Any]) -> Iterator[list[str]]:
    """Every pass of a world runs inside such a context; yields the names of those that ran."""
    passes = {"forward": world.forward, "commit": world.commit, "fused": world.fused}
    ran: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            ran.append(name)
            with inside():
                return passes[name](*args)

        return call

    world.forward, world.commit, world.fused = map(watched, passes)
    yield ran
    world.forward, world.commit, world.fused = passes.values()


FORMS = (
    "sink=1:int8,recent=3:int8h",
    f"sink=1,mid=2:pool,recent=2,{PACKED}",
    f"mid=2:participative,recent=2:int8,{PACKED}",
    f"mid=2:pose,bank=4,recent=2,{PACKED}",
)


def test_no_pass_leaves_the_device(make_world: MakeWorld) -> None:
    world = on_meta(make_world(block_frames=2, steps=1, cache=WINDOW))
    for guidance in (1.0, 3.0):
        elsewhere = Elsewhere("meta")
        with (
            within_passes(world, lambda mode=elsewhere: mode) as ran,
            world.session("red brick", guidance=guidance) as session,
        ):
            blocks = 30 if guidance == 1.0 else 5
            played(session, blocks)
            session.control(prompt="night")
            played(session, 1)
        assert ran.count("forward") == blocks + 1
        assert ran.count("commit") == blocks + 3, "six frames in the window are committed anew"
        assert elsewhere.seen == []


@pytest.mark.parametrize("line", FORMS)
def test_no_form_of_a_cache_leaves_the_device_in_a_pass(make_world: MakeWorld, line: str) -> None:
    world = on_meta(make_world(block_frames=2, steps=1, cache=line))
    elsewhere, outside = Elsewhere("meta"), Elsewhere("meta")
    with within_passes(world, lambda: elsewhere) as ran, world.session() as session, outside:
        played(session, 5)
    assert len(ran) == 9 and elsewhere.seen == []
    assert outside.seen, "between the passes noise, controls and rotations come from the host"


def test_no_fused_pass_leaves_the_device(make_world: MakeWorld) -> None:
    for line in ("sink=1,recent=5", f"sink=1,recent=4,{PACKED}", *FORMS[1::2]):
        world = on_meta(make_world(block_frames=2, steps=1, cache=line))
        elsewhere = Elsewhere("meta")
        with (
            within_passes(world, lambda mode=elsewhere: mode) as ran,
            world.session("red brick", schedule="fused") as session,
        ):
            played(session, 12)
        assert ran == ["forward", *["fused"] * 11] and elsewhere.seen == []


def test_waiting_for_the_device_would_be_seen(make_world: MakeWorld) -> None:
    world = on_meta(make_world(cache="recent=2"))
    forward = world.transformer.forward
    for read in (Tensor.cpu, Tensor.tolist, lambda x: x.sum().item(), lambda x: bool(x.any())):

        def waiting(x: Tensor, *rest: Any, read: Callable[[Tensor], Any] = read) -> Tensor:
            read(x)
            return forward(x, *rest)

        world.forward = waiting
        with world.session() as session, pytest.raises((NotImplementedError, RuntimeError)):
            session.denoise()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("line", (WINDOW, *FORMS))
def test_passes_never_wait_for_a_gpu(make_world: MakeWorld, line: str) -> None:
    world = make_world(block_frames=2, steps=2, cache=line).to("cuda")

    @contextmanager
    def forbidden() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with within_passes(world, forbidden) as ran, world.session("red brick") as session:
        played(session, 2)
        session.control(prompt="night")
        played(session, 28)
    assert len(ran) >= 30


# --- the command line -----------------------------------------------------------------------------
@pytest.fixture
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = World.compile
    monkeypatch.setattr(World, "compile", lambda world: compile_(world, backend="eager"))


@pytest.mark.usefixtures("_cheap")
def test_stream_compiles_before_the_first_block(tmp_path, world_folder, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--world", world_folder, "--seconds", "0.5", "--threads", "1", "--dtype")
    written = []
    for options in ((), ("--compile",)):
        code, out, err = command("stream", "-", *arguments, "float32", *options)
        assert code == 0, err
        pixels = out.encode(errors="surrogateescape")
        written.append(np.frombuffer(pixels, np.uint8).astype(int))
    line = next(line for line in err.splitlines() if line.startswith("compiling"))
    assert re.fullmatch(r"compiling: denoise, commit … [\d.]+ s", line)
    assert err.index("compiling") < err.index("pictures")
    eager, compiled = written
    assert eager.std() > 0 and eager.shape == compiled.shape
    # On a CPU the two round in different places: a few numbers are the next shade.
    assert np.abs(eager - compiled).max() <= 1 and (eager != compiled).mean() < 0.01
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("_cheap")
def test_bench_measures_compiled_passes(tmp_path, monkeypatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(bench, "_until_first_byte", lambda command: started.append(command) or 1.0)
    path = tmp_path / "figures.json"
    tiny = ("bench", "--model", "tiny", "--blocks", "10", "--threads", "1", "--json", path)
    code, _, err = command(*tiny, "--compile")
    assert code == 0 and "compiling: denoise, commit …" in err
    figures = json.loads(path.read_text())
    assert figures["compiled"] and "--compile" in started[0]
    # The roofline sees the kernels themselves, which a graph would hide.
    assert figures["roofline"]["denoise"]["gflop"] > figures["roofline"]["commit"]["gflop"] > 0


def test_what_cannot_be_compiled_is_one_line(tmp_path, world_folder, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = ("stream", "walk.mp4", "--world", world_folder, "--seconds", "0.5", "--compile")

    def refused(*options: str) -> str:
        code, out, err = command(*stream, *options)
        assert code == 2 and out == "" and list(tmp_path.iterdir()) == []
        return err.splitlines()[-1]

    assert "--compile is for pages in full" in refused("--cache", "sink=1,recent=3:int8")

    def no_compiler(*_: object) -> object:
        raise OSError("no C++ compiler\nand many lines more")

    compile_ = World.compile
    monkeypatch.setattr(World, "compile", lambda world: compile_(world, backend=no_compiler))
    said = refused()
    assert said.startswith("worldsim: cannot compile here") and "leave out --compile" in said


# --- memory ends ----------------------------------------------------------------------------------
SAID = {
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 8": "no room for 20 GiB",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 68719476736 bytes. Error code 12": "no room for 64.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)": "out of memory: ",
}


@pytest.mark.parametrize("said", SAID)
def test_out_of_memory_says_what_to_change(said: str, tmp_path, world_folder, monkeypatch) -> None:
    def full(*_: object) -> object:
        raise (torch.OutOfMemoryError if "CUDA out" in said else RuntimeError)(said)

    monkeypatch.setattr(PagePool, "write", full)  # in the midst of a stream, on a thread of its own
    monkeypatch.chdir(tmp_path)
    code, _, err = command("stream", "-", "--world", world_folder, "--seconds", "2")
    told = err.splitlines()[-1]
    assert code == 2 and told.startswith("worldsim: out of memory") and SAID[said] in told
    for change in ("--cache recent=6", "int8", "--dtype bfloat16", "worldsim doctor"):
        assert change in told


def test_a_real_refusal_of_the_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "no room for" in (advice(caught.value) or "")
    assert "out of memory: take" in (advice(MemoryError()) or "")
    assert advice(RuntimeError("shape mismatch")) is None
