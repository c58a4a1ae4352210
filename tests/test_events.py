"""Sessions over every form of cache: events, forks, prompts, and the memory that they promised."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import random_world
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from worldsim.cache.context import Event
from worldsim.maze.recipe import TINY
from worldsim.script import Script, parse_prompts
from worldsim.session import Session
from worldsim.state import Block
from worldsim.world import World

LINES = (
    "sink=1,recent=3",
    "sink=2,recent=2,positions=packed",
    "sink=1,mid=2:pool,recent=2,positions=packed",
    "mid=2:participative,recent=2,positions=packed",
    "sink=1,mid=2:topk,bank=4,recent=2",
    "sink=1,mid=2:pose,bank=8,recent=2,positions=packed",
    "sink=1:int8,recent=3:int8h",
    "sink=1,mid=2:topk:int4,bank=4,recent=2:int4,positions=packed",
)
SCRIPT = "W*3 L*2 WA*4"


def played(session: Session, blocks: int) -> list[Block]:
    session.control(buttons={"KeyW"})
    return [session.step() for _ in range(blocks)]


@pytest.mark.parametrize("line", LINES)
def test_every_cache_streams_forks_and_gives_back(world: World, wide: World, line: str) -> None:
    for some in (world, wide):
        with some.session("red brick", seed=3, cache=line) as session:
            played(session, 6)
            with session.fork() as twin:
                for ours, theirs in zip(played(session, 4), played(twin, 4), strict=True):
                    assert torch.equal(ours.latents, theirs.latents)
                    assert ours.latents.isfinite().all()
            held = [block.latents for block in played(session, 2)]
        with some.session("red brick", seed=3, cache=line) as straight:
            again = played(straight, 12)[-2:]
        assert all(torch.equal(a, b.latents) for a, b in zip(held, again, strict=True))
        assert some.pool.used_pages == 0


# --- memory ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("line", LINES)
def test_a_session_holds_what_was_promised(line: str) -> None:
    world = random_world(block_frames=2)
    promised = world.memory_report(line)
    assert world.pool.nbytes == 0, "telling takes nothing"
    with world.session(cache=line) as session:
        assert world.pool.nbytes == promised.context
        assert session.view.nbytes == promised.scratch
        pages = world.pool.addresses()
        played(session, 14)
        assert session.memory_report() == promised
        assert world.pool.addresses() == pages, "nothing was allocated while it ran"
        means = [query for _, query in session.context.table.queries]
        means += [e.summary for e in session.context.table.mid.bank if e.summary is not None]
        assert sum(mean.nbytes for mean in means) <= promised.summaries
        assert session.view.nbytes == promised.scratch
        assert sum(x.nbytes for x in session.carry or ()) == promised.carry
        latents = [
            made.block.latents.nbytes for made in (*session.now.made, session._pending) if made
        ]
        assert sum(latents) == promised.latents
        asked = (*session.asked.keys, *session.asked.values)
        assert sum(x.nbytes for x in asked) == promised.prompt
        assert promised.session == sum((
            promised.context, promised.summaries, promised.scratch, promised.carry,
            promised.latents, promised.prompt,
        ))  # fmt: skip


class Peak(TorchDispatchMode):
    """Follows every storage that an operation hands out, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0
        self.weights: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and not x.is_mkldnn:  # weights in another order
                storage = x.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.weights:
                    self.live[ref.cdata] = (ref, storage.nbytes())
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out


@contextmanager
def peak_of(world: World) -> Iterator[Peak]:
    """Peak of what is allocated from here on; the weights exist, and do not count."""
    gc.collect()
    peak = Peak()
    for model in (world.transformer, world.autoencoder, world.text_encoder):
        for x in (*model.parameters(), *model.buffers()):
            peak.weights.add(StorageWeakRef(x.untyped_storage()).cdata)
    with peak:
        yield peak


def test_int4_takes_less_than_half_of_the_peak() -> None:
    """Scratch, rotated copies, staging and every activation included."""
    recipe = replace(TINY, layers=4, heads=4, head_dim=32, ffn_dim=128)
    most = {}
    for format_ in ("full", "int4"):
        world = random_world(recipe, height=128, width=128).to(torch.bfloat16)
        world.text("")
        line = f"sink=3:{format_},recent=17:{format_},positions=packed"
        with peak_of(world) as peak, world.session(cache=line) as session:
            for _ in range(23):  # two more than it takes until pages leave
                session.denoise()
        most[format_] = peak.most
        assert peak.most >= world.memory_report(line).context
    assert most["int4"] <= 0.45 * most["full"], most


# --- events ---------------------------------------------------------------------------------------
Act = Callable[[Session], None]


def after(world: World, line: str, act: Act, blocks: int = 6) -> tuple[Session, Block]:
    session = world.session("red brick, day", seed=1, cache=line)
    played(session, blocks)
    act(session)
    return session, session.step()


def frames_read(session: Session) -> list[int]:
    """Of the newest block."""
    plan = session.context.plan(session.frame - 1, 1)
    return sorted(read.entry.frame for read in plan.reads)


def test_a_flush_keeps_the_sink_and_the_newest_frame(world: World) -> None:
    session, _ = after(world, "sink=1,mid=2:topk,bank=4,recent=3", lambda s: s.flush())
    assert frames_read(session) == [0, 5]
    session.close()


def test_a_reset_forgets_everything(world: World) -> None:
    first = world.session("red brick, day", seed=1, cache="sink=1,recent=3")
    played(first, 6)
    first.reset()
    assert len(first.context.table) == 0 and world.pool.used_pages == 0
    made = first.step()
    fresh = world.session("red brick, day", seed=1, cache="sink=1,recent=3")
    for _ in range(6):  # the same controls led here, but nothing is remembered
        fresh.step([frozenset({"KeyW"})] if fresh.frame else [frozenset()])
        fresh.reset()
    fresh.control(buttons={"KeyW"})
    assert torch.equal(made.latents, fresh.step().latents)
    first.close()
    fresh.close()


@pytest.mark.parametrize("positions", ["absolute", "packed"])
@pytest.mark.parametrize("window", [6, 9, 21])
@pytest.mark.parametrize("event", ["flush", "cut", "recache", "reset"])
def test_own_keys_stand_where_their_queries_do(
    wide: World, window: int, positions: str, event: str
) -> None:
    """After each event, and the next block as well: positions follow one another without overlap,
    and a cut moves the context away for one block alone."""
    line = f"window={window},sink=1,positions={positions}"
    session = wide.session(cache=line)
    for _ in range(-(-window // 3) + 2):
        session.denoise()
    getattr(session, event)()
    gaps = []
    for _ in range(3):
        plan = session.context.plan(session.frame, 3)
        own, keys = plan.query_positions, [read.position for read in plan.reads]
        assert own == tuple(range(session.frame, session.frame + 3))
        assert len(set(keys)) == len(keys) and not set(own) & set(keys)
        session.denoise()
        gaps.append(own[0] - max(keys) if keys else None)
        session.settle()
    if positions == "packed" or event in ("flush", "cut", "recache"):
        assert gaps[1:] == [1, 1]
        assert gaps[0] == {"cut": 28, "reset": None}.get(event, 1)
    session.close()


def test_a_cut_changes_one_block_of_positions(world: World) -> None:
    plain, before = after(world, "sink=1,recent=3", lambda _: None)
    cut, after_cut = after(world, "sink=1,recent=3", lambda s: s.cut())
    assert not torch.equal(before.latents, after_cut.latents)
    for session in (plain, cut):
        session.settle()
    assert cut.context.plan(7, 1).reads[0].position == 0 and not cut.context.table.cut
    plain.close()
    cut.close()


def keys_of(session: Session) -> dict[int, torch.Tensor]:
    """Keys of every frame that is held."""
    pool = session.context.pool
    return {entry.frame: pool.keys(entry.page).clone() for entry in session.context.table}


@pytest.mark.parametrize("line", ["recent=all", "sink=1,recent=9", "sink=1,recent=9:int8"])
def test_recaching_the_whole_history_under_its_own_prompt_changes_nothing(
    world: World, wide: World, line: str
) -> None:
    for some in (world, wide):
        with some.session("red brick, day", seed=2, cache=line) as session:
            played(session, 3)
            session.settle()
            before = keys_of(session)
            session.recache()
            after_it = keys_of(session)
            assert before.keys() == after_it.keys()
            assert all(torch.equal(before[frame], after_it[frame]) for frame in before)


def test_a_change_of_prompt_recaches_or_flushes_where_the_cache_says_so(world: World) -> None:
    made = {}
    for rule in ("keep", "flush", "recache"):
        line = f"sink=1,recent=3,prompt={rule}"
        with world.session("red brick, day", seed=1, cache=line) as session:
            played(session, 6)
            session.control(prompt="night, fog")
            made[rule] = session.step()
            made[f"{rule}, then"] = session.step()
            frames = frames_read(session)
            assert frames == ([0, 5, 6] if rule == "flush" else [0, 4, 5, 6])
        with world.session("red brick, day", seed=1, cache=line) as session:
            played(session, 6)
            getattr(session, rule, lambda: None)()  # under the same prompt
            made[f"{rule}, same prompt"] = session.step()
    assert not torch.equal(made["keep"].latents, made["recache"].latents)
    assert not torch.equal(made["keep"].latents, made["flush"].latents)
    assert made["keep, then"].applied.prompt == "night, fog"


@pytest.mark.parametrize("rule", ["flush", "recache"])
@pytest.mark.parametrize("before", ["settle", "fork", "give", "nothing"])
def test_the_rule_holds_however_the_prompt_comes(world: World, rule: str, before: str) -> None:
    """Whether the block before is settled yet makes no difference, nor does a fork."""
    line = f"sink=1,recent=3,prompt={rule}"

    def changed(how: str) -> torch.Tensor:
        session = world.session("red brick, day", seed=1, cache=line)
        played(session, 6)
        if how == "settle":
            session.settle()
        if how == "fork":
            twin = session.fork()
            session.close()
            session = twin
        session.control(prompt="night, fog")
        if how == "give":
            session.decode(session.give(torch.zeros(world.latent_shape), [frozenset()]))
            session.control(prompt="night, fog")
        made = session.step()
        frames = frames_read(session)
        session.close()
        assert (frames[1] >= 5) == (rule == "flush")
        return made.latents

    if before == "give":
        changed(before)
    else:
        assert torch.equal(changed(before), changed("nothing"))


def test_a_recache_keeps_cuts_where_they_were(world: World) -> None:
    """Those that are to come, and those under which blocks were made."""
    with world.session("red brick, day", seed=1, cache="sink=1,recent=4") as session:
        played(session, 4)
        session.cut()
        session.step()
        session.settle()
        before = keys_of(session)
        session.cut()
        session.recache()
        assert session.context.table.cut
    with world.session("red brick, day", seed=1, cache="recent=9") as session:
        played(session, 3)
        session.cut()
        played(session, 2)
        session.settle()
        before = keys_of(session)
        session.recache()
        after_it = keys_of(session)
        assert all(torch.equal(before[frame], after_it[frame]) for frame in before)


def test_a_cut_in_the_middle_of_a_block_comes_with_its_prompt() -> None:
    prompts = parse_prompts("red brick[1s] | night[1s#]", 4.0)  # the second from frame 4 on
    script = Script(prompts, ())
    starts = range(0, 12, 3)
    assert [script.cuts(start, 3) for start in starts] == [False, False, True, False]
    assert [script.prompt(start) for start in starts] == ["red brick"] * 2 + ["night"] * 2


def test_a_session_of_a_world_that_was_cast_says_so() -> None:
    world = random_world()
    session = world.session()
    played(session, 2)
    world.to(torch.bfloat16)
    for act in (session.step, session.cut, session.recache, session.fork):
        with pytest.raises(ValueError, match="moved or cast since this session began"):
            act()
    session.close()
    assert world.pool.nbytes == 0
    with world.session() as fresh:
        pages = world.pool.addresses()
        played(fresh, 8)
        assert world.pool.addresses() == pages


def test_recached_frames_are_those_of_the_new_prompt(wide: World) -> None:
    """Each block again over what was committed anew before it; the sink stays what it was."""
    line = "window=10,sink=1"
    with wide.session("red brick, day", seed=4, cache=line) as session:
        blocks = played(session, 4)
        session.settle()
        first = keys_of(session)
        session.control(prompt="hedge, night")
        session.recache()
        held = keys_of(session)
    with wide.session("red brick, day", seed=4, cache=line) as other:
        played(other, 2)
        other.settle()
        other.context.on_event(Event.REOPEN)
        other.control(prompt="hedge, night")
        for block in blocks[2:]:
            other.give(block.latents, block.applied.keys)
            other.settle()
        expected = keys_of(other)
    assert sorted(held) == sorted(expected) == [0, 6, 7, 8, 9, 10, 11]
    assert all(torch.equal(held[frame], expected[frame]) for frame in held)
    assert torch.equal(held[0], first[0])
    assert not torch.equal(held[6], first[6])


def test_a_script_cuts_where_it_says(world: World) -> None:
    """``#`` begins a new scene with its prompt; without it the same prompts go on."""
    plain = list(world.stream("red brick[1s] | night[1s]", SCRIPT, blocks=7))
    cut = list(world.stream("red brick[1s] | night[1s#]", SCRIPT, blocks=7))
    same = [torch.equal(a.latents, b.latents) for a, b in zip(plain, cut, strict=True)]
    assert same[:4] == [True] * 4 and not any(same[4:])
    first = list(islice(world.stream("night[1s#] | red brick[1s]", SCRIPT, blocks=3), 3))
    assert len(first) == 3, "the first scene begins anyway"


def test_a_closed_session_says_so(world: World) -> None:
    session = world.session()
    played(session, 2)
    session.close()
    for act in (session.step, session.flush, session.fork):
        with pytest.raises(ValueError, match="this session is closed"):
            act()
    session.close()  # twice is fine


def test_a_cache_that_does_not_fit_is_told(world: World) -> None:
    before = world.pool.nbytes
    with pytest.raises(ValueError, match=r"cache: no memory for .* pages .* GiB.: keep fewer"):
        world.session(cache="recent=9999999999")
    assert world.pool.nbytes == before
    with world.session(cache="recent=3") as session:
        played(session, 5)


def test_a_letter_is_no_key_code(world: World) -> None:
    with (
        world.session() as session,
        pytest.raises(ValueError, match="unknown key 'W'; write 'KeyW'"),
    ):
        session.control(buttons={"W"})
