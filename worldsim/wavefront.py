"""A schedule spread over time and ranks: which cell runs when, where, and what it reads there.

Plain data that is checked when it is made. A tick is the time of one cell; the cells of a block's
step stand in it as they can be run at the earliest. No executor counts ticks: each does its own
cells in order and waits for what they need, which is the same thing.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from worldsim.cache.config import CacheConfig
from worldsim.cache.policy import Entry, Table, admit
from worldsim.schedule import CLEAN, LAST, Schedule

Key = tuple[int, int]  # (block, level): names what a cell left behind
History = Callable[[int], Sequence[int]]  # block -> earlier blocks that it reads


class Name(NamedTuple):
    """Which cell; ``part`` is a range of layers where those are spread over ranks."""

    kind: str  # denoise, commit or decode
    block: int
    level: int
    part: int = 0

    def __str__(self) -> str:
        letter = self.kind[0].upper() if self.kind != "decode" else "V"
        level = "clean" if self.level == CLEAN else str(self.level)
        return f"{letter}({self.block},{level})" + (f"/{self.part}" if self.part else "")


@dataclass(frozen=True)
class Placed:
    """One cell at its place.

    Attributes:
        reads: what of earlier blocks (and, in a joint tick, of its peers) it attends to.
        after: cells whose result it takes, beside those that left what it reads.
        leaves: the key under which later cells read it, or None.
    """

    name: Name
    tick: int
    rank: int
    reads: tuple[Key, ...] = ()
    after: tuple[Name, ...] = ()
    leaves: Key | None = None


@dataclass(frozen=True)
class Grid:
    """All cells of a run.

    Attributes:
        cells: in the order in which each rank does its own.
        ranks: how many there are.
        together: how cells of one tick and rank stand to each other: ``alone`` (there is but one),
            ``independent`` (rows of one batch) or ``joint`` (they may read each other).

    Raises:
        ValueError: in one line, for an order in which it cannot be run.
    """

    cells: tuple[Placed, ...]
    ranks: int = 1
    together: str = "alone"

    def __post_init__(self) -> None:
        if self.together not in ("alone", "independent", "joint"):
            raise ValueError(f"grid: cells stand alone, independent or joint, not {self.together}")
        if len(self.at) != len(self.cells):
            raise ValueError("grid: a cell is there twice")
        for cell in self.cells:
            if cell.leaves and (other := self.writers[cell.leaves, cell.name.part]) != cell.name:
                raise ValueError(f"grid: {cell.name} and {other} both leave {cell.leaves} behind")
        taken: dict[tuple[int, int], Name] = {}
        for cell in self.cells:
            if not 0 <= cell.rank < self.ranks or cell.tick < 0:
                raise ValueError(f"grid: {cell.name} is at rank {cell.rank}, tick {cell.tick}")
            other = taken.setdefault((cell.rank, cell.tick), cell.name)
            if other != cell.name and self.together == "alone":
                raise ValueError(
                    f"grid: rank {cell.rank} has {other} and {cell.name} at tick {cell.tick}"
                )
            self._check_steps(cell)
            for name in cell.after:
                self._check_before(cell, name)
            for key in cell.reads:
                self._check_read(cell, key)

    def _check_steps(self, cell: Placed) -> None:
        """Whatever it says of itself, a cell goes on from what its block is by then."""
        before = self._before(cell.name)
        if before is None:
            return
        if before not in self.at:
            raise ValueError(f"grid: {cell.name} has no step before it: {before} is missing")
        self._check_before(cell, before)

    def _before(self, name: Name) -> Name | None:
        """The step, or the part of it, that leads to a cell; None where that is noise."""
        kind, block, level, part = name
        if kind == "denoise" and part:
            return Name("denoise", block, level, part - 1)
        if kind == "denoise":
            return Name("denoise", block, level - 1, self._parts - 1) if level else None
        if level == CLEAN:
            level = self._steps[block]
        return Name("denoise", block, level - 1, self._parts - 1)

    def _check_before(self, cell: Placed, name: Name) -> None:
        if name not in self.at:
            raise ValueError(f"grid: {cell.name} waits for {name}, which is not there")
        if self.at[name].tick >= cell.tick:
            raise ValueError(
                f"grid: {cell.name} at tick {cell.tick} needs {name} of tick {self.at[name].tick}"
            )

    def _check_read(self, cell: Placed, key: Key) -> None:
        writer = self.writers.get((key, cell.name.part))
        if writer is None:
            raise ValueError(f"grid: {cell.name} reads {key}, which nobody leaves behind")
        left = self.at[writer]
        if left.rank != cell.rank:
            raise ValueError(
                f"grid: {cell.name} on rank {cell.rank} reads {key}, which lies on rank "
                f"{left.rank}; keys and values do not travel: use one rank"
            )
        peers = self.together == "joint" and left.tick == cell.tick
        if left.tick >= cell.tick and not peers:
            raise ValueError(
                f"grid: {cell.name} at tick {cell.tick} reads {key} of tick {left.tick}"
            )
        if key[0] >= cell.name.block and self.together != "joint":
            raise ValueError(f"grid: {cell.name} reads {key}, which is no earlier block")

    @cached_property
    def at(self) -> Mapping[Name, Placed]:
        return {cell.name: cell for cell in self.cells}

    @cached_property
    def _parts(self) -> int:
        return 1 + max(name.part for name in self.at)

    @cached_property
    def _steps(self) -> Counter[int]:
        """How many each block has."""
        return Counter(n.block for n in self.at if n.kind == "denoise" and not n.part)

    @cached_property
    def writers(self) -> Mapping[tuple[Key, int], Name]:
        """Who leaves what behind, in each part of the layers."""
        return {(cell.leaves, cell.name.part): cell.name for cell in self.cells if cell.leaves}

    def needs(self, cell: Placed) -> tuple[Name, ...]:
        """Every cell that must be over before this one."""
        read = (self.writers[key, cell.name.part] for key in cell.reads)
        earlier = (name for name in read if self.at[name].tick < cell.tick)
        return tuple(dict.fromkeys((*cell.after, *earlier)))

    # --- what people ask of it --------------------------------------------------------------------
    @property
    def ticks(self) -> int:
        return 1 + max(cell.tick for cell in self.cells)

    @property
    def blocks(self) -> int:
        return 1 + max(cell.name.block for cell in self.cells)

    def done(self, block: int) -> int:
        """The tick in which a block's last step ends, or its decoding on a rank that does so."""
        work = (c.tick for n, c in self.at.items() if n.kind != "commit" and n.block == block)
        return max(work)

    def begun(self, block: int) -> int:
        """The tick of a block's first step."""
        steps = (c.tick for n, c in self.at.items() if n.kind == "denoise" and n.block == block)
        return min(steps)

    @property
    def period(self) -> float:
        """Ticks from one finished block to the next, once it flows (of all but the first ones)."""
        first = self.blocks // 2 if self.blocks > 2 else 0
        if self.blocks == 1:
            return float(self.ticks)
        return (self.done(self.blocks - 1) - self.done(first)) / (self.blocks - 1 - first)

    @property
    def delay(self) -> float:
        """Blocks that go by from when a control is taken up until its own block is finished."""
        newest = self.blocks - 1
        return (self.done(newest) - self.begun(newest) + 1) / self.period

    def bubbles(self, rank: int) -> int:
        """Ticks in which a rank has nothing to do."""
        return self.ticks - len({cell.tick for cell in self.cells if cell.rank == rank})

    @cached_property
    def critical(self) -> tuple[Name, ...]:
        """The longest chain of cells that wait for each other, from the first to the last."""
        length: dict[Name, int] = {}
        via: dict[Name, Name | None] = {}
        for cell in sorted(self.cells, key=lambda cell: cell.tick):
            longest = max(self.needs(cell), key=lambda name: length[name], default=None)
            via[cell.name] = longest
            length[cell.name] = 1 + (length[longest] if longest else 0)
        chain: list[Name] = []
        at: Name | None = max(length, key=lambda name: length[name])
        while at is not None:
            chain.append(at)
            at = via[at]
        return tuple(reversed(chain))


# --- making one -----------------------------------------------------------------------------------
def all_before(block: int) -> range:
    """The history of a context that keeps everything."""
    return range(block)


def kept(config: CacheConfig, block_frames: int, blocks: int) -> History:
    """The history under a cache's policy: blocks of which a frame is in its sink or recent ones."""
    table, histories = Table(), []
    for block in range(blocks):
        held = {entry.frame // block_frames for entry in (*table.sink, *table.recent)}
        histories.append(sorted(held))
        frames = range(block * block_frames, (block + 1) * block_frames)
        table, _ = admit(table, tuple(Entry(frame, page=0) for frame in frames), config)
    return histories.__getitem__


def ranges(count: int, ranks: int) -> list[range]:
    """``count`` things in a row, shared out as evenly as can be, earlier ranks first.

    Raises:
        ValueError: where a rank would have none.
    """
    if not 1 <= ranks <= count:
        raise ValueError(f"grid: {count} cannot be shared out over {ranks} ranks")
    ends = [-(-count * rank // ranks) for rank in range(ranks + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def spread(schedule: Schedule, blocks: int, ranks: int = 1, history: History = all_before) -> Grid:
    """The grid of a schedule's first blocks.

    Raises:
        ValueError: for fewer than one block, or ranks that it cannot use.
    """
    if blocks < 1:
        raise ValueError(f"grid: give 1 block or more, got {blocks}")
    check_ranks(schedule, ranks)
    if schedule.order == "joint":
        return _rolling(schedule, blocks, history)
    cells = [cell for block in range(blocks) for cell in _of_block(schedule, block, ranks, history)]
    if schedule.context == "fused":
        return Grid(tuple(_fused(cells)), together="joint")
    batched = schedule.order in ("batch", "layers")
    together = "independent" if batched else "alone"
    return Grid(tuple(_earliest(cells, batched)), ranks, together)


def check_ranks(schedule: Schedule, ranks: int) -> None:
    """Raises:
    ValueError: in one line, where a schedule cannot use so many ranks.
    """
    steps = len(schedule.steps)
    if ranks < 1:
        raise ValueError(f"schedule: ranks must be 1 or more, got {ranks}")
    if ranks == 1 or schedule.order == "layers":
        return
    if schedule.order != "steps":
        raise ValueError(
            "schedule: this one has a single rank; over ranks go tpp, hiar (steps) and ring "
            "(layers)"
        )
    if ranks > steps + 1:
        raise ValueError(
            f"schedule: {steps} steps use at most {steps + 1} ranks, one for each and one that "
            f"decodes; got {ranks}"
        )


def rank_of_step(schedule: Schedule, ranks: int, level: int) -> int:
    """The rank of a step, where those are spread over ranks."""
    count = len(schedule.steps)
    of = ranges(count, min(ranks, count))
    return next(rank for rank, levels in enumerate(of) if level in levels)


def level_in(schedule: Schedule, lane: int, block: int) -> int:
    """The level at which a block stands in a lane."""
    return len(schedule.step_list(block)) - 1 if lane == LAST else lane


def _of_block(schedule: Schedule, block: int, ranks: int, history: History) -> Iterable[Placed]:
    """A block's cells without their ticks, in the order in which each rank does its own."""
    steps = list(schedule.cells(block))
    commits = {cell.level: cell for cell in schedule.commit_cells(block)}
    parts = ranks if schedule.order == "layers" else 1
    over_steps = schedule.order == "steps" and ranks > 1

    def reads(lane: int) -> tuple[Key, ...]:
        return tuple((j, level_in(schedule, lane, j)) for j in history(block))

    for cell in steps:
        rank = rank_of_step(schedule, ranks, cell.level) if over_steps else 0
        for part in range(parts):
            after: tuple[Name, ...] = ()
            if part:
                after = (Name("denoise", block, cell.level, part - 1),)
            elif cell.level:
                after = (Name("denoise", block, cell.level - 1, parts - 1),)
            leaves = None if cell.publishes is None else (block, cell.level)
            name = Name("denoise", block, cell.level, part)
            yield Placed(name, 0, part or rank, reads(cell.reads), after, leaves)
        reached = cell.level + 1 if cell.level + 1 < len(steps) else CLEAN
        if reached in commits:  # send, then commit
            name, after = Name("commit", block, reached), (Name("denoise", block, cell.level),)
            own = commits[reached]
            yield Placed(name, 0, rank, reads(own.reads), after, (block, reached))
    if over_steps and ranks > len(schedule.steps):
        last = Name("denoise", block, len(steps) - 1)
        yield Placed(Name("decode", block, CLEAN), 0, ranks - 1, (), (last,))


def _earliest(cells: Sequence[Placed], batched: bool) -> Iterable[Placed]:
    """Each cell as early as what it needs, and the rank's cells before it, allow."""
    over: dict[Name, int] = {}  # the tick after
    writers = {(cell.leaves, cell.name.part): cell.name for cell in cells if cell.leaves}
    free: dict[int, int] = defaultdict(int)
    for cell in cells:
        read = [writers[key, cell.name.part] for key in cell.reads]
        tick = max((over[name] for name in (*cell.after, *read)), default=0)
        if not batched:
            tick = max(tick, free[cell.rank])
        free[cell.rank] = over[cell.name] = tick + 1
        yield replace(cell, tick=tick)


def _fused(cells: Sequence[Placed]) -> Iterable[Placed]:
    """One cell a tick, but that a context pass shares that of the next block's first step."""
    tick = -1
    for cell in cells:
        kind, block, level, _ = cell.name
        if not (kind == "denoise" and level == 0 and block):
            tick += 1
        yield replace(cell, tick=tick)


def _rolling(schedule: Schedule, blocks: int, history: History) -> Grid:
    """Rolling Forcing: in every other tick a window of blocks, each a step further than the next;
    all of them see each other and the finished blocks. Then the one that it finished is committed.
    """
    count, cells = len(schedule.steps), []
    for window in range(blocks + count - 1):
        members = [(j, window - j) for j in range(blocks) if 0 <= window - j < count]
        finished = window - count + 1
        for block, level in members:
            after = (Name("denoise", block, level - 1),) if level else ()
            clean = tuple((j, CLEAN) for j in history(block) if j < finished)
            peers = tuple(member for member in members if member != (block, level))
            name = Name("denoise", block, level)
            cells.append(Placed(name, 2 * window, 0, (*clean, *peers), after, (block, level)))
        if finished >= 0:
            clean = tuple((j, CLEAN) for j in history(finished))
            name, done = Name("commit", finished, CLEAN), Name("denoise", finished, count - 1)
            cells.append(Placed(name, 2 * window + 1, 0, clean, (done,), (finished, CLEAN)))
    return Grid(tuple(cells), together="joint")
