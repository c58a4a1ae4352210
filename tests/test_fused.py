"""The fused pass: a context pass and the next block's first step in one, and nothing else changes.

On a CPU its bits are those of the two passes, so whatever holds of `serial` holds of it; that is
what is asserted here. `tests/test_lanes.py` asserts what each of its cells reads.
"""

import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeWorld, random_world
from test_events import LINES
from test_state import HISTORY, roam, same
from torch import Tensor

from worldsim.apps.part_times import time_parts
from worldsim.apps.setting import Setting
from worldsim.models.transformer import FIXED_ROWS, Layer
from worldsim.models.view import ContextView, Run
from worldsim.rollout import Known
from worldsim.session import Session
from worldsim.state import Block
from worldsim.wavefront import spread
from worldsim.world import World

FUSING = (
    "sink=1,recent=3",
    "sink=2,recent=4,positions=packed",
    "sink=1,recent=2",  # less than a block of three: some of its frames are gone at once
    "recent=0",
    "sink=3,recent=0",
    "recent=all",
    "sink=1,mid=2:pool,recent=3,positions=packed",
    "sink=1,mid=2:pose,bank=8,recent=3,positions=packed",
)
APART = tuple(line for line in LINES if "int" in line or "topk" in line or "participative" in line)


@contextmanager
def counted(world: World) -> Iterator[Counter[str]]:
    """How often each pass of a world runs."""
    ran: Counter[str] = Counter()

    def counting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            ran[name] += 1
            return run(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "commit", "fused"):
            patch.setattr(world, name, counting(name, getattr(world, name)))
        yield ran


def opened(world: World, schedule: str = "fused", **options: Any) -> Session:
    return world.session("red brick", seed=3, schedule=schedule, **options)


def both(world: World, **options: Any) -> Iterator[Session]:
    """A serial session, and a fused one like it."""
    for schedule in ("serial", "fused"):
        with opened(world, schedule, **options) as session:
            yield session


def walk(session: Session, blocks: int) -> list[Tensor]:
    """Blocks under other keys each, and nothing that comes between two of them."""
    made = []
    for _ in range(blocks):
        session.control(buttons=[{"KeyW"}, {"KeyL", "KeyW"}, {"KeyJ"}, set()][session.block % 4])
        made.append(session.denoise().latents)
    return made


def pages(session: Session) -> list[Tensor]:
    session.settle()
    table, pool = session.context.table, session.context.pool
    kept = [(torch.tensor(entry.frame), *pool.read([entry.page])) for entry in table]
    return [x.clone() for each in kept for x in each]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# --- the same blocks ------------------------------------------------------------------------------
@pytest.mark.parametrize("line", (*FUSING, *APART))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_blocks_and_pages_are_those_of_two_passes(line: str, dtype: torch.dtype) -> None:
    for frames in (1, 3):
        world = random_world(block_frames=frames).to("cpu", dtype)
        serial, fused = (
            [*walk(session, 14), *pages(session)] for session in both(world, cache=line)
        )
        assert serial[13].isfinite().all() and serial[13].std() > 0
        assert equal(serial, fused)
        gc.collect()
        assert world.pool.used_pages == 0


@pytest.mark.parametrize("prompt", ("keep", "flush", "recache"))
@pytest.mark.parametrize("line", ("sink=1,recent=3", *LINES[2:6:3]))
def test_prompts_cuts_and_events_come_where_they_did(
    world: World, wide: World, line: str, prompt: str
) -> None:
    for some in (world, wide):
        serial, fused = (
            roam(session, 30) for session in both(some, cache=f"{line},prompt={prompt}")
        )
        assert same(serial, fused)


def test_a_cut_moves_the_context_and_the_next_block_moves_it_back(world: World) -> None:
    def cut(session: Session) -> list[Tensor]:
        made = walk(session, 5)
        session.cut()
        return made + walk(session, 6)

    serial, fused = map(cut, both(world, cache="sink=1,recent=4"))
    assert equal(serial, fused)
    for session in both(world, cache="sink=1,recent=4"):
        blocks = []
        for block in range(4):
            if block == 2:
                session.cut()
            blocks.append(session.denoise())
        assert [block.applied.cut for block in blocks] == [False, False, True, False]


def test_rows_that_are_not_alike_run_apart(wide: World) -> None:
    """A first frame alone, given blocks, known frames, guidance."""
    shape = wide.latents_of((32, 48), 6)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    known = Known(torch.tensor([True, False, False]), given[:, :, :3])
    apart = {"independent_first_frame": True}, {"given": given}, {"guidance": 2.0}, {}
    passes = []
    for options in apart:
        made = []
        for session in both(wide, cache="sink=1,recent=3", **options):
            with counted(wide) as ran:
                begun = walk(session, 3)
                made.append([*begun, session.denoise(known=known).latents, *walk(session, 2)])
            passes.append(ran["fused"])
        assert equal(*made)
    assert passes == [0, 4, 0, 5, 0, 0, 0, 5]


def test_a_world_that_was_moved_or_a_session_that_is_closed_says_so(make_world: MakeWorld) -> None:
    world = make_world()
    session = world.session(schedule="fused")
    session.denoise()
    world.to("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="was moved or cast"):
        session.denoise()
    session.close()
    with pytest.raises(ValueError, match="this session is closed"):
        session.denoise()


# --- in fewer passes ------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", (1, 2, 4))
def test_a_block_is_as_many_passes_as_steps(world: World, steps: int) -> None:
    for line in FUSING:
        with counted(world) as ran:
            for session in both(world, steps=steps, cache=line):
                ran.clear()
                walk(session, 12)
                if session.settings.schedule.context == "clean":
                    assert ran == {"forward": 12 * steps, "commit": 11}
                elif line == "recent=all":  # apart where buffers grow: 1, 3 and 7 frames
                    assert ran == {"forward": 12 * steps - 8, "commit": 3, "fused": 8}
                else:
                    assert ran == Counter(forward=12 * steps - 11, fused=11)


@pytest.mark.parametrize("line", APART)
def test_what_has_to_see_a_block_before_the_next_one_runs_apart(world: World, line: str) -> None:
    with counted(world) as ran, world.session(steps=2, cache=line, schedule="fused") as session:
        walk(session, 6)
        assert not session.fuses
    assert ran == {"forward": 12, "commit": 5}


def test_the_work_is_the_same(world: World) -> None:
    """In products, but that levels, actions and rays are embedded once for both. What is saved
    beside that is reading weights and starting kernels."""
    serial, fused = (
        time_parts(world, Setting(cache="sink=1,recent=3", schedule=name), 8, 2).flops
        for name in ("serial", "fused")
    )
    model = world.transformer
    embedder = model.condition_embedder
    parts = (embedder.time_embedder, embedder.time_proj, embedder.action_embedder)
    weights = [x for part in (*parts, model.ray_embedder) for x in part.parameters() if x.ndim == 2]
    once = sum(2 * FIXED_ROWS * weight.numel() for weight in weights)
    assert fused["commit"] == 0 < once < serial["commit"]
    assert fused["denoise"] == serial["denoise"] + serial["commit"] - once


def test_cells_are_told_in_the_order_of_the_grid(world: World) -> None:
    ran = []
    with world.session(steps=3, cache="sink=1,recent=3", schedule="fused") as session:
        session.on_cell = lambda cell: ran.append((cell.kind, cell.block, cell.level))
        walk(session, 6)
        session.settle()
        grid = spread(session.settings.schedule, 6)
    ticks = {cell.name[:3]: cell.tick for cell in grid.cells}
    assert [ticks[cell] for cell in ran] == sorted(ticks.values())
    assert len(ran) == len(set(ran)) == 6 * 4


def test_it_takes_no_more_memory(world: World) -> None:
    for line in FUSING:
        promised = []
        for session in both(world, cache=line):
            slabs, pool = world.pool.addresses(), world.pool.nbytes
            promised.append((session.memory_report(), pool))
            walk(session, 14)
            if line != "recent=all":
                assert world.pool.addresses() == slabs, "nothing was allocated while it ran"
                assert session.memory_report() == promised[-1][0]
        assert promised[0] == promised[1]


def test_what_lies_where_it_is_read_is_not_written_again(world: World) -> None:
    """Pages that stay where they are are left alone, and those that came out of a fused pass lie
    there already: nothing is ever brought from a page."""
    filled: list[int] = []
    fill = ContextView._fill

    def noting(self: ContextView, run: Run, layers: slice) -> None:
        filled.append(len(run.reads))
        fill(self, run, layers)

    with pytest.MonkeyPatch.context() as patch, opened(world, cache="sink=1,recent=3") as session:
        patch.setattr(ContextView, "_fill", noting)
        walk(session, 12)
        assert filled == []
        session.settle()
        walk(session, 1)
        assert filled == [1]


# --- going back -----------------------------------------------------------------------------------
class Enough(Exception):
    pass


def test_a_block_that_is_given_up_leaves_the_one_before_committed(world: World) -> None:
    level = 0

    def stop(cell: Any, _: Tensor) -> None:
        if cell.level == level:
            raise Enough

    options: dict[str, Any] = {"steps": 2, "cache": "sink=1,recent=3"}
    with opened(world, "serial", **options) as session:
        expected = walk(session, 9)
    for level in (0, 1):  # noqa: B007  # `stop` looks at it
        made = []
        with opened(world, **options) as session:
            for block in range(9):
                for _ in range(2 if block in (0, 4, 5) else 0):
                    with pytest.raises(Enough):
                        session.denoise(on_step=stop)
                    assert session.context.newest == (block - 1 if block else None)
                    assert not session.fuses, "that is done"
                made += walk(session, 1)
        assert equal(made, expected)


@pytest.mark.parametrize("line", FUSING)
def test_a_pass_that_fails_in_its_midst_commits_nothing(world: World, line: str) -> None:
    """In every layer, when its buffer has changed; then all goes on as if nothing was."""
    with opened(world, "serial", cache=line) as session:
        expected = walk(session, 9)
    calls = at = 0
    text = Layer.read_text

    def failing(self: Layer, *args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Enough
        return text(self, *args, **options)

    for at in range(1, 1 + world.transformer.config.num_layers):
        with opened(world, cache=line) as session:
            made = walk(session, 6)
            before, used = session.context.table, world.pool.used_pages
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Layer, "read_text", failing)
                for _ in range(2):
                    calls = 0
                    with pytest.raises(Enough):
                        session.denoise()
            assert session.context.table == before and world.pool.used_pages <= used
            if at == 1:
                session.settle()  # the context pass alone, over what the failed one left
            assert equal(made + walk(session, 3), expected)


@pytest.mark.parametrize("line", (FUSING[0], FUSING[1], FUSING[6]))
def test_going_back_and_on_is_never_having_stopped(wide: World, tmp_path: Path, line: str) -> None:
    options = {"cache": f"{line},prompt=recache", "history": HISTORY}
    with opened(wide, "serial", **options) as session:
        expected = roam(session, 26)
        kept = [snapshot.block for snapshot in session.history._kept]
    with opened(wide, **options) as session:
        made = roam(session, 10)
        here = session.snapshot()
        with session.fork() as twin:
            made += roam(session, 8)
            assert same(roam(twin, 8), made[10:])
            session.restore(here)
            assert same(roam(session, 8), made[10:])
        for block in (14, 9, 0, 17):
            session.rewind(block)
            made = made[:block] + roam(session, 18 - block)
        session.save(tmp_path / "walk.safetensors")
        with wide.load_session(tmp_path / "walk.safetensors") as loaded:
            assert same(roam(loaded, 8), expected[18:])
        assert same(made + roam(session, 8), expected)
        assert [snapshot.block for snapshot in session.history._kept] == kept


def test_settling_at_any_time_changes_nothing(world: World) -> None:
    with opened(world, "serial", cache="sink=1,recent=3") as session:
        expected = walk(session, 16)
    for seed in range(3):
        dice = random.Random(seed)
        with opened(world, cache="sink=1,recent=3") as session:
            made: list[Tensor] = []
            for _ in range(16):
                if dice.random() < 0.4:
                    dice.choice((session.settle, session.snapshot))()
                made += walk(session, 1)
        assert equal(made, expected)


def test_streams_and_replays_are_those_of_serial(world: World, tmp_path: Path) -> None:
    def told(block: Block) -> tuple[int, Tensor, bytes]:
        return block.index, block.latents, block.frames.tobytes()

    serial, fused = (
        list(map(told, world.stream(controls="W*4 L*4 WJ*4", seed=2, schedule=name, blocks=12)))
        for name in ("serial", "fused")
    )
    for one, other in zip(serial, fused, strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and one[2] == other[2]
    path = tmp_path / "walk.wsrun"
    with opened(world, history=HISTORY) as session:
        recorder = session.record(path)
        roam(session, 12)
        session.rewind(5)
        with session.fork() as twin:
            roam(twin, 4, seed=1)
        roam(session, 6)
        recorder.close()
    from worldsim.replay import Replay, read_run

    assert len(list(Replay(world, read_run(path)))) == 12 + 4 + 6  # each hash is compared
