"""The serial form of every schedule: what its cells read, what is equal, and what must not be."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from worldsim.cache.policy import Table
from worldsim.models.view import Ahead, ContextView
from worldsim.session import Session
from worldsim.streaming.batched import Batched
from worldsim.wavefront import Key, kept, spread
from worldsim.world import World

NAMES = ("serial", "fused", "reuse", "diagonal", "disa", "tpp", "hiar", "lag1", "lag2", "lag3")
CACHE = "sink=1,recent=2,positions=packed"  # full after three blocks, so that frames are evicted
KEYS = [frozenset({key}) for key in ("KeyW", "KeyL", "KeyA", "KeyW", "KeyJ", "KeyS", "KeyD")]


@pytest.fixture(scope="module")
def world(make_world) -> World:  # type: ignore[no-untyped-def]
    return make_world(height=64, width=64, sampler="renoise")


def opened(world: World, schedule: str, steps: int | None = 4, **others: object) -> Session:
    if schedule == "diagonal":
        steps = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rules that it was not trained for
        return world.session(seed=3, steps=steps, cache=CACHE, schedule=schedule, **others)  # type: ignore[arg-type]


def rollout(session: Session, blocks: int) -> list[Tensor]:
    return [session.denoise([KEYS[i]]).latents for i in range(session.block, blocks)]


@contextmanager
def recording(seen: list[list[Key]]) -> Iterator[None]:
    """Note what each row of a pass attends to: the level and block of every page in its buffer."""

    def noted(kind: type[ContextView | Ahead]) -> Callable[..., Tensor]:
        attend = kind.attend

        def noting(self: Any, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer == 0:
                table, start = self.told
                rows = self.keys[0].shape[1] - k.shape[-2]  # of the context, as attention sees it
                frames = [entry for entry in table if entry.frame < start]
                assert rows == len(frames) * k.shape[-2]  # a block is one frame here
                seen.append(sorted((entry.frame, entry.level) for entry in frames))
            return attend(self, layer, q, k, v)

        return noting

    prepare, ahead, take_over = ContextView.prepare, ContextView.ahead, Ahead.take_over

    def noting_start(self: Any, start: int, *rest: Any) -> None:
        self.told = self.context.table, start
        prepare(self, start, *rest)

    def noting_table(self: Any, table: Table, committed: range, *rest: Any) -> Any:
        later: Any = ahead(self, table, committed, *rest)
        later.told = table, committed.stop
        return later

    def noting_end(self: Any) -> None:
        self._view.told = self.told
        take_over(self)

    with pytest.MonkeyPatch.context() as patch:
        for kind in (ContextView, Ahead):
            patch.setattr(kind, "attend", noted(kind))
        patch.setattr(ContextView, "prepare", noting_start)
        patch.setattr(ContextView, "ahead", noting_table)
        patch.setattr(Ahead, "take_over", noting_end)
        yield


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_reads_exactly_what_it_declares(world: World, name: str) -> None:
    session, seen = opened(world, name), []
    with recording(seen):
        rollout(session, 6)
        session.settle()
    schedule = session.settings.schedule
    grid = spread(schedule, 6, 1, kept(session.settings.cache, 1, 6))
    declared = []
    for block in range(6):
        mine = [cell for cell in grid.cells if cell.name.block == block]
        mine.sort(key=lambda cell: cell.name.kind != "denoise")  # passes come after the steps
        declared += [sorted(cell.reads) for cell in mine]
    # A context pass ends before its last layer attends, but this model has two.
    assert seen == declared


def test_block_0_is_equal_under_every_schedule_and_block_1_is_not(world: World) -> None:
    made = {name: rollout(opened(world, name), 3) for name in NAMES if name != "diagonal"}
    for name, blocks in made.items():
        assert torch.equal(blocks[0], made["serial"][0]), name
    firsts = {name: blocks[1] for name, blocks in made.items() if name not in ("fused", "disa")}
    # What reads the last step's keys, whatever it is called, is one rule.
    assert torch.equal(firsts.pop("lag3"), firsts["reuse"])
    names = list(firsts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(firsts[one], firsts[other]), (one, other)


def test_with_one_step_by_products_are_one_rule(world: World) -> None:
    tpp, reuse, lag = (rollout(opened(world, n, 1), 5) for n in ("tpp", "reuse", "lag2"))
    assert all(map(torch.equal, tpp, reuse)) and all(map(torch.equal, tpp, lag))
    serial, hiar = (rollout(opened(world, n, 1), 5) for n in ("serial", "hiar"))
    assert all(map(torch.equal, serial, hiar))  # a step's output is clean


@pytest.mark.parametrize("name", NAMES)
def test_snapshot_rewind_and_fork_hold_under_every_schedule(world: World, name: str) -> None:
    session = opened(world, name)
    for block in range(3):
        session.step([KEYS[block]])
    here, twin = session.snapshot(), session.fork()
    straight = [session.step([KEYS[block]]).latents for block in range(3, 6)]
    assert all(map(torch.equal, rollout(twin, 6), straight))
    session.restore(here)
    again = [session.step([KEYS[block]]).latents for block in range(3, 6)]
    assert all(map(torch.equal, again, straight))
    session.rewind(4)
    assert torch.equal(session.denoise([KEYS[4]]).latents, straight[1])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lag1", "lag2")])
def test_sessions_of_some_lanes_make_the_block_together(world: World, name: str) -> None:
    whole = opened(world, name)
    lanes = whole.settings.schedule.lanes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [Session(world, whole.settings, whole.asked, lanes=(lane,)) for lane in lanes]
    for block, expected in enumerate(rollout(whole, 6)):
        x = None
        for part in parts:
            x = part.denoise([KEYS[block]], x=x).latents
        assert x is not None and torch.equal(x, expected), block
    used = {lane: {entry.level for entry in part.lanes[lane][0].context.table}
            for lane, part in zip(lanes, parts, strict=True)}  # fmt: skip
    assert all(len(levels) <= (3 if name == "diagonal" else 1) for levels in used.values())


@pytest.mark.parametrize("name", ("tpp", "hiar", "reuse"))
def test_what_is_given_is_clean_in_every_lane(world: World, name: str) -> None:
    first = rollout(opened(world, "serial"), 2)
    session = opened(world, name, given=torch.cat(first, dim=2))
    session.settle()
    for views in session.lanes.values():
        assert {entry.level for entry in views[0].context.table} == {-1}
        assert len(views[0].context.table) == 2
    clean = opened(world, "serial", given=torch.cat(first, dim=2))
    assert torch.equal(session.denoise([KEYS[2]]).latents, clean.denoise([KEYS[2]]).latents)


def test_an_aborted_block_leaves_nothing(world: World) -> None:
    class Enough(Exception):
        pass

    def stop(*_: object) -> None:
        raise Enough

    for name in ("tpp", "hiar", "reuse", "fused"):
        plain, retried = opened(world, name), opened(world, name)
        expected = rollout(plain, 5)
        rollout(retried, 3)
        for _ in range(2):
            with pytest.raises(Enough):
                retried.denoise([KEYS[5]], on_step=stop)
        assert all(map(torch.equal, rollout(retried, 5), expected[3:]))


def test_what_is_untrained_warns_once(make_world) -> None:  # type: ignore[no-untyped-def]
    fresh = make_world(height=64, width=64)
    with pytest.warns(UserWarning, match="trained to read what is clean .* reads what is lag0"):
        next(fresh.stream(schedule="tpp"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fresh.session(schedule="tpp").close()
        fresh.session().close()
        assert not told
        fresh.session(schedule="hiar").close()
        assert len(told) == 1 and "reads what is output" in str(told[0].message)


def test_a_world_is_run_under_the_rule_that_it_was_trained_with(make_world) -> None:  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_level = make_world(height=64, width=64, rule="lag0")
        plain = rollout(same_level.session(seed=3), 3)
        named = rollout(same_level.session(seed=3, schedule="tpp"), 3)
    assert all(map(torch.equal, plain, named))
    with pytest.warns(UserWarning, match="trained to read what is lag0 .* reads what is clean"):
        serial = rollout(same_level.session(seed=3, schedule="serial"), 3)
    assert torch.equal(serial[0], plain[0]) and not torch.equal(serial[1], plain[1])
    for rule in ("clean", "last", "lag2", "output"):
        assert same_level.config.schedule(4).under(rule).rule == rule
    with pytest.raises(ValueError, match=r"a rule is clean, last, .* not 'lag'"):
        make_world(rule="lag")
    with pytest.raises(ValueError, match=r"unipc remembers .* the rule of this world spreads"):
        same_level.session(schedule="unipc")


def test_what_cannot_be_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="nothing runs joint windows yet"):
        world.session(schedule="rolling")
    with pytest.raises(ValueError, match="recache commits finished blocks anew"):
        world.session(schedule="tpp", cache="recent=3,prompt=recache")
    with pytest.raises(ValueError, match="recache commits finished blocks anew"):
        opened(world, "hiar").recache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.session(schedule="fused").close()
        world.session(schedule="disa").close()


def test_memory_is_told_for_every_lane(world: World) -> None:
    one, four = opened(world, "serial").memory_report(), opened(world, "tpp").memory_report()
    assert four.context == 4 * one.context and four.scratch == 4 * one.scratch
    assert four.latents == one.latents


# --- several blocks at once -------------------------------------------------------------------
def batched(world: World, schedule: str, steps: int = 4, **others: object) -> Batched:
    whole = opened(world, schedule, steps, **others)
    with whole:
        return Batched(world, whole.settings, whole.asked)


@pytest.mark.parametrize("name", ("batch", "lag1", "lag2", "lag3"))
@pytest.mark.parametrize("steps", (1, 2, 3, 4))
def test_a_batch_is_its_own_serial_form_bit_for_bit(world: World, name: str, steps: int) -> None:
    expected = rollout(opened(world, name, steps), 6)
    wave = batched(world, name, steps)
    made = list(wave.blocks(lambda leader: [KEYS[leader.block]], 6))
    assert [block.index for block in made] == list(range(6))
    assert all(torch.equal(block.latents, x) for block, x in zip(made, expected, strict=True))
    grid = spread(wave.settings.schedule, 6)
    assert wave.tick == grid.ticks
    serial = opened(world, name, steps)
    for block in range(6):
        serial.denoise([KEYS[block]])
    serial.settle()
    for lane, views in serial.lanes.items():  # and what is left behind is the same
        wave.parts[lane].settle()
        mine, theirs = wave.parts[lane].lanes[lane][0].context, views[0].context
        assert [e.frame for e in mine.table] == [e.frame for e in theirs.table]
        for one, other in zip(mine.table, theirs.table, strict=True):
            assert torch.equal(mine.pool.keys(one.page), theirs.pool.keys(other.page))


def test_blocks_come_out_at_the_tick_of_the_formula(world: World) -> None:
    for name, apart in (("batch", 1), ("lag1", 2)):
        wave, ticks = batched(world, name, 3), []
        for _ in wave.blocks(lambda _: [KEYS[0]], 4):
            ticks.append(wave.tick)
        assert ticks == [3 + apart * block for block in range(4)]


def test_a_batch_in_bfloat16_is_its_own_serial_form(make_world) -> None:  # type: ignore[no-untyped-def]
    world = make_world(height=64, width=64).to("cpu", torch.bfloat16)
    expected = rollout(opened(world, "batch"), 4)
    made = batched(world, "batch").blocks(lambda leader: [KEYS[leader.block]], 4)
    assert all(torch.equal(b.latents, x) for b, x in zip(made, expected, strict=True))


def test_controls_hold_from_their_block_on_and_nothing_before_changes(world: World) -> None:
    def play(wave: Batched, at: int | None) -> list[Tensor]:
        def enters(leader: Session) -> list[frozenset[str]]:
            if leader.block == at:
                leader.control(prompt="blue tiles, night")
                leader.cut()
            return [KEYS[leader.block]]

        return [block.latents for block in wave.blocks(enters, 6)]

    plain, changed = (play(batched(world, "batch"), at) for at in (None, 3))
    assert all(map(torch.equal, plain[:3], changed[:3]))
    assert not any(map(torch.equal, plain[3:], changed[3:]))
    serial = opened(world, "batch")
    for block in range(6):
        if block == 3:
            serial.control(prompt="blue tiles, night")
            serial.cut()
        assert torch.equal(serial.denoise([KEYS[block]]).latents, changed[block]), block


def test_a_batch_and_its_serial_form_go_on_from_each_others_snapshots(world: World) -> None:
    expected = rollout(opened(world, "batch"), 6)
    wave, serial = batched(world, "batch"), opened(world, "batch")
    list(wave.blocks(lambda leader: [KEYS[leader.block]], 3))
    here = wave.snapshot(serial.decoding)
    serial.restore(here)
    assert all(map(torch.equal, rollout(serial, 6), expected[3:]))
    other = batched(world, "batch")
    other.restore(here)
    rest = other.blocks(lambda leader: [KEYS[leader.block]], 3)
    assert all(torch.equal(b.latents, x) for b, x in zip(rest, expected[3:], strict=True))
    wave.advance(lambda _: [KEYS[3]])
    with pytest.raises(ValueError, match="blocks are in flight: drain them"):
        wave.snapshot(serial.decoding)
    assert torch.equal(next(wave.drain()).latents, expected[3])


def test_guidance_is_batched_too(world: World) -> None:
    guided = {"guidance": 2.5, "negative_prompt": "blue tiles"}
    expected = rollout(opened(world, "batch", 2, **guided), 4)
    made = batched(world, "batch", 2, **guided).blocks(lambda leader: [KEYS[leader.block]], 4)
    assert all(torch.equal(b.latents, x) for b, x in zip(made, expected, strict=True))


def test_what_waits_for_the_block_before_is_not_batched(world: World) -> None:
    with pytest.raises(ValueError, match="can be batched: batch, lag1"):
        batched(world, "serial")
