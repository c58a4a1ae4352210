"""One live world: what a player does in it, its pictures, and going back and on.

How its next block is made is `worldsim.maker`. What it goes on from is a `worldsim.state.Snapshot`,
so fork, rewind, save and replay are all the same act.
"""

from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worldsim.cache.context import Event
from worldsim.config import Settings
from worldsim.controls import Control, ControlState, Keys, Receipt
from worldsim.history import History
from worldsim.maker import Maker, heeded
from worldsim.memory import MemoryReport
from worldsim.models.autoencoder import Carry, Decoder, to_pictures
from worldsim.parts import part
from worldsim.rollout import Known, Noise, OnStep
from worldsim.script import Script
from worldsim.state import Asked, Block, Change, Decoding, Made, Played, Snapshot

if TYPE_CHECKING:
    from worldsim.recorder import Recorder
    from worldsim.world import World


class Session(Maker):
    """Opened by `World.session`. Not to be shared between threads, except that one thread may
    `denoise` while another decodes the blocks that came before.
    """

    def __init__(
        self,
        world: "World",
        settings: Settings,
        asked: Asked,
        noise: Noise | None = None,
        history: int = 0,
        awake: bool = True,
        lanes: Container[int] | None = None,
    ) -> None:
        """See `Maker`."""
        super().__init__(world, settings, asked, noise, history, awake, lanes)
        self.recorder: Recorder | None = None
        self._left: Block | None = None  # made by `step`, and not decoded yet
        self._going = Flag()
        self._going.set()

    # --- what it is now -----------------------------------------------------------------------
    @property
    def held(self) -> Keys:
        """What the player holds now."""
        return self.now.held.buttons

    @property
    def decoded(self) -> int:
        """Number of the next block to decode."""
        return self.decoding.decoded

    @property
    def carry(self) -> Carry:
        """What the decoder remembers."""
        return self.decoding.carry

    @property
    def given(self) -> list[Block]:
        """Its first blocks, where it was given some; not decoded."""
        return [replace(block) for block in self.now.given]

    # --- what the player does -----------------------------------------------------------------
    def control(
        self,
        buttons: Collection[str] | None = None,
        prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        state: ControlState | None = None,
    ) -> Receipt:
        """Set what is held or asked for, from the next block on; None leaves it as it is.

        Of several calls before a block the last one counts, but a key that was pressed and let go
        of in between is held for that block, and looks and scrolls are summed.

        Args:
            state: all at once, in place of ``buttons`` and ``prompt``; without an ``event_id`` it
                gets the next one.

        Raises:
            ValueError: for a key or prompt that this world does not know.
        """
        if isinstance(buttons, str):
            raise ValueError("control: buttons is a set of codes, as in {'KeyW'}")
        newest = self.now.held.newest
        if state is None:
            keys = newest.buttons if buttons is None else frozenset(buttons)
            state = ControlState(keys, move=newest.move, prompt=prompt)
        elif buttons is not None or prompt is not None:
            raise ValueError("control: give buttons and a prompt, or a state that holds both")
        heard = self.world.actions.heard(state)
        if not heard.event_id:
            heard = replace(heard, event_id=newest.event_id + 1)
        held = self.now.held.heard(heard)
        if heard.prompt is not None or prompt_embeds is not None:
            negative = self.asked.negative
            self._change(self.world.ask(self.settings, heard.prompt, prompt_embeds, negative))
        self.now = replace(self.now, held=held)
        return Receipt(heard.event_id, self.block)

    def follow(self, script: Script) -> list[ControlState]:
        """Take over what a script asks for at the next block; returns its controls."""
        frames = self.block_frames
        if (prompt := script.prompt(self.frame)) != self.prompt:
            self.control(prompt=prompt)
        if script.cuts(self.frame, frames):
            self.cut()
        return script.held(self.frame, frames)

    def step(
        self,
        keys: Sequence[Control] | None = None,
        on_step: OnStep | None = None,
        known: Known | None = None,
    ) -> Block:
        """Make and decode the next block; ``keys`` gives held keys, or a `ControlState`, for each
        of its frames.

        ``known``: frames of it that are given, and only guide the others (a last picture, say).
        """
        if self.paused:
            raise ValueError("this session is paused: resume() it first")
        for given in self.given[self.decoded :]:
            self.decode(given)  # the decoder remembers what it began with
        self._finish()
        return self._see(self.denoise(keys, on_step, known))

    def __iter__(self) -> Iterator[Block]:
        """Blocks for ever; while it is paused, the next one waits."""
        while True:
            self._going.wait()
            yield self.step()

    def pause(self) -> None:
        """No block is made until `resume`; may be called from any thread."""
        self._going.clear()
        if self.recorder is not None:
            self.recorder.paused(self, True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._going.set()
        if self.recorder is not None:
            self.recorder.paused(self, False)

    @property
    def paused(self) -> bool:
        return not self._going.is_set()

    def decode(self, block: Block) -> Block:
        """Fill in ``block.frames``: every block once, in order, since the decoder remembers. In a
        world without a decoder they stay empty.

        Raises:
            ValueError: for a block that is not the next one.
        """
        if self.world.autoencoder is None:
            return block
        if block.index != self.decoded:
            raise ValueError(
                f"block {block.index} cannot be decoded now: the next one is {self.decoded}"
            )
        carry = decode(self.world.autoencoder, block, self.carry)
        self.decoding = Decoding(self.decoded + 1, carry)
        return block

    def _see(self, block: Block) -> Block:
        """Decode a block that it has made; where that is broken off, `_finish` does it."""
        self._left = block
        self.decode(block)
        self._left = None
        return block

    def _finish(self) -> None:
        """Decode what was left when `_see` was broken off."""
        if self._left is not None and self._left.index >= self.decoded:
            self._see(self._left)
        self._left = None

    def _accept(
        self, made: Made, known: Known | None = None, given: Tensor | None = None
    ) -> Played:
        played = super()._accept(made, known, given)
        if self.recorder is not None:
            self.recorder.made(self, played, made.block)
        return played

    # --- events -------------------------------------------------------------------------------
    def cut(self) -> None:
        """The next block begins a new scene: it sees all that came before as if from afar."""
        self._change(Event.CUT)

    def flush(self) -> None:
        """Forget all but the sink and the newest frame."""
        self._change(Event.FLUSH)

    def reset(self) -> None:
        """Forget everything."""
        self._change(Event.RESET)

    def recache(self) -> None:
        """Commit the recent frames anew under the present prompt, block by block, each over what
        was committed before it (LongLive). The sink and mid stay as they are.

        Raises:
            ValueError: under a schedule that reads what steps leave behind.
        """
        self.settings.schedule.check_recache()
        self._change(Event.RECACHE)

    def _change(self, change: Change) -> None:
        """Do what is asked for between two blocks, and note it."""
        if isinstance(change, Asked):
            self.now = replace(self.now, asked=self._in_full(change))
            change = change.bare()
        elif change is Event.RECACHE:
            self._recache()
        else:
            self._event(change)
        changes = self.now.changes
        if isinstance(change, Asked) and changes and isinstance(changes[-1], Asked):
            changes = changes[:-1]  # nothing was made under those words
        self.now = replace(self.now, changes=(*changes, change))

    def _in_full(self, asked: Asked) -> Asked:
        """What is asked for, with its keys and values; those that it has now need no new ones."""
        if asked.keys:
            return asked
        if asked.same(self.asked) and asked.negative is self.asked.negative:
            return self.asked
        words = asked.prompt if asked.embeds is None else None
        return self.world.ask(self.settings, words, asked.embeds, asked.negative)

    # --- going on from elsewhere --------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """All that it goes on from, without a copy; the pages are free again when nobody has it.

        Raises:
            ValueError: if blocks that it made still have to be decoded.
        """
        self.settle()
        self._check_in_step("a snapshot")
        return self._capture()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of this session or of another one under the same settings.

        Raises:
            ValueError: for one of other settings, or of another world.
        """
        if snapshot.settings != self.settings or snapshot.noise != self._noise:
            raise ValueError("this snapshot was taken under other settings: open a session like it")
        if self._closed or snapshot.pool is not self.context.pool:
            raise ValueError(
                "this snapshot is of another world, or of before it was moved or cast: open a new "
                "session"
            )
        if self.recorder is not None:
            if not self.now.comes_from(snapshot.moment):
                raise ValueError("a session that is recorded can only go back along its own way")
            self.recorder.rewound(self, snapshot.block)
        self._go_to(snapshot)

    def _go_to(self, snapshot: Snapshot) -> None:
        asked = self._in_full(snapshot.moment.asked)
        self._pending = self._left = None
        self._lanes.restore(snapshot.tables, snapshot.newest)
        self.now, self.decoding = replace(snapshot.moment, asked=asked), snapshot.decoding
        self.history.go_to(snapshot)

    def fork(self) -> "Session":
        """A twin that goes its own way from here. Both share the pages committed so far, and until
        the twin makes a block it costs nothing."""
        here = self.snapshot()
        twin = Session(
            self.world, self.settings, self.asked, self._noise, self._history_bytes, awake=False
        )
        twin.history = self.history.copy()
        twin._go_to(here)
        if self.recorder is not None:
            twin.recorder = self.recorder
            self.recorder.forked(self, twin)
        return twin

    def rewind(self, to_block: int) -> None:
        """Go back to right before block ``to_block``: from the nearest snapshot that is kept, and
        from there by making the blocks between once more.

        Raises:
            ValueError: for a block that it has not come to, or the way to which is forgotten; if
                blocks that it made still have to be decoded.
        """
        self.settle()
        self._finish()
        seen, before = self.decoded > 0, self.now
        recorder, self.recorder = self.recorder, None  # what is made again is no news
        try:
            for played in self.go_back(to_block):
                block = self.play(played)
                if seen:
                    self._see(block)
        finally:  # it may be broken off, and stand anywhere
            self.recorder = recorder
            if recorder is not None and self.now is not before:
                recorder.rewound(self, self.block)

    def go_back(self, to_block: int) -> tuple[Played, ...]:
        """The first half of `rewind`: go on from the nearest snapshot that is kept. Returns how the
        blocks from there to ``to_block`` came to be, for `play`."""
        self.settle()
        self._check_in_step("going back")
        now = self.now
        if not 0 <= to_block <= now.block:
            raise ValueError(f"cannot go back to block {to_block}: the next one is {now.block}")
        self.restore(self.history.before(to_block, now))
        known = self.block - now.reach  # blocks before it, of those whose way is known
        if known:  # a snapshot may have been taken after the next block's keys were heard
            self.now = replace(self.now, held=heeded(now.past[known - 1].held, self.frame))
        return now.past[known : to_block - now.reach]

    def play(self, played: Played) -> Block:
        """Make a block the way that one was made; it is not decoded."""
        self.heed(played)
        if played.given is not None:
            return self.give(played.given, played.applied.controls)
        return self.denoise(played.applied.controls, known=played.known)

    def heed(self, played: Played) -> None:
        """Do and hear what was done and heard before that block."""
        done = len(self.now.changes)  # already
        if done and isinstance(self.now.changes[-1], Asked):
            done -= 1  # other words may have come in their place since
        for change in played.changes[done:]:
            self._change(change)
        self.now = replace(self.now, held=played.held)

    def _check_in_step(self, what: str) -> None:
        self._finish()
        if not self._in_step:
            raise ValueError(
                f"block {self.decoded} is not decoded yet: decode all blocks before {what}"
            )

    def save(self, path: str | Path) -> None:
        """Write all that it goes on from to a .safetensors file; `World.load_session` reads it.

        Raises:
            ValueError: for a session whose noise is a function of the caller's.
        """
        from worldsim.saving import save

        save(self, path)

    def record(self, path: str | Path) -> "Recorder":
        """Write a replay file (.wsrun) of all that is done from here on, forks included.

        Raises:
            ValueError: if it has made blocks already (given ones may be there), or has what no file
                can hold, or is being recorded.
            OSError: where it cannot be written.
        """
        from worldsim.recorder import Recorder

        if self.recorder is not None:
            raise ValueError(f"this session is recorded already, to {self.recorder.path}")

        self.recorder = Recorder(path, self)
        return self.recorder

    @property
    def has_own_noise(self) -> bool:
        """Whether its noise comes from the caller, not from the seed."""
        return self._noise is not None

    def remember(self, most: int) -> None:
        """Keep so many snapshots to rewind to, whatever they take; before its first block."""
        self.history, self._lanes.snapshots = History(most), most
        self.history.add(self._capture())

    # --- memory, and the end ------------------------------------------------------------------
    def memory_report(self) -> MemoryReport:
        """Bytes that it holds and ever will; see `World.memory_report`, which says it before."""
        scratch = self.view.nbytes
        given = sum(block.latents.nbytes for block in self.now.given)
        return self.world.memory_of(
            self.settings, self.context, scratch, self._history_bytes, given
        )

    def close(self) -> None:
        """Give the pages back to the world."""
        self._pending = None
        self.history = History(0)
        self.now = replace(self.now, made=(), past=())
        self._lanes.close()
        self._closed = True

    def __repr__(self) -> str:
        return f"Session(block {self.block}, seed {self.settings.seed}, {self.prompt!r})"

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@torch.inference_mode()
def decode(autoencoder: Decoder, block: Block, carry: Carry) -> Carry:
    """Fill in the pictures of a stream's next block; returns the decoder's new carry."""
    with part("decode", block.index, block.timings):
        decoded, carry = autoencoder.decode(block.latents, carry)
        block.frames = to_pictures(decoded).cpu().numpy()
    return carry
