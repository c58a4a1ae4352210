"""What a run over ranks will be like, out of a few measured times: nothing runs.

Each rank does its cells in order, each as soon as what it needs has come. A message goes on its way
when its block is ready and the message before it has been taken; so nobody runs ahead by more than
a block.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from worldsim.wavefront import Grid, Name, Placed


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes.

    Attributes:
        denoise, commit: of one pass over all layers, for one block.
        decode: of a block.
        own_thread: a rank that has steps decodes beside them, on another core.
        batch: what a further row of a batch costs, as a share of the first one.
        message: of packing and unpacking one, on each side.
        latency: of a link.
        rate: of a link, bytes a second.
        latent, hidden: bytes of a message between steps, and between ranges of layers.
        pictures: of a block.
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
    over: dict[Name, float] = {}
    begun: dict[Name, float] = {}
    free = [0.0] * grid.ranks
    worked = [0.0] * grid.ranks
    taken: dict[tuple[int, int], float] = {}  # when the newest message of an edge was taken
    sent: dict[Name, float] = {}  # when a cell's message arrives
    parts = 1 + max(cell.name.part for cell in grid.cells)
    decoder = grid.ranks - 1 if any(cell.name.kind == "decode" for cell in grid.cells) else None
    shown: dict[int, float] = {}
    shower = 0.0
    for work in _in_order(grid):
        rank = work[0].rank
        ready = free[rank]
        for cell in work:
            for name in grid.needs(cell):
                there = grid.at[name]
                if there.rank == rank:
                    ready = max(ready, over[name])
                else:
                    edge = there.rank, rank
                    arrives = max(sent[name], free[rank]) + costs.message
                    taken[edge] = arrives
                    ready = max(ready, arrives)
        took = sum(
            _seconds(cell, costs, parts) * (1.0 if index == 0 else costs.batch)
            for index, cell in enumerate(work)
        )
        done = ready + took
        size = costs.hidden * len(work) if parts > 1 else costs.latent
        onwards = [name for cell in work for name in _followers(grid, cell) if name.rank != rank]
        for cell in work:
            begun[cell.name], over[cell.name] = ready, done
        if onwards:
            done += costs.message
            # Not before the message before it was taken.
            departs = max(done, taken.get((rank, onwards[0].rank), 0.0))
            done = departs
            for cell in work:
                sent[cell.name] = departs + costs.latency + size / costs.rate
        worked[rank] += took
        finished = [c for c in work if _last(grid, c)]
        for cell in finished:
            if cell.name.kind == "decode" or decoder is None:
                beside = costs.own_thread and cell.name.kind != "decode"
                extra = 0.0 if cell.name.kind == "decode" else costs.decode
                if beside:
                    shower = max(shower, done) + extra
                    shown[cell.name.block] = shower
                else:
                    done += extra
                    worked[rank] += extra
                    shown[cell.name.block] = done
        free[rank] = done
    blocks = sorted(shown)
    steady = blocks[len(blocks) // 2 :]
    period = (shown[steady[-1]] - shown[steady[0]]) / max(1, len(steady) - 1)
    if len(steady) == 1:
        period = shown[steady[0]]
    waits = [shown[b] - begun[Name("denoise", b, 0)] for b in steady]
    end = max(shown.values())
    return Forecast(
        fps=costs.pictures / period if period else float("inf"),
        first=shown[blocks[0]] - begun[Name("denoise", blocks[0], 0)],
        delay=sum(waits) / len(waits),
        busy=tuple(done / end for done in worked),
    )


def _in_order(grid: Grid) -> list[list[Placed]]:
    """Work of the ranks: cells of one tick and rank together, in an order that can be run."""
    groups: dict[tuple[int, int], list[Placed]] = {}
    for cell in grid.cells:
        groups.setdefault((cell.tick, cell.rank), []).append(cell)
    return [groups[key] for key in sorted(groups)]


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
