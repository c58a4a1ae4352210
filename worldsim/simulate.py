"""What a run over ranks will be like, out of a few measured times: nothing runs.

Each rank does its cells in order, each as soon as what it needs has come. A rank with steps of its
own begins no block before the next rank has taken the one before, so none waits between two of
them; in a ring, where blocks go round, a message waits until the one before it has been taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from worldsim.wavefront import Grid, Name, Placed


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes.

    Attributes:
        denoise, commit: of one pass over all layers, for one block.
        decode: of a block.
        own_thread: a rank that has steps decodes beside them, on another core.
        batch: what a further row of a batch costs, as a share of the first one.
        message: of packing and unpacking one, on each side, and of handing over a finished block.
        latency: of a link.
        rate: of a link, bytes a second.
        latent, hidden: bytes of a message between steps, and between ranges of layers.
        pictures: of a block.
        cold: how much longer the first pass of a rank takes. Where ranks have passes that nobody
            waits for (a context pass), what it holds up stays behind for good.
        spread: how much passes vary, as a share of what they take (standard deviation). Ranks of
            equal speed wait for each other now and then, and blocks between them.
    """

    denoise: float
    commit: float = 0.0
    decode: float = 0.0
    own_thread: bool = True
    batch: float = 1.0
    message: float = 0.0
    latency: float = 0.0
    rate: float = float("inf")
    latent: int = 0
    hidden: int = 0
    pictures: int = 1
    cold: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What comes out.

    Attributes:
        fps: pictures a second, once it flows.
        first: seconds until the first block is there.
        delay: seconds from a block's first step until it is there, once it flows: what a control
            waits for beside the block before it.
        busy: of each rank, the share of its time in which it computes.
    """

    fps: float
    first: float
    delay: float
    busy: tuple[float, ...]


def simulate(grid: Grid, costs: Costs) -> Forecast:
    """Run a grid's cells with these costs; it should have three times as many blocks as fill it."""
    ranks = _Ranks(grid, costs)
    for work in _in_order(grid):
        ranks.run(work)
    return ranks.forecast()


class _Ranks:
    """The ranks of a grid while they run: when what was begun, over, sent, taken and shown."""

    def __init__(self, grid: Grid, costs: Costs) -> None:
        self.grid = grid
        self.costs = costs
        self.parts = 1 + max(cell.name.part for cell in grid.cells)
        self.has_decoder = any(cell.name.kind == "decode" for cell in grid.cells)
        self.begun: dict[Name, float] = {}
        self.over: dict[Name, float] = {}
        self.sent: dict[Name, float] = {}  # when a cell's message arrives
        self.taken: dict[tuple[int, int], float] = {}  # when the newest message of an edge was
        self.free = [0.0] * grid.ranks
        self.worked = [0.0] * grid.ranks
        self.shown: dict[int, float] = {}
        self.chance = np.random.Generator(np.random.Philox(0))  # the same at every call
        self.shower = 0.0  # when the thread that decodes beside the steps is free

    def run(self, work: list[Placed]) -> None:
        """Cells that a rank does together."""
        rank = work[0].rank
        ready = self._ready(work)
        took = sum(
            _seconds(cell, self.costs, self.parts) * (1.0 if index == 0 else self.costs.batch)
            for index, cell in enumerate(work)
        )
        # No less than half: nothing is suddenly quick.
        took *= max(0.5, 1.0 + self.costs.spread * self.chance.standard_normal())
        took += 0.0 if self.worked[rank] else self.costs.cold
        for cell in work:
            self.begun[cell.name], self.over[cell.name] = ready, ready + took
        self.worked[rank] += took
        done = self._send(work, ready + took)
        for cell in work:
            if _last(self.grid, cell):
                done = self._show(cell, done)
        self.free[rank] = done

    def _ready(self, work: list[Placed]) -> float:
        """When the rank is free and all that the cells need is there."""
        rank = work[0].rank
        ready = self.free[rank]
        if self.parts == 1 and work[0].name.kind != "commit":
            taken = (at for (source, _), at in self.taken.items() if source == rank)
            ready = max((ready, *taken))
        for name in (name for cell in work for name in self.grid.needs(cell)):
            there = self.grid.at[name]
            if there.rank == rank:
                ready = max(ready, self.over[name])
            else:
                ready = max(ready, self.sent[name])
                self.taken[there.rank, rank] = ready
                ready += self.costs.message
        return ready

    def _send(self, work: list[Placed], done: float) -> float:
        """Send on what was made, if another rank wants it; returns when that is done."""
        rank, costs = work[0].rank, self.costs
        wanting = (to.rank for cell in work for to in _followers(self.grid, cell))
        to = next((other for other in wanting if other != rank), None)
        if to is None:
            return done
        # Not before the message before it was taken.
        departs = max(done + costs.message, self.taken.get((rank, to), 0.0))
        size = costs.hidden * len(work) if self.parts > 1 else costs.latent
        for cell in work:
            self.sent[cell.name] = departs + costs.latency + size / costs.rate
        return departs

    def _show(self, cell: Placed, done: float) -> float:
        """A block is finished with this cell; returns when its rank goes on."""
        block, costs = cell.name.block, self.costs
        done += costs.message  # to who takes what is finished
        if cell.name.kind == "decode":
            self.shown[block] = done
        elif not self.has_decoder and costs.own_thread:
            self.shower = self.shown[block] = max(self.shower, done) + costs.decode
        elif not self.has_decoder:
            done += costs.decode
            self.worked[cell.rank] += costs.decode
            self.shown[block] = done
        return done

    def forecast(self) -> Forecast:
        shown, blocks = self.shown, sorted(self.shown)
        steady = blocks[len(blocks) // 2 :]
        period = (shown[steady[-1]] - shown[steady[0]]) / max(1, len(steady) - 1)
        if len(steady) == 1:
            period = shown[steady[0]]
        waits = [shown[block] - self._entered(block) for block in steady]
        end = max(*shown.values(), *self.free)
        return Forecast(
            fps=self.costs.pictures / period if period else float("inf"),
            first=shown[blocks[0]] - self._entered(blocks[0]),
            delay=sum(waits) / len(waits),
            busy=tuple(done / end for done in self.worked),
        )

    def _entered(self, block: int) -> float:
        """When the first step of a block began."""
        return self.begun[Name("denoise", block, 0)]


def _in_order(grid: Grid) -> list[list[Placed]]:
    """Work of the ranks: cells of one tick and rank together, in an order that can be run. In a
    tick the last rank comes first: it takes a block from the one before, which can then go on."""
    groups: dict[tuple[int, int], list[Placed]] = {}
    for cell in grid.cells:
        groups.setdefault((cell.tick, cell.rank), []).append(cell)
    return [groups[tick, rank] for tick, rank in sorted(groups, key=lambda key: (key[0], -key[1]))]


def _seconds(cell: Placed, costs: Costs, parts: int) -> float:
    kinds: Mapping[str, float] = {
        "denoise": costs.denoise / parts, "commit": costs.commit / parts, "decode": costs.decode
    }  # fmt: skip
    return kinds[cell.name.kind]


def _followers(grid: Grid, cell: Placed) -> list[Placed]:
    """Cells that take this one's result."""
    kind, block, level, part = cell.name
    names = (
        Name(kind, block, level, part + 1),
        Name(kind, block, level + 1, 0),
        Name("decode", block, -1),
    )
    there = (grid.at[name] for name in names if name in grid.at)
    return [other for other in there if cell.name in other.after]


def _last(grid: Grid, cell: Placed) -> bool:
    """Whether a block is finished with this cell."""
    if cell.name.kind == "commit":
        return False
    return not any(other.name.kind != "commit" for other in _followers(grid, cell))
