"""Layers on ranks: every rank has some of the layers, and all steps of several blocks at once.

In its tick t a rank runs step s of the block that entered at tick t - s·W, for every s: rows of
one batch, whose hidden states go on to the next rank. The last rank makes flows of them, takes the
step, and sends what is not finished back to the first. W ranks; each counts its own ticks from 0,
and tick t of rank r follows on tick t of rank r - 1.

Shapes: S steps, N tokens of a block, D width.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from worldsim.config import Settings
from worldsim.controls import Control
from worldsim.models.context import Rows
from worldsim.rollout import Lanes, Making, side_by_side, stage
from worldsim.schedule import Cell
from worldsim.session import Session
from worldsim.share import Share
from worldsim.state import Applied, Block
from worldsim.streaming.kept import forget, keep
from worldsim.streaming.leader import Leader
from worldsim.streaming.link import STOP, Link, Order
from worldsim.world import World


@dataclass
class Flight:
    """A block on its way.

    Attributes:
        entered: the tick of its first step.
        order: what it is made under; the first rank has it after that step.
        x: input of its next step: None is noise. Only the first and the last rank know it.
    """

    entered: int
    start: int
    order: Order | None = None
    x: Tensor | None = None


@dataclass
class Due:
    """A cell of this tick."""

    flight: Flight
    cell: Cell
    making: Making
    applied: Applied


class Ring:
    """One rank of the ring.

    Attributes:
        parts: the session of each lane, over this rank's layers.

    Raises:
        ValueError: for blocks of several sizes.
    """

    def __init__(
        self, world: World, settings: Settings, parts: dict[int, Session], share: Share,
        saves: str | None = None,
    ) -> None:  # fmt: skip
        """``saves``: where the states of its run are."""
        if settings.independent_first_frame:
            raise ValueError("schedule: in a ring all blocks are of one size: first frame and all")
        if settings.cache.form == "topk":  # by a score over all layers, of which a rank has some
            raise ValueError(
                "cache: in a ring nobody can choose by topk: pool, participative or pose"
            )
        self.world, self.settings, self.parts, self.share = world, settings, parts, share
        self.lanes: Lanes = {lane: part.lanes[lane] for lane, part in parts.items()}
        self.received = self.sent = 0
        self._saves = saves
        self._steps = len(settings.schedule.steps)
        self._shape = world.latents_of(settings.size, world.config.block_frames)
        self._flights: deque[Flight] = deque()
        self._epoch = 0
        self._keys: Sequence[Control] | None = None  # of the block that enters
        self._began = 0.0

    @torch.inference_mode()
    def blocks(self, leader: Leader, device: torch.device) -> Iterator[tuple[Order, Block]]:
        """Run to the end. Every block comes out after its last step here; finished on the last
        rank.

        Args:
            device: where messages lie.

        Raises:
            PeerLost: where another rank is gone.
        """
        rank, ranks, laps = self.share.rank, self.share.ranks, self._steps - 1
        hidden, back = self._links(device)
        tick, entered, open_ = 0, 0, True
        while True:
            entering: Flight | None = None
            given: Tensor | None = None
            if rank == 0:
                if open_:
                    entering = self._entering(leader, tick)
            else:
                entering, given = self._arriving(hidden, tick)
            if entering is None:
                open_ = False
            else:
                self._flights.append(entering)
                entered += 1
            if not open_ and not self._flights:
                break
            if rank == 0 and laps and tick >= ranks:
                self._returned(back, tick - ranks)
            due = [self._due(flight, tick) for flight in self._flights if self._on(flight, tick)]
            out = self._pass(due, given)
            for each in due:
                self._leave(each)
            if entering is not None and entering.order is None:
                entering.order = leader.order(self.parts[due[-1].cell.reads], self._began)
            for each in due:
                self._keep(each)
            if rank < ranks - 1:
                hidden.send(rank + 1, self._header(entering), out)
            elif laps and (open_ or tick + ranks < entered + laps * ranks):
                back.send(0, b"", out)
            self.sent, self.received = hidden.sent + back.sent, hidden.received + back.received
            tick += 1
            if self._flights and tick > self._flights[0].entered + laps * ranks:
                yield self._finished(self._flights.popleft())
        if rank < ranks - 1:
            hidden.send(rank + 1, self._header(None))
        hidden.flush()
        back.flush()

    # --- who is where -------------------------------------------------------------------------
    def _entering(self, leader: Leader, tick: int) -> Flight | None:
        session = next(iter(self.parts.values()))
        going, self._keys = leader.next(session)
        self._began = time.time()
        return Flight(tick, session.frame) if going else None

    def _arriving(self, hidden: Link, tick: int) -> tuple[Flight | None, Tensor]:
        header, flat = hidden.receive(self.share.rank - 1)
        order = Order.decode(header, lambda prompt: self.world.ask(self.settings, prompt))
        given = flat.view(-1, *self._hidden[1:]).to(self.world.device)
        if order.played is None:
            return None, given
        session = next(iter(self.parts.values()))
        self._epoch += order.turns
        if order.back is not None:
            session.go_back(order.back)
        if (order.block, order.epoch) != (session.block, self._epoch):
            raise RuntimeError(f"got {order}, expected block {session.block}")
        return Flight(tick, session.frame, order), given

    def _on(self, flight: Flight, tick: int) -> bool:
        """Whether a block takes a step in this tick."""
        return (tick - flight.entered) % self.share.ranks == 0

    def _due(self, flight: Flight, tick: int) -> Due:
        step = (tick - flight.entered) // self.share.ranks
        session = self.parts[step]
        if flight.order is None:
            session.ready()
            return Due(flight, session.cells()[0], *session.begin(self._keys))
        assert flight.order.played is not None
        if flight.order.back is not None:
            session.go_back(flight.order.back)
        session.heed(flight.order.played)
        session.ready()
        known = self.share.rank == 0 or self.share.last
        x = flight.x if known else torch.zeros(self._shape)  # whose values nobody looks at
        begun = session.begin(flight.order.played.applied.controls, x=x)
        return Due(flight, session.cells()[0], *begun)

    def _leave(self, due: Due) -> None:
        """After a step: this lane has made the block."""
        flight, cell, making = due.flight, due.cell, due.making
        flight.x = making.x
        session = self.parts[cell.reads]
        block = Block(session.block, session.frame, making.x, due.applied)
        session.accept(block, making, {})
        if session.on_cell is not None:
            session.on_cell(cell)

    def _keep(self, due: Due) -> None:
        """Write this lane's state, where that is asked for after this block."""
        order, lane = due.flight.order, due.cell.reads
        assert order is not None
        if order.back is not None:
            forget(self._saves, order.back, self.share.rank, lane)
        for folder in order.saves:
            self.parts[lane].settle()
            keep(self.parts[lane], folder, self.share.rank, lane)

    def _finished(self, flight: Flight) -> tuple[Order, Block]:
        assert flight.order is not None and flight.x is not None
        block = Block(flight.order.block, flight.start, flight.x, self._played(flight))
        return flight.order, block

    @staticmethod
    def _played(flight: Flight) -> Applied:
        assert flight.order is not None and flight.order.played is not None
        return flight.order.played.applied

    # --- what is computed ---------------------------------------------------------------------
    def _pass(self, due: Sequence[Due], given: Tensor | None) -> Tensor:
        """This rank's layers over the rows of this tick. Returns what goes on: hidden states
        ``[S · rows, N, D]``, or on the last rank latents ``[S, C, F, h, w]``; each in the place of
        its step."""
        model, each = self.world.transformer, self.settings.rows
        if not due:  # fewer blocks than ranks: a message comes all the same
            return torch.zeros(self._back if self.share.last else self._hidden)
        views = [view for d in due for view in self.lanes[d.cell.reads]]
        told = [d.making.rows(d.cell, each) for d in due]
        latents, levels = (torch.cat(part) for part in zip(*told, strict=True))
        conditioning = side_by_side([d.making.conditioning for d in due])
        e, m = model.modulation(levels, conditioning)
        places = [slice(d.cell.level * each, (d.cell.level + 1) * each) for d in due]
        if given is None:
            x = model.tokens(latents, conditioning)
        else:
            x = torch.cat([given[place] for place in places])
        x = model.through(x, m, conditioning, Rows(views), True)
        for d in due:
            assert d.cell.publishes is not None
            read, into = self.lanes[d.cell.reads], self.lanes[d.cell.publishes]
            stage(d.cell, d.making.start, d.making.poses, read, into, self._shape[2])
        if not self.share.last:
            out = torch.zeros(self._hidden, dtype=x.dtype, device=x.device)
            for place, rows in zip(places, x.split(each), strict=True):
                out[place] = rows
            return out
        back = torch.zeros(self._back)
        for d, flow in zip(due, model.flow(x, e, latents).split(each), strict=True):
            d.making.take(d.cell, flow)
            back[d.cell.level] = d.making.x[0]
        return back

    def _returned(self, back: Link, tick: int) -> None:
        """Take what the last rank made in that tick of its own."""
        _, flat = back.receive(self.share.ranks - 1)
        made = flat.view(self._back).to(self.world.device)
        for flight in self._flights:
            step, off = divmod(tick - flight.entered, self.share.ranks)
            if tick >= flight.entered and not off:
                flight.x = made[step][None]

    # --- messages -----------------------------------------------------------------------------
    @property
    def _hidden(self) -> tuple[int, int, int]:
        config = self.world.transformer.config
        tokens = self._shape[2] * self.world.pool_of(self.settings.size).shape.tokens
        width = config.num_attention_heads * config.attention_head_dim
        return self._steps * self.settings.rows, tokens, width

    @property
    def _back(self) -> tuple[int, ...]:
        return self._steps, *self._shape[1:]

    def _links(self, device: torch.device) -> tuple[Link, Link]:
        return (
            Link(self._hidden, self.world.dtype, device),
            # With two ranks both ways lie between the same ones.
            Link(self._back, torch.float32, device, dist.new_group()),
        )

    def _header(self, entering: Flight | None) -> bytes:
        if entering is None or entering.order is None:
            return STOP.encode()
        return entering.order.encode()
