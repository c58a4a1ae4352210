"""A session as one explicit state: snapshot, restore, fork and rewind, bit for bit."""

import gc
import random
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import MakeWorld
from test_events import LINES

from worldsim.history import History
from worldsim.replay import Replay, read_run
from worldsim.session import Session
from worldsim.state import Block
from worldsim.world import World

KEYS = ("KeyW", "KeyA", "KeyL", "KeyJ")
PROMPTS = ("night", "red brick, fog", "green hedges, dusk")
HISTORY = 2**22


def roam(session: Session, blocks: int, seed: int = 0) -> list[Block]:
    """Blocks under controls, prompts and events that depend on the block's number alone."""
    made = []
    for _ in range(blocks):
        dice = random.Random(f"{seed}/{session.block}")
        session.control(buttons={key for key in KEYS if dice.random() < 0.4})
        if dice.random() < 0.3:
            session.control(prompt=dice.choice(PROMPTS))
        if dice.random() < 0.2:
            dice.choice((session.cut, session.flush, session.recache))()
        made.append(session.step())
    return made


def same(ours: list[Block], theirs: list[Block]) -> bool:
    assert [b.applied for b in ours] == [b.applied for b in theirs]
    return all(
        torch.equal(a.latents, b.latents) and (a.frames == b.frames).all()
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("line", LINES)
def test_going_on_from_a_snapshot_is_never_having_stopped(
    world: World, wide: World, line: str
) -> None:
    for some in (world, wide):
        with some.session("red brick", seed=3, cache=f"{line},prompt=recache") as session:
            roam(session, 9)
            here = session.snapshot()
            straight = roam(session, 20)
            roam(session, 3, seed=1)
            session.restore(here)
            assert same(roam(session, 20), straight)
            with session.fork() as twin:
                twin.restore(here)
                assert same(roam(twin, 20), straight)
        del here, session, twin
        gc.collect()
        assert some.pool.used_pages == 0


@pytest.mark.parametrize("history", (0, HISTORY))
@pytest.mark.parametrize("line", ("sink=1,recent=3,prompt=recache", LINES[-1]))
def test_rewind_goes_back_to_any_block(world: World, line: str, history: int) -> None:
    with world.session("red brick", seed=4, cache=line, history=history) as session:
        straight = roam(session, 40)
        for block in (33, 17, 16, 3, 0):
            session.rewind(block)
            assert session.block == block
            assert same(roam(session, 6), straight[block : block + 6])
        assert same(roam(session, 30), straight[6:36]), "and on from there"
        with pytest.raises(ValueError, match=r"cannot go back to block 99: the next one is 36"):
            session.rewind(99)


def test_rewind_replays_given_blocks_and_known_frames(wide: World) -> None:
    shape = wide.latents_of((32, 48), 6)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with wide.session(seed=5, given=given) as session:
        straight = [*roam(session, 4)]
        session.rewind(3)
        assert same(roam(session, 3), straight[1:])
        session.rewind(0)
        assert session.block == 0 and not session.given


def test_snapshots_of_latents_alone(world: World) -> None:
    """Who never decodes may stop anywhere; who decodes later than he denoises is told."""
    with world.session(seed=6) as session:
        session.denoise()
        here = session.snapshot()
        wanted = session.denoise().latents
        session.restore(here)
        again = session.denoise()
        assert torch.equal(again.latents, wanted)
    with world.session(seed=6) as session:
        session.step()
        session.denoise()
        for act in (session.snapshot, lambda: session.rewind(1)):
            with pytest.raises(ValueError, match="block 1 is not decoded yet"):
                act()


def test_what_changed_since_the_newest_block_is_part_of_a_snapshot(world: World) -> None:
    with world.session("red brick", seed=7, cache="sink=1,recent=3,prompt=flush") as session:
        roam(session, 3)
        session.control(prompt="night", buttons={"KeyL"})
        session.cut()
        here = session.snapshot()
        first = session.step()
        assert first.applied.prompt == "night" and first.applied.cut
        session.restore(here)
        assert same([session.step()], [first])
        session.rewind(4)
        session.rewind(3)
        assert session.prompt != "night", "it came after block 2"


def test_a_key_heard_after_a_snapshot_was_taken_is_not_heard_again(world: World) -> None:
    with world.session(seed=7, history=HISTORY) as session:
        roam(session, 8)
        session.control(buttons={"KeyA"})
        session.control(buttons=())  # a tap, for block 8
        tapped = session.step()
        session.rewind(8)
        assert session.step().applied.keys != tapped.applied.keys


def test_a_block_in_the_making_can_be_dropped(world: World) -> None:
    class Changed(Exception):
        pass

    def stop(*_: object) -> None:
        raise Changed

    with world.session("red brick", seed=8) as session, world.session("red brick", seed=8) as other:
        for some in (session, other):
            roam(some, 3)
        before = session.snapshot()
        with pytest.raises(Changed):
            session.step(on_step=stop)
        session.restore(before)
        for some in (session, other):
            some.control(buttons={"KeyJ"})
        assert same([session.step()], [other.step()])
        shown = session.snapshot()
        session.step()
        session.restore(shown)  # made, but nobody saw it
        assert same(roam(session, 4), roam(other, 4))


def test_forks_cost_only_the_pages_that_differ(world: World) -> None:
    with world.session(seed=9, cache="sink=2,recent=6") as session:
        roam(session, 12)
        session.settle()
        used, held = world.pool.used_pages, world.pool.nbytes
        twins = [session.fork() for _ in range(10)]
        assert (world.pool.used_pages, world.pool.nbytes) == (used, held)
        frames = world.config.block_frames
        for twin in twins:
            twin.step()
            twin.settle()
        assert world.pool.used_pages == used + 10 * frames
        for twin in twins:
            twin.close()
    gc.collect()
    assert world.pool.used_pages == 0


def test_snapshots_of_a_session_stay_within_their_bytes(world: World) -> None:
    page = world.pool.page_nbytes(world.pool.frame)
    with world.session(seed=10, cache="recent=4", history=24 * page) as session:
        promised = session.memory_report()
        assert promised.history == 24 * page and world.pool.nbytes >= promised.context
        pages = world.pool.addresses()
        roam(session, 150)
        assert world.pool.addresses() == pages, "nothing was allocated while it ran"
        assert world.pool.used_pages * page <= promised.context + promised.history
        kept = [snapshot.block for snapshot in session.history._kept]
        assert kept[0] == 0 and len(kept) == 7 and kept[-1] > 140
        session.rewind(147)
        assert session.block == 147


def test_history_is_dense_where_it_is_near(world: World) -> None:
    with world.session() as session:
        history, blocks = History(most=8), []
        for block in range(0, 2000):
            session.now = type(session.now)(session.asked, session.now.origin, block=block)
            if not blocks or history.wants(block):
                history.add(session._capture())
                blocks.append(block)
        kept = [snapshot.block for snapshot in history._kept]
        gaps = [b - a for a, b in pairwise(kept)]
        assert kept[0] == 0 and len(kept) == 9 and kept[-1] >= 1990
        assert gaps[-1] < gaps[0] / 8
        session.now = type(session.now)(session.asked, session.now.origin)


def test_a_session_that_is_paused_makes_nothing(world: World) -> None:
    with world.session() as session:
        session.step()
        session.pause()
        assert session.paused
        with pytest.raises(ValueError, match=r"paused: resume\(\) it first"):
            session.step()
        session.resume()
        assert next(iter(session)).index == 1


def test_snapshots_of_elsewhere_are_refused(world: World, wide: World) -> None:
    def taken(some: World, **options: object) -> object:
        with some.session(**options) as session:  # type: ignore[arg-type]
            return session.snapshot()

    with world.session(seed=1) as session:
        with pytest.raises(ValueError, match="taken under other settings"):
            session.restore(taken(world, seed=2))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="of another world"):
            session.restore(taken(wide, seed=1))  # type: ignore[arg-type]


# --- broken off -----------------------------------------------------------------------------------
def broken(
    patch: pytest.MonkeyPatch, owner: object, name: str, calls: int = 1, after: bool = False
) -> None:
    """Have one call of a method be ended by a Ctrl-C before or ``after`` its work."""
    real, left = getattr(owner, name), [calls]

    def once(*arguments: object, **options: object) -> object:
        left[0] -= 1
        told = real(*arguments, **options) if left[0] or after else None
        if left[0] == 0:
            raise KeyboardInterrupt
        return told

    patch.setattr(owner, name, once)


def test_a_session_that_nobody_closes_gives_everything_back(make_world: MakeWorld) -> None:
    world, sizes = make_world(), set()
    for seed in range(4):
        session = world.session(seed=seed, cache="recent=3", history=HISTORY)
        roam(session, 5)
        pool = world.pool_of(world.config.size)
        sizes.add((pool.nbytes, sum(pool._promised.values())))
        del session
        gc.collect()
    assert len(sizes) == 1 and pool.used_pages == 0
    assert not any(pool._promised.values())
    with world.session() as session:
        session.step()
    with pytest.raises(ValueError, match="is closed"):
        session.memory_report()


def test_a_step_broken_off_while_it_decodes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.session(seed=3) as session:
        straight = roam(session, 8)
    for go_on in ("step", "snapshot", "rewind"):
        with world.session(seed=3) as session:
            roam(session, 4)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                broken(patch, world.autoencoder, "decode")
                roam(session, 1)
            if go_on == "snapshot":
                session.restore(session.snapshot())
            if go_on == "rewind":
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    broken(patch, world.autoencoder, "decode", 2)
                    session.rewind(3)
            at = session.block
            assert same(roam(session, 3), straight[at : at + 3])


def test_a_block_that_was_not_decoded_is_not_passed_over(world: World) -> None:
    with world.session() as session:
        first = session.denoise()
        with pytest.raises(ValueError, match="block 1 cannot be decoded now: the next one is 0"):
            session.step()
        session.decode(first)
        assert len(session.step().frames) and session.decoded == session.block == 3


def test_words_in_the_place_of_others_are_heeded(world: World, tmp_path: Path) -> None:
    with world.session("red brick", seed=3) as session:
        roam(session, 2)
        session.control(prompt="night")
        session.save(tmp_path / "s.safetensors")
    with world.load_session(tmp_path / "s.safetensors") as session:
        session.control(prompt="green hedges, dusk")
        straight = [session.step() for _ in range(2)]
        assert straight[0].applied.prompt == "green hedges, dusk"
        session.rewind(3)
        assert same([session.step()], straight[1:])


def test_a_world_that_nobody_has_leaves_no_memory(make_world: MakeWorld) -> None:
    world = make_world()
    with world.session(history=HISTORY) as session:
        roam(session, 3)
    pool = weakref.ref(world.pool_of(world.config.size))
    gc.disable()  # a GPU's memory asks for no collection
    try:
        del world, session
        assert pool() is None
    finally:
        gc.enable()


def test_a_rewind_broken_off_can_be_recorded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.wsrun"
    with world.session("red brick", seed=3) as session:
        session.record(path)
        with pytest.raises(ValueError, match=r"recorded already, to .*run\.wsrun"):
            session.record(path)
        straight = roam(session, 6)
        lines = path.read_text()
        with pytest.raises(ValueError, match="cannot go back to block 99"):
            session.rewind(99)
        assert path.read_text() == lines, "it went nowhere"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            broken(patch, session, "denoise", 3)
            session.rewind(4)
        assert session.block == 2
        assert same(roam(session, 4), straight[2:])
    assert len(list(Replay(world, read_run(path)))) == 10


def test_a_view_broken_off_while_it_is_filled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.session(seed=3, cache="sink=1,recent=3,positions=packed") as session:
        roam(session, 6)
        early = session.snapshot()
        roam(session, 4)
        late = session.snapshot()
        straight = roam(session, 1)
        session.restore(early)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            broken(patch, session.view, "_fill", after=True)
            roam(session, 1)
        session.restore(late)  # whose pages the view held before, and holds no more
        assert same(roam(session, 1), straight)


def test_noise_of_the_callers_goes_with_a_snapshot(world: World) -> None:
    def noise(block: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, 0.1 * block + step)

    with world.session(noise=noise) as own, world.session() as seeded:
        own.step()
        with pytest.raises(ValueError, match="under other settings"):
            seeded.restore(own.snapshot())
        own.fork().restore(own.snapshot())
