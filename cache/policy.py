"""Which frames a context keeps and at which temporal position they are read.

Pure functions over host metadata; no tensor is touched, no model is known. Entries of a partition
are in *slot* order: softmax does not care in which order its keys come, so an evicted frame's slot
is simply taken by the new one and nothing is ever moved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from worldsim.cache.config import CacheConfig

if TYPE_CHECKING:  # host metadata carries two small tensors along, and looks into neither
    from torch import Tensor

CUT = 27  # latent frames: ∞-RoPE puts the block after a cut, 18…20 of its window, at 45…47

Pose = tuple[float, ...]  # x, y, heading; a world may add numbers of its own


@dataclass(frozen=True)
class Entry:
    """One page of the context and what it stands for.

    Attributes:
        frame: absolute index of its (first) latent frame.
        page: the page that holds its K/V.
        span: latent frames that it stands for.
        tokens: of the page, only so many are valid; None: all.
        pose: where the player was at the end of the frame, in worlds that have poses.
        level: step index at which it was written, or -1: clean.
        summary: mean key of each layer and head ``[layers, heads, head_dim]``, for a ``topk`` bank.
    """

    frame: int
    page: int
    span: int = 1
    tokens: int | None = None
    pose: Pose | None = field(default=None, compare=False)
    level: int = -1
    summary: "Tensor | None" = field(default=None, compare=False)


Entries = tuple[Entry, ...]


@dataclass(frozen=True)
class Mid:
    """The mid partition: what is kept, what waits to be pooled, and what the next block reads."""

    bank: Entries = ()
    waiting: Entries = ()
    chosen: Entries = ()


@dataclass(frozen=True)
class Table:
    """One session's page table.

    Attributes:
        sink, recent: entries in slot order.
        mid: see `Mid`.
        queries: the newest frames, and the mean query of each layer and head of each.
        cut: the next block begins a new scene.
    """

    sink: Entries = ()
    recent: Entries = ()
    mid: Mid = Mid()
    queries: "tuple[tuple[int, Tensor], ...]" = field(default=(), compare=False)
    cut: bool = False

    def __iter__(self) -> Iterator[Entry]:
        """Every entry that is held, read or not."""
        yield from self.sink
        yield from self.recent
        yield from self.mid.bank
        yield from self.mid.waiting

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def moved(self, page: Callable[[int], int]) -> "Table":
        """The same over other pages."""

        def to(entries: Entries) -> Entries:
            return tuple(replace(entry, page=page(entry.page)) for entry in entries)

        mid = Mid(to(self.mid.bank), to(self.mid.waiting), to(self.mid.chosen))
        return replace(self, sink=to(self.sink), mid=mid, recent=to(self.recent))


@dataclass(frozen=True)
class Read:
    """One page that a block reads.

    Attributes:
        position: temporal position of its first frame. Where ``own`` holds, every token is at the
            frame that it came from instead, and this is added to it.
    """

    entry: Entry
    position: float
    own: bool = False


@dataclass(frozen=True)
class ReadPlan:
    """What the cells of one block read: sink, recent and mid pages in slot order, and the temporal
    positions of the block's own frames, for queries and keys alike."""

    reads: tuple[Read, ...]
    query_positions: tuple[int, ...]


def admit(table: Table, new: Entries, config: CacheConfig) -> tuple[Table, Entries]:
    """Add a finished block's frames; returns the new table and the entries that left ``recent``.

    The first ``config.sink`` frames ever admitted stay; after them the oldest leaves first. Frames
    of a block may leave singly where the window is no multiple of the block.
    """
    sink, recent = list(table.sink), list(table.recent)
    left: list[Entry] = []
    for entry in new:
        if len(sink) < config.sink:
            sink.append(entry)
        elif config.recent is None or len(recent) < config.recent:
            recent.append(entry)
        elif config.recent == 0:
            left.append(entry)
        else:
            oldest = min(range(len(recent)), key=lambda slot: recent[slot].frame)
            left.append(recent[oldest])
            recent[oldest] = entry
    return replace(table, sink=tuple(sink), recent=tuple(recent), cut=False), tuple(left)


def flushed(table: Table, keep: int) -> Table:
    """Only the sink and the ``keep`` newest frames (KV flush, ∞-RoPE)."""
    in_time = tuple(sorted(table.recent, key=lambda entry: entry.frame))
    return replace(table, recent=newest(in_time, keep), mid=Mid())


def newest(entries: Entries, most: int) -> Entries:
    """The last of some entries that are in the order of time; ``most`` may be 0."""
    return entries[max(0, len(entries) - most) :]


def reopened(table: Table) -> Table:
    """Without its recent frames, to be committed anew."""
    gone = {entry.frame for entry in table.recent}
    queries = tuple(asked for asked in table.queries if asked[0] not in gone)
    return replace(table, recent=(), queries=queries, cut=False)


def plan(table: Table, chosen: Entries, start: int, frames: int, config: CacheConfig) -> ReadPlan:
    """What a block of ``frames`` latent frames reads whose first has absolute index ``start``.

    Recent frames keep their absolute index (only differences matter, so it never has to change);
    ``packed`` moves mid and sink to end right before the oldest recent frame. After a cut all of
    them are `CUT` frames further away, for one block.
    """
    gap = CUT if table.cut else 0
    cursor = start - gap
    packed: dict[Entry, float] = {}
    # A block that is committed anew may be in the sink itself: nobody reads what is not before it.
    sink, recent, mid = (
        tuple(entry for entry in part if entry.frame < start)
        for part in (table.sink, table.recent, chosen)
    )
    for part in (recent, mid, sink):
        for entry in sorted(part, key=lambda entry: entry.frame, reverse=True):
            cursor -= entry.span
            packed[entry] = cursor
    reads = []
    for entry in (*sink, *recent, *mid):
        if config.positions == "packed":
            reads.append(Read(entry, packed[entry]))
        elif entry.tokens is None:
            reads.append(Read(entry, entry.frame - gap))
        else:  # tokens of many frames
            reads.append(Read(entry, -gap, own=True))
    return ReadPlan(tuple(reads), tuple(range(start, start + frames)))
