"""One rank of a run: it takes blocks from the rank before, does its own steps, and sends them on.

Each rank is a session of some lanes (`worldsim.session`), so that all of them play the same blocks
under the same controls with the very functions of the serial form. The first rank decides what a
block is made under, and its order goes along with the block. A block is sent on before it is
committed: the context pass of a rank runs while the next rank is denoising.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from worldsim.config import Settings
from worldsim.controls import Control
from worldsim.recorder import RunFile
from worldsim.saving import Saved, load, opened, read
from worldsim.schedule import Cell
from worldsim.script import Script
from worldsim.session import Session, decode
from worldsim.share import Share
from worldsim.state import Asked, Block, Decoding
from worldsim.streaming.faults import Beat, Store
from worldsim.streaming.kept import file_of, keep, keep_decoder, read_decoder
from worldsim.streaming.link import STOP, Link, Order
from worldsim.streaming.rehearsal import rehearse
from worldsim.streaming.ring import Ring
from worldsim.streaming.split import portion
from worldsim.streaming.words import share_words
from worldsim.world import World


@dataclass(frozen=True)
class Run:
    """Everything that ranks have to know; it goes to other processes.

    Attributes:
        opener: opens the world, or what a rank needs of it.
        ranks: how many.
        settings: arguments of `World.settings`.
        prompt, controls: of `World.script`; where it is not ``scripted``, the player decides.
        blocks: how many there will be in all; None: until it is stopped.
        backend: of torch.distributed.
        decoding: make pictures; else there are latents only.
        overlap: where the last rank has steps as well, it decodes on a thread of its own.
        rehearse: seconds that each pass sleeps instead of computing; None computes.
        log: note every cell that ran.
        saves: a folder for the ranks' states, one every so many blocks (``every``).
        resume: what to go on from: a folder of as many ranks' states, or what `Session.save` wrote.
        record: a replay file (.wsrun) that the last rank writes.
        fingerprint: of the whole world, which no rank has: needed to record, and where it is given
            a serial session's file must be of that world.
    """

    opener: Callable[[Share], World]
    ranks: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    controls: str | None = None
    scripted: bool = True
    blocks: int | None = None
    backend: str = "gloo"
    decoding: bool = True
    overlap: bool = True
    rehearse: float | None = None
    log: bool = False
    saves: str | None = None
    every: int = 0
    resume: str | None = None
    record: str | None = None
    fingerprint: str = ""


class Inbox(Protocol):
    """Where the first rank hears from outside; a `multiprocessing` connection, say."""

    def poll(self) -> bool: ...
    def recv(self) -> tuple[str, dict[str, Any]]: ...


class Leader:
    """Decides what each block is made under, on the first rank."""

    def __init__(self, run: Run, script: Script | None, inbox: Inbox | None) -> None:
        self._run, self._script, self._inbox = run, script, inbox
        self._stopped = False
        self._epoch = 0

    def next(self, session: Session) -> tuple[bool, Sequence[Control] | None]:
        """Whether a block is to be made, and its controls (None: what is held)."""
        while self._inbox is not None and self._inbox.poll():
            name, arguments = self._inbox.recv()
            if name == "stop":
                self._stopped = True
            else:
                getattr(session, name)(**arguments)
        over = self._run.blocks is not None and session.block >= self._run.blocks
        if self._stopped or over:
            return False, None
        return True, None if self._script is None else session.follow(self._script)

    def order(self, session: Session, began: float) -> Order:
        """Of the block that a session has just made, and began at that time."""
        played, run, done = session.now.past[-1], self._run, session.block
        self._epoch += len(played.changes)
        start = session.frame - len(played.applied.controls)
        saves = run.saves is not None and run.every and done % run.every == 0
        folder = str(Path(run.saves or "", f"block-{done:06d}")) if saves else None
        return Order(done - 1, start, self._epoch, played, folder, began)


class Rank:
    """One rank's work.

    Attributes:
        world: what it needs of it.
        ran: (kind, block, level) of each cell that it ran, where the run keeps a log.
        messages: how many it has sent and received.
    """

    def __init__(
        self, run: Run, share: Share, store: Store, beat: Beat, inbox: Inbox | None = None
    ) -> None:
        self.run, self.share, self._beat = run, share, beat
        self.ran: list[tuple[str, int, int]] = []
        self.messages = (0, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever started the run has heard it
            self.world = run.opener(share)
            if run.rehearse is not None:
                rehearse(self.world, run.rehearse)
            if run.saves is not None or run.resume is not None:
                _ = self.world.fingerprint  # now: words are read elsewhere from here on
            share_words(self.world, store, share)
            self.settings: Settings = self.world.settings(**run.settings)
            script = None
            if share.rank == 0 and run.scripted:
                script = self.world.script(run.prompt, run.controls)
            first = run.prompt if script is None else script.prompt(0)
            self._asked = self._agreed(first, store)
        self._leader = Leader(run, script, inbox)
        self._record: RunFile | None = None
        if run.record is not None and share.last:
            told = self.settings, self._asked.prompt, run.fingerprint
            self._record = RunFile(run.record, self.world, *told)
        self._epoch = 0
        self._decoding = Decoding()
        if run.resume is not None and share.decodes:
            self._decoding = self._resumed_decoding(Path(run.resume))

    def _agreed(self, words: str | None, store: Store) -> Asked:
        """What the first block is asked for, as the first rank says."""
        if self.share.rank == 0:
            asked = self.world.ask(self.settings, words)
            store.set("prompt", asked.prompt)
            return asked
        return self._ask(store.get("prompt").decode())

    def blocks(self) -> Iterator[tuple[Order, Block]]:
        """Run to the end. Yields each block after this rank's part of it; on the last rank it is
        finished, and not decoded.

        Raises:
            PeerLost: where another rank is gone.
        """
        made = self._received() if not self.share.steps else self._made()
        for order, block in made:
            self._beat.block = order.block
            yield order, block

    def finish(self, order: Order, block: Block) -> Block:
        """Record and decode a finished block, on the last rank; blocks come in order."""
        if self._record is not None:
            assert order.played is not None
            self._record.made(order.played, block)
        if self.run.decoding and self.world.autoencoder is not None:
            carry = decode(self.world.autoencoder, block, self._decoding.carry)
            self._decoding = Decoding(block.index + 1, carry)
        if order.save is not None:
            keep_decoder(order.save, self._decoding)
        block.timings["flight"] = time.time() - order.begun
        return block

    def _made(self) -> Iterator[tuple[Order, Block]]:
        schedule, share = self.settings.schedule, self.share
        if schedule.order == "layers" and share.ranks > 1:
            parts = {lane: self._session((lane,), lane) for lane in schedule.lanes}
            ring = Ring(self.world, self.settings, parts, share)
            try:
                for made in ring.blocks(self._leader, self._device()):
                    self.messages = ring.sent, ring.received
                    yield made
            finally:
                for part in parts.values():
                    part.close()
            return
        mine = [cell for cell in schedule.cells(0) if cell.level in share.steps]
        lanes = tuple(cell.reads for cell in mine) if share.ranks > 1 else schedule.lanes
        with self._session(lanes) as session:
            yield from self._steps(session)

    def _session(self, lanes: tuple[int, ...], lane: int | None = None) -> Session:
        """A session of these lanes, new or out of a saved state."""

        def new(settings: Settings, asked: Asked) -> Session:
            if settings != self.settings:
                raise ValueError(f"{self.run.resume} was saved under other settings: give its own")
            return Session(self.world, settings, asked, lanes=lanes)

        if self.run.resume is None:
            session = new(self.settings, self._asked)
        elif Path(self.run.resume).is_file():
            part = portion(self._serial(self.run.resume), lanes, self.share.layers)
            session = opened(part, new, self.run.resume)
        else:
            session = load(self.world, file_of(self.run.resume, self.share.rank, lane), new)
        if self.run.log:
            session.on_cell = self._note
        return session

    def _serial(self, path: str | Path) -> Saved:
        """A serial session's state, whole."""
        saved, fingerprint = read(self.world, path), self.run.fingerprint
        if fingerprint and saved.fingerprint != fingerprint:
            raise ValueError(f"{path} is of a world {saved.world!r} with other weights")
        return saved

    def _resumed_decoding(self, source: Path) -> Decoding:
        if not source.is_file():
            return read_decoder(self.world, source)
        saved = self._serial(source)
        if self.run.decoding and saved.decoding.decoded != saved.moment.block:
            raise ValueError(f"{source} was saved before its pictures were made: decode them first")
        return saved.decoding

    # --- steps on ranks -----------------------------------------------------------------------
    def _steps(self, session: Session) -> Iterator[tuple[Order, Block]]:
        rank, last = self.share.rank, self.share.last
        link = self._link()
        while True:
            self._beat.block = session.block
            if rank == 0:
                going, keys = self._leader.next(session)
                if not going:
                    break
                began = time.time()
                block = session.denoise(keys)
                order = self._leader.order(session, began)
            else:
                header, flat = link.receive(rank - 1)
                order = Order.decode(header, self._ask)
                if order.played is None:
                    break
                block = self._follow(session, order, flat)
            if not last:
                link.send(rank + 1, order.encode(), block.latents)
            session.settle()  # send, then commit
            if order.save is not None:
                keep(session, order.save, rank)
            self.messages = link.sent, link.received
            yield order, block
        if not last:
            link.send(rank + 1, STOP.encode())
            link.flush()

    def _follow(self, session: Session, order: Order, flat: Tensor) -> Block:
        """Do this rank's steps of a block that was begun elsewhere."""
        assert order.played is not None
        self._epoch += len(order.played.changes)
        if (order.block, order.epoch) != (session.block, self._epoch):
            raise RuntimeError(
                f"got block {order.block} of epoch {order.epoch}, expected {session.block} of "
                f"{self._epoch}"
            )
        session.heed(order.played)
        x = self._latents(flat, session.latent_shape)
        block = session.denoise(order.played.applied.controls, x=x)
        block.applied = order.played.applied  # events are counted where they are heard
        return block

    def _received(self) -> Iterator[tuple[Order, Block]]:
        """Finished blocks, on the rank that only decodes."""
        link = self._link()
        while True:
            header, flat = link.receive(self.share.rank - 1)
            order = Order.decode(header, self._ask)
            if order.played is None:
                return
            self.messages = link.sent, link.received
            applied = order.played.applied
            shape = self.world.latents_of(self.settings.size, len(applied.controls))
            yield order, Block(order.block, order.start, self._latents(flat, shape), applied)

    # --- small things -------------------------------------------------------------------------
    def _note(self, cell: Cell) -> None:
        self.ran.append((cell.kind, cell.block, cell.level))

    def _ask(self, prompt: str) -> Asked:
        return self.world.ask(self.settings, prompt)

    def _latents(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        return flat[: torch.Size(shape).numel()].view(shape).to(self.world.device)

    def _link(self) -> Link:
        shape = self.world.latents_of(self.settings.size, self.world.config.block_frames)
        return Link(shape, torch.float32, self._device())

    def _device(self) -> torch.device:
        """Where messages lie: gloo wants them in the computer's memory."""
        return self.world.device if self.run.backend == "nccl" else torch.device("cpu")
