"""One rank of a run: it takes blocks from the rank before, does its own steps, and sends them on.

Each rank is a session of some lanes (`worldsim.session`), so that all of them play the same blocks
under the same controls with the very functions of the serial form. The first rank decides what a
block is made under, and its order goes along with the block. A block is sent on before it is
committed: the context pass of a rank runs while the next rank is denoising.
"""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from worldsim.config import Settings
from worldsim.parts import part
from worldsim.recorder import RunFile
from worldsim.saving import Saved, load, opened, read
from worldsim.schedule import Cell
from worldsim.session import Session, decode
from worldsim.share import Share
from worldsim.state import Asked, Block, Decoding
from worldsim.streaming.faults import Beat, Store
from worldsim.streaming.kept import (
    file_of,
    forget,
    forget_decoder,
    keep,
    keep_decoder,
    read_decoder,
    thin,
)
from worldsim.streaming.leader import Inbox, Leader, Run
from worldsim.streaming.link import STOP, Link, Order
from worldsim.streaming.rehearsal import rehearse
from worldsim.streaming.ring import Ring
from worldsim.streaming.split import portion
from worldsim.streaming.words import hear, share_words


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
            if run.keeps:
                _ = self.world.fingerprint  # now: words are read elsewhere from here on
            words = share_words(self.world, store, share)
            self.settings: Settings = self.world.settings(**run.settings)
            script = None
            if share.rank == 0 and run.scripted:
                script = self.world.script(run.prompt, run.controls)
            first = run.prompt if script is None else script.prompt(0)
            self._asked = self._agreed(first, store)
        self._leader = Leader(run, script, inbox, words)
        self._store, self._heard = store, False
        self._record: RunFile | None = None
        if run.record is not None and run.resume is not None:
            raise ValueError("a recording begins with its run: give record= or resume=")
        if run.record is not None and share.last:
            told = self.settings, self._asked.prompt, run.fingerprint
            self._record = RunFile(run.record, self.world, *told)
        self._epoch = 0
        self._decoding = Decoding()
        self._decodings: dict[int, Decoding] = {}  # right before the blocks that one may go back to
        self._went_back = False
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
            if order.turns or not self._heard:
                self._heard = True
                hear(self._store, self.share.rank, order.epoch)
            yield order, block

    def finish(self, order: Order, block: Block) -> Block:
        """Record and decode a finished block, on the last rank; blocks come in order."""
        self._note_down(order, block)
        self._go_back(order)
        if self.run.decoding and self.world.autoencoder is not None:
            carry = decode(self.world.autoencoder, block, self._decoding.carry)
            self._decoding = Decoding(block.index + 1, carry)
        for folder in order.saves:
            keep_decoder(folder, self._decoding)
            thin(self.run.saves, order.block)
        block.timings["flight"] = time.time() - order.begun
        return block

    def _note_down(self, order: Order, block: Block) -> None:
        """Add a block to the replay file."""
        if self._record is None:
            return
        self._went_back |= order.back is not None
        if order.again:
            return  # what is made again is no news
        if self._went_back:
            self._record.write({"rewind": order.block})
            self._went_back = False
        assert order.played is not None
        self._record.made(order.played, block)

    def _go_back(self, order: Order) -> None:
        """Have the decoder go back with the others, and keep what they keep."""
        if order.back is not None:
            self._decoding = self._decodings[order.back]
            self._decodings = {n: d for n, d in self._decodings.items() if n <= order.back}
            forget_decoder(self.run.saves, order.back)
        self._decodings.setdefault(order.block, self._decoding)
        self._decodings = {n: d for n, d in self._decodings.items() if n in order.kept}

    def _made(self) -> Iterator[tuple[Order, Block]]:
        schedule, share = self.settings.schedule, self.share
        if schedule.order == "layers" and share.ranks > 1:
            parts = {lane: self._session((lane,), lane) for lane in schedule.lanes}
            ring = Ring(self.world, self.settings, parts, share, self.run.saves)
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
            session = Session(self.world, settings, asked, lanes=lanes, awake=False)
            session.remember(self.run.snapshots)
            return session

        if self.run.resume is None:
            session = new(self.settings, self._asked)
        elif Path(self.run.resume).is_file():
            mine = portion(self._serial(self.run.resume), lanes, self.share.layers)
            session = opened(mine, new, self.run.resume)
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
            link.flush()  # none waits between two ranks: a control would wait with it
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
            with part("commit", order.block, block.timings):
                session.settle()  # send, then commit
            if order.back is not None:
                forget(self.run.saves, order.back, rank)
            for folder in order.saves:
                keep(session, folder, rank)
            self.messages = link.sent, link.received
            yield order, block
        if not last:
            link.send(rank + 1, STOP.encode())
            link.flush()

    def _follow(self, session: Session, order: Order, flat: Tensor) -> Block:
        """Do this rank's steps of a block that was begun elsewhere."""
        assert order.played is not None
        self._epoch += order.turns
        if order.back is not None:
            session.go_back(order.back)
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
