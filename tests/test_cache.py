"""The context: what is kept, where it is read, and that pages are counted exactly."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context
from worldsim.cache.policy import Entry, Table, admit, plan
from worldsim.cache.pool import PagePool, PageShape
from worldsim.models.attention import softmax_attention
from worldsim.models.rope import rotate, rotation, token_positions
from worldsim.models.view import ContextView

GRID = (2, 3)
SHAPE = PageShape(layers=2, heads=2, grid=GRID, head_dim=16)
CLEAN = -1


# --- configuration ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "block_frames", "config"),
    [
        ("recent=all", 3, CacheConfig()),
        ("sink=2,recent=all", 3, CacheConfig(sink=2)),
        ("sink=2, recent=10", 3, CacheConfig(recent=10, sink=2)),
        ("recent=0,positions=packed", 1, CacheConfig(recent=0, positions="packed")),
        ("window=12,sink=3", 3, CacheConfig(recent=6, sink=3)),
        ("window=6", 3, CacheConfig(recent=3)),
        ("window=4,sink=1", 3, CacheConfig(recent=0, sink=1)),
    ],
)
def test_parse_and_round_trip(line: str, block_frames: int, config: CacheConfig) -> None:
    assert CacheConfig.parse(line, block_frames) == config
    assert CacheConfig.parse(config.line(), block_frames) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "cannot read ''"),
        ("recent", "cannot read 'recent'"),
        ("recents=3", "cannot read 'recents=3'.*fields: sink, mid, bank, recent, window, pos"),
        ("sink=1,sink=2", "sink is given twice"),
        ("sink=3", "beside sink=3 say what else is kept: recent=9, or recent=all"),
        ("window=9,recent=3", "give recent or window, not both"),
        ("recent=-1", "recent must be a whole number of latent frames, got '-1'"),
        ("recent=²", "recent must be a whole number of latent frames, got '²'"),
        ("sink=1.5", "sink must be a whole number of latent frames, got '1.5'"),
        ("window=all", "window must be a whole number"),
        ("window=5,sink=3", "window=5 is too small for sink=3 and a block of 3.* at least 6"),
        ("positions=relative", "positions must be one of absolute, packed, got 'relative'"),
    ],
)
def test_parse_errors_are_one_clear_line(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cache: {message}") as error:
        CacheConfig.parse(line, 3)
    assert "\n" not in str(error.value)


def test_construction_errors() -> None:
    with pytest.raises(ValueError, match="sink must be a whole number, 0 or more, got -1"):
        CacheConfig(sink=-1)
    with pytest.raises(ValueError, match="recent must be a whole number, 0 or more, got -2"):
        CacheConfig(recent=-2)


# --- policy -----------------------------------------------------------------------------------
def kept_frames(frames: int, config: CacheConfig) -> list[int]:
    """The definition: the first ``sink`` frames, and the last ``recent`` of the others."""
    sink, rest = list(range(frames))[: config.sink], list(range(frames))[config.sink :]
    return sink + (rest if config.recent is None else rest[max(0, len(rest) - config.recent) :])


def test_policy_against_its_definition() -> None:
    draw = random.Random(0)
    left_at_all = 0
    for _ in range(500):
        config = CacheConfig(
            recent=draw.choice([None, 0, 1, 2, 3, 4, 5, 7, 9]),
            sink=draw.choice([0, 1, 3]),
            positions=draw.choice(["absolute", "packed"]),
        )
        table = Table()
        start, pages = 0, iter(draw.sample(range(1000), 200))
        for _ in range(draw.randint(1, 12)):
            block = draw.choice([1, 2, 3])
            new = tuple(Entry(start + i, next(pages)) for i in range(block))
            before = table
            table, left = admit(before, new, config)
            start += block
            frames = [entry.frame for entry in table]
            assert sorted(frames) == kept_frames(start, config)
            # Nothing is lost and nothing is kept twice.
            assert set(table) | set(left) == set(before) | set(new)
            assert len(table) + len(left) == len(before) + len(new)
            left_at_all += len(left)
            # A ring: what stays, stays in its slot, so it is never written again.
            for part in ("sink", "recent"):
                for slot, entry in enumerate(getattr(before, part)):
                    assert getattr(table, part)[slot] == entry or entry in left
            reads = plan(table, (), start, block, config)
            assert [read.entry for read in reads.reads] == list(table)
            assert reads.query_positions == tuple(range(start, start + block))
            positions = [read.position for read in reads.reads]
            if config.positions == "absolute":
                assert positions == frames
            else:  # contiguous in the order of time, ending right before the block
                by_time = [p for _, p in sorted(zip(frames, positions, strict=True))]
                assert by_time == list(range(start - len(frames), start))
    assert left_at_all > 1000


def test_packed_moves_the_sink_alone() -> None:
    sink, recent = (tuple(Entry(n, n) for n in frames) for frames in ((0, 1), (8, 9)))
    config = CacheConfig(recent=2, sink=2, positions="packed")
    reads = plan(Table(sink, recent), (), 10, 1, config)
    assert [read.position for read in reads.reads] == [6, 7, 8, 9]


# --- Self-Forcing's rolling cache -----------------------------------------------------------------
def self_forcing(blocks: int, n: int, size: int, sink: int) -> list[list[int]]:
    """Frames that each pass attends to, by the token arithmetic of golden/README.md, section 5.

    One token a frame, holding the frame's index; five passes a block, as in the reference.
    """
    cache = [-1] * size
    global_end = local_end = 0
    attended = []
    for block in range(blocks):
        start = block * n
        for _ in range(5):
            end = start + n
            if end > global_end and local_end + n > size:
                evict = local_end + n - size
                keep = local_end - evict - sink
                cache[sink : sink + keep] = cache[sink + evict : sink + evict + keep]
                filled = local_end + (end - global_end) - evict
            else:
                filled = local_end + (end - global_end)
            cache[filled - n : filled] = range(start, end)
            attended.append(cache[:filled])
            global_end, local_end = end, filled
    return attended


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("window", [5, 6, 7, 9])
def test_windows_are_those_of_self_forcing(window: int, sink: int) -> None:
    line, n, blocks = f"window={window},sink={sink}", 3, 9
    if window < sink + n:  # the reference computes a negative length there
        with pytest.raises(ValueError, match="too small"):
            CacheConfig.parse(line, n)
        return
    config = CacheConfig.parse(line, n)
    theirs = self_forcing(blocks, n, window, sink)
    context = Context(small_pool(), config)
    for block in range(blocks):
        reads = context.plan(block * n, n)
        attended = sorted([entry.frame for entry in context.table] + list(reads.query_positions))
        for each_pass in theirs[5 * block : 5 * block + 5]:
            assert attended == each_pass
        # Absolute positions: nobody is ever re-rotated, the sink included.
        assert all(read.position == read.entry.frame for read in reads.reads)
        put(context, block, n)


# --- pages ------------------------------------------------------------------------------------
def small_pool(pages: int = 0) -> PagePool:
    pool = PagePool(SHAPE, torch.float32, torch.device("cpu"))
    pool.reserve({pool.frame: pages})
    return pool


def rows(frames: Sequence[int], salt: int = 0) -> tuple[Tensor, Tensor]:
    """K/V of some frames; every page's content says which frame and which try it is."""
    generator = torch.Generator().manual_seed(1000 * salt + frames[0])
    shape = (SHAPE.layers, SHAPE.heads, len(frames) * SHAPE.tokens, SHAPE.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def put(context: Context, block: int, n: int, salt: int = 0) -> None:
    """Stage and commit block ``block`` of ``n`` frames."""
    frames = range(block * n, block * n + n)
    context.stage(block, CLEAN, frames, *rows(frames, salt))
    context.commit(block, CLEAN)


def contents(context: Context) -> dict[int, tuple[Tensor, Tensor]]:
    pool = context.pool
    return {
        e.frame: (pool.keys(e.page).clone(), pool.values(e.page).clone()) for e in context.table
    }


def same(left: dict[int, tuple[Tensor, Tensor]], right: dict[int, tuple[Tensor, Tensor]]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(a, b) for frame in left for a, b in zip(left[frame], right[frame], strict=True)
    )


def test_a_commit_publishes_what_was_staged() -> None:
    context = Context(small_pool(), CacheConfig())
    put(context, 0, 2)
    keys, values = rows(range(2))
    for frame, (k, v) in contents(context).items():
        part = slice(frame * SHAPE.tokens, (frame + 1) * SHAPE.tokens)
        assert torch.equal(k, keys[:, :, part])
        assert torch.equal(v, values[:, :, part])


def test_staging_never_touches_what_is_committed() -> None:
    context = Context(small_pool(), CacheConfig(recent=2))
    put(context, 0, 2)
    table, before = context.table, contents(context)
    for level in (0, 1, CLEAN):
        context.stage(1, level, [2, 3], *rows([2, 3], level + 5))
    assert context.table == table
    assert same(contents(context), before)
    assert context.pool.used_pages == 2 + 3 * 2
    context.stage(1, 0, [2, 3], *rows([2, 3], 9))  # the same key again replaces it
    assert context.pool.used_pages == 2 + 3 * 2
    with pytest.raises(KeyError):
        context.commit(1, 7)
    context.commit(1, 1)  # one level is published, the block's others are dropped
    assert context.pool.used_pages == 2 + 2  # and the evicted ones wait for a possible abort
    keys, _ = rows([2, 3], 6)
    assert torch.equal(contents(context)[3][0], keys[:, :, SHAPE.tokens :])
    context.close()
    assert context.pool.used_pages == 0


def test_used_pages_are_exact_for_random_lives() -> None:
    draw = random.Random(1)
    for _ in range(100):
        n = draw.choice([1, 2, 3])
        config = CacheConfig(recent=draw.choice([None, 0, 1, 2, 5]), sink=draw.choice([0, 1, 3]))
        context = Context(small_pool(), config)
        held = published = 0  # in the table; evicted by the newest commit, but not let go yet
        block = 0
        for _ in range(draw.randint(1, 12)):
            act = draw.choice(["commit", "commit", "stage", "retry"])
            if act == "stage":
                context.stage(block, 0, range(block * n, block * n + n), *rows(range(n)))
                assert context.pool.used_pages == held + published + n
                context.abort(block)
            else:
                before = contents(context)
                kept = kept_frames(block * n, config)
                put(context, block, n)
                if act == "retry":
                    context.abort(block)
                    assert sorted(before) == kept
                    assert same(contents(context), before)
                    assert context.pool.used_pages == len(kept)
                    put(context, block, n, salt=1)
                after = kept_frames((block + 1) * n, config)
                held, published = len(after), len(set(kept) - set(after))
                block += 1
            assert context.pool.used_pages == held + published
        context.close()
        assert context.pool.used_pages == 0


def test_abort_restores_the_table_and_drops_later_work() -> None:
    context = Context(small_pool(), CacheConfig(recent=3, sink=1))
    for block in range(3):
        put(context, block, 2)
    table, before, used = context.table, contents(context), context.pool.used_pages
    context.abort(3)  # nothing there yet: nothing happens
    assert (context.table, context.pool.used_pages) == (table, used)
    put(context, 3, 2)
    context.stage(4, 0, [8, 9], *rows([8, 9]))
    context.stage(5, 0, [10, 11], *rows([10, 11]))
    context.abort(3)
    assert context.table == table
    assert same(contents(context), before)
    assert context.pool.used_pages == len(table)
    with pytest.raises(KeyError):
        context.commit(4, 0)


def test_abort_further_back_than_one_commit_is_refused() -> None:
    context = Context(small_pool(), CacheConfig())
    for block in range(3):
        put(context, block, 1)
    table = context.table
    for block in (0, 1):
        with pytest.raises(ValueError, match=f"cannot abort block {block}: block 2 is committed"):
            context.abort(block)
    context.abort(2)
    with pytest.raises(ValueError, match="cannot abort block 1: block 1 is committed"):
        context.abort(1)  # that commit was not kept: saying nothing would leave it in the table
    assert context.table.recent == table.recent[:2]
    twin = context.fork()
    with pytest.raises(ValueError, match="cannot abort block 1"):
        twin.abort(1)  # a twin begins with what there is


def test_forks_share_pages_and_go_their_own_way() -> None:
    pool = small_pool()
    context = Context(pool, CacheConfig(recent=3, sink=1))
    for block in range(4):
        put(context, block, 1)
    twin = context.fork()
    assert pool.used_pages == 4
    assert twin.table == context.table
    shared = contents(context)
    for block in range(4, 8):
        put(twin, block, 1, salt=1)
    assert same(contents(context), shared)
    # Ours 0…3; theirs 0 (the same page) and 5, 6, 7, and 4, which their last commit pushed out.
    assert pool.used_pages == 4 + 4
    put(context, 4, 1)
    assert not torch.equal(contents(context)[4][0], rows([4], 1)[0])
    context.close()
    assert pool.used_pages == 4 + 1  # page 0 lives on in the twin
    assert torch.equal(contents(twin)[0][0], shared[0][0])
    twin.abort(7)
    assert sorted(contents(twin)) == [0, 4, 5, 6]
    twin.close()
    assert pool.used_pages == 0


def test_two_thousand_commits_stay_where_they_are() -> None:
    config, n = CacheConfig(recent=7, sink=2, positions="packed"), 3
    pool = small_pool()
    context = Context(pool, config)
    pool.reserve(context.needs(n))
    view = ContextView(context, n)
    buffers = (*view._keys, *view._values, *(x for part in view.staging for x in part))
    pages, tensors = pool.addresses(), [buffer.data_ptr() for buffer in buffers]
    nbytes, k_v = (pool.nbytes, view.nbytes), rows(range(n))
    seen = set()
    for block in range(2000):
        frames = range(block * n, block * n + n)
        view.prepare(frames[0], n)
        assert [keys.data_ptr() for keys in view.keys] == tensors[: SHAPE.layers]
        view.context.stage(block, CLEAN, frames, *k_v)
        view.context.commit(block, CLEAN)
        seen.add(pool.used_pages)
    assert pool.addresses() == pages
    now = (*view._keys, *view._values, *(x for part in view.staging for x in part))
    assert [buffer.data_ptr() for buffer in now] == tensors
    assert (pool.nbytes, view.nbytes) == nbytes
    assert max(seen) + n == context.needs(n).total()  # reserved exactly what is needed


def test_pool_counts_and_bytes() -> None:
    pool = small_pool(3)
    assert pool.nbytes == 3 * 2 * 2 * 2 * 6 * 16 * 4
    pool.give_back({pool.frame: 3})
    pool.reserve({pool.frame: 3})  # the memory of a session that ended is there for the next
    assert len(pool.addresses()) == 1
    first = pool.acquire(pool.frame)
    pool.retain(first)
    pool.release(first)
    assert (pool.used_pages, pool.free_pages) == (1, 2)
    pool.release(first)
    assert (pool.used_pages, pool.free_pages) == (0, 3)
    with pytest.raises(AssertionError, match="not in use"):
        pool.release(first)
    with pytest.raises(AssertionError, match="not in use"):
        pool.retain(first)
    pool.reserve({pool.frame: 2})  # free pages are promised to another: these two are new
    assert (pool.free_pages, len(pool.addresses())) == (5, 2)


# --- what a block attends to --------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["absolute", "packed"])
def test_a_view_attends_to_the_kept_frames_at_their_positions(positions: str) -> None:
    """Ring, un-rotated store and re-alignment against keys sorted, rotated once and joined."""
    config, n = CacheConfig(recent=4, sink=2, positions=positions), 3
    view = ContextView(Context(small_pool(), config), n)
    slots_out_of_order = False
    for block in range(8):
        start = block * n
        view.prepare(start, n)
        held = {entry.frame: entry.page for entry in view.context.table}
        slots_out_of_order |= list(held) != sorted(held)
        kept = kept_frames(start, config)
        at = kept if positions == "absolute" else list(range(start - len(kept), start))
        q, _ = rows(range(start, start + n), salt=2)
        k, v = rows(range(start, start + n), salt=3)
        own = range(start, start + n)
        for layer in range(SHAPE.layers):
            pages = [held[frame] for frame in kept]
            all_keys = torch.cat([view.context.pool.keys(p)[layer] for p in pages] + [k[layer]], 1)
            values = torch.cat([view.context.pool.values(p)[layer] for p in pages] + [v[layer]], 1)
            turned = rotate(all_keys, *at_positions([*at, *own]))
            expected = softmax_attention(rotate(q[layer], *at_positions(own)), turned, values)
            attended = view.attend(layer, q[None, layer], k[None, layer], v[None, layer])[0]
            assert (attended - expected).abs().max() <= 1e-6
        put(view.context, block, n)
    assert slots_out_of_order


def at_positions(frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    positions = token_positions(torch.tensor(frames), *GRID)
    return rotation(positions, SHAPE.head_dim, torch.float32)


def test_a_block_longer_than_the_view_is_refused() -> None:
    view = ContextView(Context(small_pool(), CacheConfig(recent=2)), 2)
    with pytest.raises(ValueError, match=r"3 latent frames does not fit.*opened for 2"):
        view.prepare(0, 3)
