"""One live world: all state that changes, changed only at block boundaries.

What a session goes on from is a `worldsim.state.Snapshot`: its moment, its page tables and what the
decoder remembers. Noise is a function of (seed, block, step), so this is everything.
"""

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worldsim.cache.context import Context, Event
from worldsim.cache.policy import Pose
from worldsim.conditioning import conditioning
from worldsim.config import Settings
from worldsim.controls import Control, ControlState, Held, Keys, Receipt
from worldsim.history import PAST, History
from worldsim.lanes import Lanes, Views
from worldsim.memory import MemoryReport, latents_kept, snapshots_kept
from worldsim.models.autoencoder import Carry, Decoder, to_pictures
from worldsim.models.transformer import Conditioning
from worldsim.models.view import ContextView
from worldsim.noise import noise
from worldsim.parts import part
from worldsim.rollout import Known, Making, Noise, OnStep, commit, denoise, publish
from worldsim.schedule import Cell, Schedule
from worldsim.script import Script
from worldsim.state import (
    Applied,
    Asked,
    Block,
    Change,
    Decoding,
    Made,
    Moment,
    Played,
    Snapshot,
)

if TYPE_CHECKING:
    from worldsim.recorder import Recorder
    from worldsim.world import World


class Session:
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
        """``lanes``: only these, and the cells that read them; other sessions have the others, and
        make the same blocks under the same controls."""
        self.world = world
        self.settings = settings
        self.now = Moment(asked, origin=object(), pose=(0.0,) * world.actions.pose_dim)
        self.decoding = Decoding()
        self._noise = noise
        self.recorder: Recorder | None = None
        self._closed = False
        self._going = Flag()
        self._going.set()
        self._pending: Made | None = None  # its context pass has not run yet
        self.on_cell: Callable[[Cell], None] | None = None  # sees each cell that has run
        pool, frames = world.pool_of(settings.size), world.config.block_frames
        by_head = world.device.type == "cpu" and world.forward is world.transformer
        self._lanes = Lanes(pool, settings, frames, world.actions.camera, lanes, by_head)
        self._history_bytes = history
        self.history = History(snapshots_kept(history, self._lanes.snapshot_nbytes))
        self._lanes.snapshots = self.history.most
        if awake:
            self._lanes.wake()
        self.history.add(self._capture())

    # --- what it is now -----------------------------------------------------------------------
    @property
    def block(self) -> int:
        """Number of the next block."""
        return self.now.block

    @property
    def frame(self) -> int:
        """Absolute index of the next block's first latent frame."""
        return self.now.frame

    @property
    def asked(self) -> Asked:
        return self.now.asked

    @property
    def held(self) -> Keys:
        """What the player holds now."""
        return self.now.held.buttons

    @property
    def pose(self) -> Pose:
        """Where the player is, by dead reckoning: x, y, heading; see `ActionSpec.pose_dim`."""
        return self.now.pose

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

    @property
    def lanes(self) -> Views:
        """What passes read and stage, by the lane of the schedule."""
        return self._lanes.views

    @property
    def views(self) -> list[ContextView]:
        """Its first lane: a view for each row."""
        return next(iter(self.lanes.values()))

    @property
    def prompt(self) -> str:
        return self.asked.prompt

    @property
    def view(self) -> ContextView:
        """What the prompt's passes read."""
        return self.views[0]

    @property
    def context(self) -> Context:
        """What earlier blocks left behind under the prompt."""
        return self._lanes.first

    @property
    def block_frames(self) -> int:
        """Latent frames of the next block."""
        alone = self.settings.independent_first_frame and self.block == 0
        return 1 if alone else self.world.config.block_frames

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of the next block, ``[1, C, F, h, w]``."""
        return self.world.latents_of(self.settings.size, self.block_frames)

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
            raise ValueError(f"control: buttons is a set of codes, as in {{{buttons!r}}}")
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
        return self.decode(self.denoise(keys, on_step, known))

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

    @torch.inference_mode()
    def denoise(
        self,
        keys: Sequence[Control] | None = None,
        on_step: OnStep | None = None,
        known: Known | None = None,
        x: Tensor | None = None,
    ) -> Block:
        """Make the next block's latents. The block before is committed first, the new one later:
        nobody waits for a context pass who wants to see a picture.

        ``x``: where this session has some of the lanes only, what its first cell goes on from; the
        block that it returns is what its last cell leads to.
        """
        timings = {"commit": 0.0}
        with part("commit", self.block - 1, timings) if self.block else nullcontext():
            self.ready()
        with part("denoise", self.block, timings):
            making, applied = self.begin(keys, on_step, known, x)
            noisy: dict[int, Tensor] = {}
            for cell in self.cells():
                denoise(self.world.forward, cell, making, self.lanes)
                self._ran(cell)
                noisy[cell.level + 1] = making.x
        block = Block(self.block, self.frame, making.x, applied, timings=timings)
        self.accept(block, making, noisy, known)
        return block

    def ready(self) -> None:
        """End what came before the next block: it is committed, and a new prompt heeded."""
        self.settle()
        self._remember()
        self._heed_prompt()

    def cells(self) -> list[Cell]:
        """The next block's denoise cells, of these lanes."""
        cells = self.settings.schedule.cells(self.block)
        return [cell for cell in cells if cell.reads in self._lanes]

    def begin(
        self,
        keys: Sequence[Control] | None = None,
        on_step: OnStep | None = None,
        known: Known | None = None,
        x: Tensor | None = None,
    ) -> tuple[Making, Applied]:
        """Begin the next block, after `ready`: all that its cells share, and what it is made
        under."""
        applied = self._applied(self._live() if keys is None else keys)
        conditioning, poses = self._conditioning(applied, self.pose)
        self._prepare(self.frame, self.block_frames, poses)
        making = Making(
            self.cells(), conditioning, self._fresh, self.latent_shape, self.world.device,
            self.settings.sampler, on_step, self.settings.guidance, known,
            start=self.frame, poses=poses, x=x,
        )  # fmt: skip
        return making, applied

    def accept(
        self, block: Block, making: Making, noisy: Mapping[int, Tensor], known: Known | None = None
    ) -> None:
        """Take a block that its cells have made. ``noisy``: what they led to, by its level."""
        wanted = {cell.level for cell in self.settings.schedule.commit_cells(block.index)}
        kept = tuple((level, x) for level, x in noisy.items() if level in wanted)
        made = Made(block, making.conditioning, tuple(making.poses), self.pose, kept)
        self._accept(made, known=known)

    @torch.inference_mode()
    def give(self, latents: Tensor, keys: Sequence[Control] | None = None) -> Block:
        """Take ``[1, C, F, h, w]`` as the next block instead of making it; draws no noise."""
        self.settle()
        self._heed_prompt()
        frames = self.block_frames
        if tuple(latents.shape) != self.latent_shape:
            raise ValueError(
                f"a given block must be {self.latent_shape}, got {tuple(latents.shape)}"
            )
        applied = self._applied([ControlState()] * frames if keys is None else keys)
        conditioning, poses = self._conditioning(applied, self.pose)
        self._prepare(self.frame, frames, poses)
        # A copy: its context pass comes later, and by then the caller's may be something else.
        own = latents.detach().to(self.world.device, torch.float32, copy=True)
        block = Block(self.block, self.frame, own, applied)
        block.timings.update(commit=0.0, denoise=0.0)  # it was neither waited for nor made
        begins = self.block == len(self.now.given)
        self._accept(Made(block, conditioning, poses, self.pose, given=True), given=own)
        if begins:
            self.now = replace(self.now, given=(*self.now.given, replace(block)))
        return block

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

    @torch.inference_mode()
    def settle(self) -> None:
        """Run the context pass of the newest block, if it has not run yet.

        Raises:
            ValueError: if the session is closed, or the world was moved or cast since it began.
        """
        if self._closed:
            raise ValueError("this session is closed: open a new one")
        if self.context.pool is not self.world.pool_of(self.settings.size):
            raise ValueError("the world was moved or cast since this session began: open a new one")
        if self._pending is None:
            return
        made = self._pending
        self._commit(made)
        # Without pictures and text: both would be many times what the latents are.
        bare = Block(made.block.index, made.block.start, made.block.latents, made.block.applied)
        told = replace(made.conditioning, text_keys=(), text_values=())
        kept = latents_kept(self.settings.cache, self.world.config.block_frames)
        all_made = (*self.now.made, replace(made, block=bare, conditioning=told, noisy=()))
        recent = all_made if kept is None else all_made[max(0, len(all_made) - kept) :]
        self.now = replace(self.now, made=recent)
        self._pending = None

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
        check_recache(self.settings.schedule)
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
        self.now = replace(self.now, changes=(*self.now.changes, change))

    def _in_full(self, asked: Asked) -> Asked:
        """What is asked for, with its keys and values; those that it has now need no new ones."""
        if asked.keys:
            return asked
        if asked.same(self.asked) and asked.negative is self.asked.negative:
            return self.asked
        words = asked.prompt if asked.embeds is None else None
        return self.world.ask(self.settings, words, asked.embeds, asked.negative)

    @torch.inference_mode()
    def _recache(self) -> None:
        self.settle()
        frames = {entry.frame for entry in self.context.table.recent}
        to_come = self.context.table.cut
        self._event(Event.REOPEN)
        for made in self.now.made:
            block = made.block
            count = block.latents.shape[2]
            if frames.isdisjoint(range(block.start, block.start + count)):
                continue
            if block.applied.cut:
                self._event(Event.CUT)
            self._prepare(block.start, count, made.poses)
            again = replace(
                made.conditioning, text_keys=self.asked.keys, text_values=self.asked.values
            )
            self._commit(replace(made, conditioning=again), frames)
        if to_come:
            self._event(Event.CUT)

    def _heed_prompt(self) -> None:
        """Do to the context what a change of prompt since the newest block asks for."""
        before = self.now.asked_before
        if before is None or before.same(self.asked):
            return
        if self.settings.cache.prompt == "flush":
            self._event(Event.FLUSH)
        elif self.settings.cache.prompt == "recache":
            self._recache()

    def _event(self, event: Event) -> None:
        self.settle()
        self._lanes.on_event(event)

    def _prepare(self, start: int, frames: int, poses: tuple[Pose, ...]) -> None:
        self._lanes.prepare(start, frames, poses[-1] if poses else None)

    def _commit(self, made: Made, only: set[int] | None = None) -> None:
        """Run a block's context passes and publish it in every lane; ``only``: these frames."""
        block, schedule = made.block, self.settings.schedule
        passes, cells = schedule.commit_cells(block.index), schedule.cells(block.index)
        if made.given:
            passes, cells = schedule.given_cells(block.index), iter(())
        here = [cell for cell in passes if cell.reads in self._lanes]
        for cell in here:
            latents = dict(made.noisy).get(cell.level, block.latents)
            commit(
                self.world.commit, cell, latents, made.conditioning, self.lanes, block.start,
                made.poses,
            )  # fmt: skip
            self._ran(cell)
        staged = [cell for cell in cells if cell.publishes in self._lanes]
        publish((*staged, *here), self.lanes, only)

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
        if snapshot.settings != self.settings:
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
        self._pending = None
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
        seen = self.decoded > 0
        recorder, self.recorder = self.recorder, None  # what is made again is no news
        try:
            for played in self.go_back(to_block):
                block = self.play(played)
                if seen:
                    self.decode(block)
        finally:
            self.recorder = recorder
        if recorder is not None:
            recorder.rewound(self, to_block)

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
            self.now = replace(self.now, held=_heeded(now.past[known - 1].held, self.frame))
        return now.past[known : to_block - now.reach]

    def play(self, played: Played) -> Block:
        """Make a block the way that one was made; it is not decoded."""
        self.heed(played)
        if played.given is not None:
            return self.give(played.given, played.applied.controls)
        return self.denoise(played.applied.controls, known=played.known)

    def heed(self, played: Played) -> None:
        """Do and hear what was done and heard before that block."""
        for change in played.changes[len(self.now.changes) :]:  # some may be done already
            self._change(change)
        self.now = replace(self.now, held=played.held)

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
                can hold.
            OSError: where it cannot be written.
        """
        from worldsim.recorder import Recorder

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

    def _remember(self) -> None:
        # Not where something was done since the newest block: it is what comes after the boundary.
        if self._in_step and not self.now.changes and self.history.wants(self.block):
            self.history.add(self._capture())

    @property
    def _in_step(self) -> bool:
        """Whether the decoder has seen every block, or none so far."""
        return self.decoded in (0, self.block)

    def _check_in_step(self, what: str) -> None:
        if not self._in_step:
            raise ValueError(
                f"block {self.decoded} is not decoded yet: decode all blocks before {what}"
            )

    def _capture(self) -> Snapshot:
        # Many snapshots may be kept, and none of them needs keys and values of its prompt.
        moment = replace(self.now, asked=self.asked.bare())
        pool = self._lanes.pool
        return Snapshot(self.settings, moment, self.decoding, *self._lanes.tables(), pool)

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

    def _accept(self, made: Made, known: Known | None = None, given: Tensor | None = None) -> None:
        now = self.now
        played = Played(now.changes, now.held, made.block.applied, known, given)
        frame = now.frame + made.block.latents.shape[2]
        self._pending = made
        self.now = replace(
            now,
            block=now.block + 1,
            frame=frame,
            held=_heeded(now.held, frame),
            asked_before=now.asked.bare(),
            pose=made.poses[-1] if made.poses else now.pose,
            changes=(),
            past=(*now.past[max(0, len(now.past) + 1 - PAST) :], played),
        )
        if self.recorder is not None:
            self.recorder.made(self, played, made.block)

    def _live(self) -> list[ControlState]:
        """What the player does in each frame of the next block. The very first one is a single
        picture, which nothing moves."""
        still = 1 if self.frame == 0 else 0
        moving = self.block_frames - still
        state = self.now.held.now(self.world.actions.forbidden)
        return [ControlState()] * still + [state.shared(max(1, moving))] * moving

    def _applied(self, controls: Sequence[Control]) -> Applied:
        """The receipt of a block under ``controls``; what this world does not have is refused."""
        frames = self.block_frames
        if len(controls) != frames:
            raise ValueError(f"a block has {frames} latent frames, got keys for {len(controls)}")
        states = self.world.actions.track(controls)
        told = [control.event_id for control in controls if isinstance(control, ControlState)]
        event = max([self.now.held.newest.event_id, *told])
        return Applied(states, self.prompt, self.context.table.cut, event)

    def _conditioning(self, applied: Applied, start: Pose) -> tuple[Conditioning, tuple[Pose, ...]]:
        """What controls become, where the player stands at ``start``; see `conditioning`."""
        columns = self.context.pool.shape.grid[1]
        return conditioning(
            self.asked, self.world.config.actions, applied.controls, start, columns,
            self.settings.rows, self.world.device,
        )  # fmt: skip

    def _ran(self, cell: Cell) -> None:
        if self.on_cell is not None:
            self.on_cell(cell)

    def _fresh(self, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        if self._noise is None:
            return noise(self.settings.seed, block, step, shape)
        given = self._noise(block, step, shape)
        if tuple(given.shape) != shape:
            raise ValueError(f"noise must be {shape}, got {tuple(given.shape)}")
        return given.float()


def _heeded(held: Held, frame: int) -> Held:
    """What remains to be heeded at latent frame ``frame``, after a block made under ``held``: a
    first picture alone, which nothing moves, has heeded nothing."""
    return held.spent() if frame > 1 else held


def check_recache(schedule: Schedule) -> None:
    """Raises:
    ValueError: where blocks cannot be committed anew.
    """
    if schedule.rule != "clean":
        raise ValueError(
            "cache: recache commits finished blocks anew, but this schedule reads blocks in the "
            "making: flush instead"
        )


@torch.inference_mode()
def decode(autoencoder: Decoder, block: Block, carry: Carry) -> Carry:
    """Fill in the pictures of a stream's next block; returns the decoder's new carry."""
    with part("decode", block.index, block.timings):
        decoded, carry = autoencoder.decode(block.latents, carry)
        block.frames = to_pictures(decoded).cpu().numpy()
    return carry
