"""Mid forms: against attention written out by hand; and the lines that ask for them."""

import math

import pytest
import torch
from torch import Tensor

from worldsim.cache.camera import Camera
from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context, Event
from worldsim.cache.mid import ASKING
from worldsim.cache.policy import Read
from worldsim.cache.pool import PageKind, PagePool, PageShape
from worldsim.models.attention import softmax_attention
from worldsim.models.context import Rows
from worldsim.models.rope import rotate, rotation, token_positions
from worldsim.models.view import ContextView

GRID = (2, 3)
SHAPE = PageShape(layers=2, heads=2, grid=GRID, head_dim=16)
CAMERA = Camera(field_of_view=math.pi / 2, reach=4.0, period=16.0)
LINES = (
    "recent=4",
    "sink=2,recent=4",
    "sink=2,mid=4:pool,recent=4",
    "sink=1,mid=2:participative,recent=3",
    "sink=1,mid=2:topk,bank=5,recent=2",
    "mid=2:pose,bank=6,recent=2",
    "sink=2:int8,recent=4:int4",
    "sink=1,mid=4:pool:int8,recent=3:int4h",
    "sink=1:int4,mid=2:topk:int4,bank=4,recent=2",
)


def context_of(line: str, block_frames: int = 1, dtype: torch.dtype = torch.float32) -> Context:
    config = CacheConfig.parse(line, block_frames)
    pool = PagePool(SHAPE, dtype, torch.device("cpu"))
    context = Context(pool, config, CAMERA)
    pool.reserve(context.needs(block_frames))
    return context


def rows(first: int, count: int, salt: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and queries of some frames, named by the first of them."""
    generator = torch.Generator().manual_seed(1000 * salt + first)
    size = (SHAPE.layers, SHAPE.heads, count * SHAPE.tokens, SHAPE.head_dim)
    keys, values, queries = (torch.randn(size, generator=generator) for _ in range(3))
    return keys, values, queries


def pose_of(frame: int) -> tuple[float, float, float]:
    return (0.5 * frame % 16, 3.0, 0.3 * frame)


def put(context: Context, block: int, n: int = 1, only: set[int] | None = None) -> None:
    frames = range(block * n, block * n + n)
    context.stage(block, -1, frames, *rows(frames[0], n), poses=[pose_of(f) for f in frames])
    context.commit(block, -1, only)


# --- attention ------------------------------------------------------------------------------------
def by_hand(context: Context, read: Read, layer: int) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of one page, token after token."""
    pool, entry = context.pool, read.entry
    keys, values = (x[layer] for x in pool.read((entry.page,), tokens=entry.tokens))
    height, width = GRID
    at = []
    for token in range(keys.shape[1]):
        if entry.tokens is not None:
            place = int(pool.places(entry.page)[layer, token])
            frame, cell = divmod(place, SHAPE.tokens)
            time = frame + read.position if read.own else read.position + token // SHAPE.tokens
            at.append((time, cell // width, cell % width))
        elif entry.span == 2:
            row, column = divmod(token, math.ceil(width / 2))
            sides = ((row, height), (column, width))
            middle = [(2 * i + min(side - 1, 2 * i + 1)) / 2 for i, side in sides]
            at.append((read.position + 0.5, *middle))
        else:
            at.append((read.position, token // width, token % width))
    cos, sin = rotation(torch.tensor(at, dtype=torch.float64), SHAPE.head_dim, torch.float32)
    return rotate(keys, cos, sin), values


@pytest.mark.parametrize(
    "line",
    (
        "sink=1,recent=5",
        "sink=2,recent=0",
        "recent=all",
        "sink=1,mid=4:pool,recent=3,positions=packed",
        "sink=1,mid=2:pose,bank=4,recent=3",
    ),
)
def test_what_is_foreseen_is_what_is_committed(line: str) -> None:
    """Also after a try that was given up; it takes no page more than was promised."""
    n = 2
    straight, foreseeing = context_of(line, n), context_of(line, n)
    made = foreseeing.pool.nbytes
    for block in range(9):
        put(straight, block, n)
        frames = range(block * n, block * n + n)
        poses = [pose_of(frame) for frame in frames]
        before = foreseeing.table
        for given_up in (True, False):
            assert foreseeing.can_foresee(n)
            after = foreseeing.foresee(block, -1, frames, poses)
            assert foreseeing.table == before and foreseeing.newest == (
                block - 1 if block else None
            )
            if given_up:
                foreseeing.abort(block)
                assert foreseeing.pool.used_pages == len(before)
        keys, values, _ = rows(frames[0], n)
        foreseeing.stage(block, -1, frames, keys, values, poses=poses)
        foreseeing.commit(block, -1)
        assert foreseeing.table == after
        mine, theirs = foreseeing.plan(frames.stop, n), straight.plan(frames.stop, n)
        assert mine.query_positions == theirs.query_positions
        for one, other in zip(mine.reads, theirs.reads, strict=True):
            assert (one.entry.frame, one.position) == (other.entry.frame, other.position)
            for pages in ("keys", "values"):
                own = getattr(foreseeing.pool, pages)(one.entry.page)
                assert torch.equal(own, getattr(straight.pool, pages)(other.entry.page))
    assert line == "recent=all" or foreseeing.pool.nbytes == made
    foreseeing.abort(8)
    assert foreseeing.table == before, "a commit that was foreseen can be taken back as any other"
    foreseeing.close()
    assert foreseeing.pool.used_pages == 0


@pytest.mark.parametrize(
    "line",
    ("recent=3:int8", "mid=2:topk,recent=3", "mid=2:participative,recent=3", "mid=2:pool,recent=1"),
)
def test_what_depends_on_the_frames_themselves_is_not_foreseen(line: str) -> None:
    assert not context_of(line, 2).can_foresee(2)


@pytest.mark.parametrize("positions", ["absolute", "packed"])
@pytest.mark.parametrize("line", LINES)
def test_a_view_reads_what_a_plan_says(line: str, positions: str) -> None:
    """Buffers, runs and re-alignment against everything rotated by itself and joined."""
    n = 2
    context = context_of(f"{line},positions={positions}", n)
    view = ContextView(context, n)
    assert view.nbytes == ContextView.bytes_needed(context, n)
    most = ContextView.rows_needed(context, n)
    reads_of_mid = 0
    for block in range(9):
        start = block * n
        if block == 6:
            context.on_event(Event.CUT)
        if block == 8:
            context.on_event(Event.FLUSH)
        view.prepare(start, n, pose_of(start))
        plan = context.plan(start, n, pose_of(start))
        reads_of_mid += sum(read.entry not in (*context.table.sink, *context.table.recent)
                            for read in plan.reads)  # fmt: skip
        k, v, q = rows(start, n, salt=3)
        own = rotation(
            token_positions(torch.tensor(plan.query_positions), *GRID), 16, torch.float32
        )
        for layer in (1, 0, 1):
            parts = [by_hand(context, read, layer) for read in plan.reads]
            keys = torch.cat([rotate(k[layer], *own)] + [part[0] for part in parts], dim=1)
            values = torch.cat([v[layer]] + [part[1] for part in parts], dim=1)
            assert keys.shape[1] <= most + n * SHAPE.tokens
            expected = softmax_attention(rotate(q[layer], *own), keys, values)
            attended = view.attend(layer, q[None, layer], k[None, layer], v[None, layer])[0]
            assert (attended - expected).abs().max() <= 1e-6
        put(context, block, n)
    assert bool(reads_of_mid) == ("mid" in line)
    assert view.nbytes == ContextView.bytes_needed(context, n), "nothing grew"


@pytest.mark.parametrize("line", LINES)
def test_pages_are_what_was_promised(line: str) -> None:
    for n in (1, 3):
        context = context_of(line, n)
        slabs = context.pool.addresses()
        held = []
        for block in range(40):
            put(context, block, n)
            held.append(context.pool.used_pages)
            context.stage(block + 1, -1, range((block + 1) * n, (block + 2) * n), *rows(0, n))
            twice = context.fork()
            twice.close()
            if block % 7 == 0:
                context.abort(block)
                put(context, block, n)
        assert context.pool.addresses() == slabs, "nothing was allocated while it ran"
        assert max(held[-20:]) == max(held[-3:]), "it does not grow"
        context.close()
        assert context.pool.used_pages == 0


@pytest.mark.parametrize("line", LINES)
def test_where_in_time_a_stream_is_makes_no_difference(line: str) -> None:
    """A million latent frames on, attention is the same: only differences of positions matter."""
    far = 10**6
    outs = []
    for shift in (0, far):
        context = context_of(f"{line},positions=packed")
        view = ContextView(context, 1)
        for block in range(shift, shift + 12):
            view.prepare(block, 1, pose_of(block - shift))
            k, v, q = rows(block - shift, 1)
            out = view.attend(0, q[None, 0], k[None, 0], v[None, 0])
            context.stage(block, -1, [block], k, v, q, poses=[pose_of(block - shift)])
            context.commit(block, -1)
        outs.append(out)
    assert outs[1].isfinite().all()
    assert (outs[0] - outs[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("line", LINES)
def test_what_is_unused_never_shows(line: str) -> None:
    """Pages nobody wrote, rows of pages that are not valid, and slots that are not read hold NaN
    (or codes that mean the largest number)."""
    outs = []
    for poisoned in (False, True):
        context = context_of(line)
        view = ContextView(context, 1)
        if poisoned:
            for page in context.pool._pages:
                for part in (page.codes, page.scales):
                    if part is not None:
                        part.fill_(math.nan if part.is_floating_point() else 255)
            for buffer in (*view._keys, *view._values, *(x for part in view.staging for x in part)):
                buffer.fill_(math.nan)
        for block in range(14):
            view.prepare(block, 1, pose_of(block))
            k, v, q = rows(block, 1)
            outs.append(view.attend(1, q[None, 1], k[None, 1], v[None, 1]))
            put(context, block)
    clean, dirty = outs[:14], outs[14:]
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


# --- each form ------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [(2, 4), (3, 5)])
def test_pooled_pages_are_means_over_cells(grid: tuple[int, int]) -> None:
    shape = PageShape(layers=2, heads=1, grid=grid, head_dim=8)
    pool = PagePool(shape, torch.float32, torch.device("cpu"))
    context = Context(pool, CacheConfig.parse("mid=2:pool,recent=1", 1))
    made = [torch.randn(2, 1, shape.tokens, 8) for _ in range(3)]
    for frame, keys in enumerate(made):
        context.stage(frame, -1, [frame], keys, -keys)
        context.commit(frame, -1)
    (entry,) = context.table.mid.bank
    assert (entry.frame, entry.span) == (0, 2)
    both = torch.stack(made[:2]).unflatten(3, grid)  # [2, L, H, h, w, D]
    cells = [
        both[..., i : i + 2, j : j + 2, :].mean((0, 3, 4))
        for i in range(0, grid[0], 2)
        for j in range(0, grid[1], 2)
    ]
    assert torch.allclose(pool.keys(entry.page), torch.stack(cells, dim=2), atol=1e-6)
    assert torch.allclose(pool.values(entry.page), -torch.stack(cells, dim=2), atol=1e-6)


def test_participation_keeps_the_tokens_that_are_asked_for_most() -> None:
    context = context_of("mid=2:participative,recent=2")
    kept: list[list[tuple[float, int]]] = [[] for _ in range(SHAPE.layers)]
    for block in range(9):
        put(context, block)
        if block < 2:
            continue
        asked = sum(rows(b, 1)[2].sum(2) for b in range(max(0, block - ASKING + 1), block + 1))
        for layer in range(SHAPE.layers):
            places = [place for _, place in kept[layer]]
            places += range((block - 2) * SHAPE.tokens, (block - 1) * SHAPE.tokens)
            scored = []
            for place in places:
                frame, token = divmod(place, SHAPE.tokens)
                key = rows(frame, 1)[0][layer, :, token]
                scored.append((float((asked[layer] * key).sum()), place))
            best = sorted(scored, reverse=True)[: 2 * SHAPE.tokens]
            kept[layer] = sorted(best, key=lambda item: item[1])
        (entry,) = context.table.mid.bank
        assert entry.tokens == len(kept[0])
        for layer in range(SHAPE.layers):
            places = context.pool.places(entry.page)[layer, : entry.tokens].tolist()
            assert places == [place for _, place in kept[layer]], "chronological, each once"
            keys = context.pool.keys(entry.page)[layer]
            for i, place in enumerate(places):
                frame, token = divmod(place, SHAPE.tokens)
                assert torch.equal(keys[:, i], rows(frame, 1)[0][layer, :, token])


def test_topk_reads_the_frames_with_the_highest_mean_product() -> None:
    context = context_of("sink=1,mid=2:topk,bank=4,recent=2")
    for block in range(12):
        put(context, block)
    assert [entry.frame for entry in context.table.mid.bank] == [6, 7, 8, 9]
    queries = torch.cat([rows(b, 1)[2] for b in range(12 - ASKING, 12)], dim=2)
    score = {
        frame: float(torch.einsum("lhqd,lhkd->", queries, rows(frame, 1)[0]))
        for frame in range(6, 10)
    }
    best = sorted(sorted(score, key=lambda frame: -score[frame])[:2])
    chosen = [entry.frame for entry in context.table.mid.chosen]
    assert chosen == best
    # Denoising changes nothing: the plan is the same for every step of a block.
    plan = context.plan(12, 1)
    for level in range(3):
        context.stage(12, level, [12], *rows(12, 1, salt=level))
        assert context.plan(12, 1) == plan
    assert {0, 10, 11} <= {read.entry.frame for read in plan.reads}, "sink and recent stay"


def test_a_bank_that_is_read_whole_is_a_longer_window() -> None:
    whole, window = context_of("mid=4:topk,bank=4,recent=2"), context_of("recent=6")
    for block in range(11):
        for context in (whole, window):
            put(context, block)
    frames = [sorted(read.entry.frame for read in c.plan(11, 1).reads) for c in (whole, window)]
    assert frames[0] == frames[1]


def test_retrieval_by_pose_finds_the_view_again() -> None:
    context = context_of("mid=1:pose,bank=20,recent=2")
    for block in range(18):
        put(context, block)
    for frame in (3, 8, 14):
        plan = context.plan(18, 1, pose_of(frame))
        mid = [read.entry.frame for read in plan.reads if read.entry.frame < 16]
        assert mid == [frame]
    assert len(context.plan(18, 1, None).reads) == 2  # who has no pose retrieves nothing


def test_overlap_of_views() -> None:
    here = (1.0, 1.0, 0.0)
    others = [
        here,
        (1.0, 1.0, math.pi),  # the back turned
        (1.0, 1.0, math.pi / 4),  # half of it
        (15.0, 1.0, 0.0),  # two cells behind, across the seam
        (8.0, 9.0, 0.0),  # somewhere else
        (1.0, 1.0, 2 * math.pi),
    ]
    overlap = CAMERA.overlap(here, others)
    assert overlap[0] == pytest.approx(overlap[5]) == overlap.max()
    assert overlap[1] == overlap[4] == 0
    assert 0.3 < overlap[2] / overlap[0] < 0.7
    assert 0 < overlap[3] < overlap[0]


# --- configuration --------------------------------------------------------------------------------
@pytest.mark.parametrize("line", LINES)
def test_lines_are_read_back(line: str) -> None:
    config = CacheConfig.parse(line, 1)
    assert CacheConfig.parse(config.line(), 1) == config


def test_a_deep_sink_is_a_share_of_the_window() -> None:
    config = CacheConfig.parse("window=21,sink=50%,positions=packed", 3)
    assert (config.sink, config.recent) == (10, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mid=4,recent=2", "mid needs frames and a form, as in mid=8:pool"),
        ("mid=0:pool,recent=2", "mid needs frames and a form"),
        ("mid=4:best,recent=2", "mid knows no 'best'; after a ':' comes one of pool, particip"),
        ("recent=4:pool", "recent knows no 'pool'; after a ':' comes one of full, int8, int4"),
        ("sink=3:,recent=2", "sink knows no ''; after a ':' comes one of full"),
        ("recent=9:int4:int8", "recent has two formats: int4 and int8"),
        ("mid=4:pool:topk,recent=3", "mid has two forms: pool and topk"),
        ("mid=0:int8,recent=2", "mid holds no frames to store as int8"),
        ("sink=0:int4,recent=2", "sink holds no frames to store as int4"),
        ("window=21:int4", "a window has no format: write recent=9:int4 instead"),
        ("re cent=3", "cannot read 're cent=3'"),
        ("mid=2:topk,bank=0,recent=2", "bank=0 is less than the mid=2 read of it"),
        ("window=21,sink=101%", "sink=101%: a share is 0…100 %"),
        ("mid=3:pool,recent=2", "mid=3:pool must be a multiple of 2"),
        ("mid=4:pool", "mid takes what leaves recent, and recent=all keeps it all"),
        ("mid=4:pool,recent=0", "mid takes what leaves recent: keep 1 or more frames there"),
        ("mid=4:pool,bank=9,recent=2", "bank is for mid forms that choose: topk, pose"),
        ("mid=4:topk,bank=3,recent=2", "bank=3 is less than the mid=4 read of it"),
        ("mid=4:participative:int8,recent=2", "a participative mid is stored in full"),
        ("mid=4:topk:int8,recent=2:int4", "a page is quantised once, so mid must be int4"),
        ("sink=50%,recent=2", "sink=50% is a share of a window: write window=21,sink=50%"),
        ("recent=3,prompt=forget", "prompt must be one of keep, flush, recache, got 'forget'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cache: {message}") as error:
        CacheConfig.parse(line, 1)
    assert "\n" not in str(error.value)


def test_a_world_without_poses_cannot_retrieve_by_them() -> None:
    pool = PagePool(SHAPE, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a world whose controls give a pose"):
        Context(pool, CacheConfig.parse("mid=2:pose,recent=2", 1))
    assert pool.nbytes == 0


def test_a_config_made_in_code_is_checked_as_well() -> None:
    with pytest.raises(ValueError, match=r"recent must be a whole number, 0 or more, got 2\.5"):
        CacheConfig(recent=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="formats are those of sink, mid, recent"):
        CacheConfig(formats=("full", "full"))  # type: ignore[arg-type]


def test_several_sessions_of_different_forms_are_one_batch() -> None:
    views = [ContextView(context_of(line), 1) for line in ("recent=2", LINES[4])]
    rows_of = Rows(views)
    k, v, q = (x[0][None].expand(2, -1, -1, -1) for x in rows(0, 1))
    assert rows_of.asks
    rows_of.stage(0, q, k, v)
    assert [len(view.staged(1)) for view in views] == [2, 3]


def test_queries_are_those_of_the_newest_frames_each_once() -> None:
    context = context_of("sink=1,mid=2:topk,bank=5,recent=2")
    for block in range(9):
        put(context, block)
    before = [frame for frame, _ in context.table.queries]
    context.on_event(Event.REOPEN)
    for block in (7, 8):
        put(context, block, only={7, 8})
    assert before == [frame for frame, _ in context.table.queries] == [5, 6, 7, 8]


def test_formats_are_those_of_their_partition() -> None:
    context = context_of("sink=1:int8,mid=2:topk:int4,bank=3,recent=2")
    for block in range(8):
        put(context, block)
    kinds = {
        part: {context.pool.kind(entry.page) for entry in entries}
        for part, entries in (
            ("sink", context.table.sink),
            ("mid", context.table.mid.bank),
            ("recent", context.table.recent),
        )
    }
    assert kinds == {
        "sink": {PageKind(6, "int8")}, "mid": {PageKind(6, "int4")}, "recent": {PageKind(6)},
    }  # fmt: skip
