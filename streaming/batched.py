"""One device, several blocks at once: the cells of a tick are the rows of one forward.

A block enters, and from then on takes one step in every tick; ``lag + 1`` ticks later the next one
enters. Each lane is a session of its own (`worldsim.session`, ``lanes``): all of them make the same
blocks under the same controls, each its own cells, one after another. So what is computed is what
the serial form computes, but for the rounding of products of more rows.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldsim.config import Settings
from worldsim.controls import Control
from worldsim.rollout import Lanes, Making, Noise, side_by_side, stage
from worldsim.schedule import Cell
from worldsim.script import Script
from worldsim.session import Session
from worldsim.state import Applied, Asked, Block, Decoding, Played, Snapshot
from worldsim.world import World

Enters = Callable[[Session], Sequence[Control] | None]  # the next block's controls, or None: live


@dataclass
class Flight:
    """A block on its way through the lanes.

    Attributes:
        step: of its next cell.
        x: input of that cell; None: noise.
        played: how it came to be, for the lanes that it has not come to yet.
        making: of the lane that it is in.
    """

    index: int
    start: int
    steps: int
    step: int = 0
    x: Tensor | None = None
    applied: Applied | None = None
    played: Played | None = None
    making: Making | None = None


class Batched:
    """A live world whose blocks overlap; see the module docstring.

    Attributes:
        parts: the session of each lane; the first one decides what a block is made under.
        tick: ticks so far.

    Raises:
        ValueError: for a schedule whose blocks have to wait for each other.
    """

    def __init__(
        self, world: World, settings: Settings, asked: Asked, noise: Noise | None = None
    ) -> None:
        schedule = settings.schedule
        if schedule.context != "lag":
            raise ValueError(
                "schedule: only what reads the same or a later step can be batched: batch, lag1, …"
            )
        self.world, self.settings = world, settings
        self.parts = {
            lane: Session(world, settings, asked, noise, lanes=(lane,)) for lane in schedule.lanes
        }
        self.tick = 0
        self._apart = min(schedule.lag, len(schedule.steps) - 1) + 1
        self._free = 0  # the tick from which on a block may enter
        self._flights: deque[Flight] = deque()

    @property
    def leader(self) -> Session:
        """What is asked of this session is asked of the next block that enters."""
        return next(iter(self.parts.values()))

    @property
    def in_flight(self) -> int:
        """Blocks that have entered and are not finished."""
        return len(self._flights)

    def blocks(self, enters: Enters, count: int | None = None) -> Iterator[Block]:
        """Blocks, one by one in order and not decoded; in the end those in flight are finished.

        Args:
            enters: is asked for the controls of each block, right before it enters.
            count: how many enter; None: for ever.
        """
        entered = 0
        while count is None or entered < count or self._flights:
            open_ = self.tick >= self._free and (count is None or entered < count)
            entered += open_
            block = self.advance(enters if open_ else None)
            if block is not None:
                yield block

    def drain(self) -> Iterator[Block]:
        """Finish the blocks in flight."""
        return self.blocks(lambda _: None, 0)

    @torch.inference_mode()
    def advance(self, enters: Enters | None = None) -> Block | None:
        """One tick: every block in flight takes a step, and with ``enters`` another one enters.
        Returns the block that is finished, if one is."""
        began = time.perf_counter()
        if enters is not None:
            assert self.tick >= self._free, "the block before has to go ahead"
            self._flights.append(self._enter(enters))
            self._free = self.tick + self._apart
        self.tick += 1
        cells = [(flight, self._cell(flight)) for flight in self._flights]
        run(self.world.forward, [(f.making, cell) for f, cell in cells if f.making], self.lanes)
        for flight, cell in cells:
            self._leave(flight, cell)
        if not self._flights or self._flights[0].step < self._flights[0].steps:
            return None
        done = self._flights.popleft()
        assert done.x is not None and done.applied is not None
        block = Block(done.index, done.start, done.x, done.applied)
        block.timings.update(commit=0.0, denoise=time.perf_counter() - began)
        return block

    @property
    def lanes(self) -> Lanes:
        """Of each lane, the views of its rows."""
        return {lane: part.lanes[lane] for lane, part in self.parts.items()}

    def snapshot(self, decoding: Decoding) -> Snapshot:
        """All that it goes on from; a serial session under the same settings may do so as well.

        Args:
            decoding: of whoever decodes its blocks.

        Raises:
            ValueError: while blocks are in flight.
        """
        if self._flights:
            raise ValueError("blocks are in flight: drain them before a snapshot")
        for part in self.parts.values():
            part.settle()
        return united([part.snapshot() for part in self.parts.values()], decoding)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; blocks in flight are dropped.

        Raises:
            ValueError: for one of other settings, or of another world.
        """
        for part in self.parts.values():
            part.restore(snapshot)
        self._flights.clear()
        self._free = self.tick

    def close(self) -> None:
        for part in self.parts.values():
            part.close()

    def _enter(self, enters: Enters) -> Flight:
        leader = self.leader
        steps = len(self.settings.schedule.step_list(leader.block))
        flight = Flight(leader.block, leader.frame, steps)
        keys = enters(leader)
        leader.ready()
        flight.making, flight.applied = leader.begin(keys)
        return flight

    def _cell(self, flight: Flight) -> Cell:
        """A flight's next cell; it comes into another lane where that reads one."""
        cell = list(self.settings.schedule.cells(flight.index))[flight.step]
        if flight.making is None:
            assert flight.played is not None
            part = self.parts[cell.reads]
            part.heed(flight.played)
            part.ready()
            flight.making, _ = part.begin(flight.played.applied.controls, x=flight.x)
        return cell

    def _leave(self, flight: Flight, cell: Cell) -> None:
        """After a cell: on to the next one, and out of the lane where it was its last there."""
        assert flight.making is not None and flight.applied is not None
        flight.step, flight.x = flight.step + 1, flight.making.x
        part = self.parts[cell.reads]
        if cell.level == part.cells()[-1].level:
            part.accept(
                Block(flight.index, flight.start, flight.x, flight.applied), flight.making, {}
            )
            flight.played, flight.making = part.now.past[-1], None


def stream(
    world: World,
    script: Script,
    blocks: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    cache: str | None = None,
    schedule: str | None = "batch",
    guidance: float | None = None,
    negative_prompt: str | None = None,
) -> Iterator[Block]:
    """`World.stream` without its decoding, under a schedule that is batched; everything is checked
    at the call.

    Raises:
        ValueError: for what this world cannot do.
    """
    settings = world.settings(seed, steps, cache, schedule, guidance, negative_prompt)
    batched = Batched(world, settings, world.ask(settings, script.prompt(0)))

    def made() -> Iterator[Block]:
        try:
            yield from batched.blocks(lambda leader: leader.follow(script), blocks)
        finally:
            batched.close()

    return made()


# --- several cells in one pass ----------------------------------------------------------------
def run(forward: Callable[..., Tensor], cells: Sequence[tuple[Making, Cell]], lanes: Lanes) -> None:
    """Run independent cells, each of a block of its own, as the rows of one forward."""
    if not cells:
        return
    views = [lanes[cell.reads] for _, cell in cells]
    told = [making.rows(cell, len(rows)) for (making, cell), rows in zip(cells, views, strict=True)]
    latents, levels = (torch.cat(part) for part in zip(*told, strict=True))
    conditioning = side_by_side([making.conditioning for making, _ in cells])
    leaves = any(cell.publishes is not None for _, cell in cells)
    flat = [view for rows in views for view in rows]
    flows = forward(latents, levels, conditioning, flat, *((True,) if leaves else ()))
    for (making, cell), rows, flow in zip(
        cells, views, flows.split([len(rows) for rows in views]), strict=True
    ):
        if cell.publishes is not None:
            into = lanes[cell.publishes]
            stage(cell, making.start, making.poses, rows, into, flow.shape[2])
        making.take(cell, flow)


def united(parts: Sequence[Snapshot], decoding: Decoding) -> Snapshot:
    """Snapshots of sessions that have some lanes each, at the same block, as one of all lanes."""
    first = parts[0]
    assert len({part.block for part in parts}) == 1, "all of them are at one block"
    tables = {lane: rows for part in parts for lane, rows in part.tables.items()}
    newest = {lane: rows for part in parts for lane, rows in part.newest.items()}
    return Snapshot(first.settings, first.moment, decoding, tables, newest, first.pool)
