"""How a session makes its next block: all state that changes, changed only at block boundaries.

What a session goes on from is a `worldsim.state.Snapshot`: its moment, its page tables and what the
decoder remembers. Noise is a function of (seed, block, step), so this is everything. What a player
does, pictures, and going back are `worldsim.session`'s business.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worldsim.bundle import check_numbers
from worldsim.cache.context import Context, Event
from worldsim.cache.policy import Pose
from worldsim.conditioning import conditioning
from worldsim.config import Settings
from worldsim.controls import Control, ControlState, Held
from worldsim.fused import fused
from worldsim.history import PAST, History
from worldsim.lanes import Lanes, Views
from worldsim.memory import latents_kept, snapshots_kept
from worldsim.models.transformer import Conditioning
from worldsim.models.view import ContextView
from worldsim.noise import noise
from worldsim.parts import part
from worldsim.rollout import Known, Making, Noise, OnStep, commit, denoise, publish
from worldsim.schedule import Cell
from worldsim.state import Applied, Asked, Block, Decoding, Made, Moment, Played, Snapshot

if TYPE_CHECKING:
    from worldsim.world import World


class Maker:
    """One session's state, and the making of its blocks; see `worldsim.session.Session`.

    Attributes:
        world, settings: what it runs on and as; they do not change.
        now, decoding: see `worldsim.state`.
        history: snapshots to go back to.
        on_cell: sees each cell that has run.
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
        self._closed = False
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
    def prompt(self) -> str:
        return self.asked.prompt

    @property
    def pose(self) -> Pose:
        """Where the player is, by dead reckoning: x, y, heading; see `ActionSpec.pose_dim`."""
        return self.now.pose

    @property
    def lanes(self) -> Views:
        """What passes read and stage, by the lane of the schedule."""
        return self._lanes.views

    @property
    def views(self) -> list[ContextView]:
        """Its first lane: a view for each row."""
        return next(iter(self.lanes.values()))

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

    # --- the next block -----------------------------------------------------------------------
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
        fuses = self.fuses
        separate = self.block > 0 and not fuses
        with part("commit", self.block - 1, timings) if separate else nullcontext():
            if not fuses:
                self.ready()
        with part("denoise", self.block, timings):
            begin = self._begin_fused if fuses else self.begin
            making, applied = begin(keys, on_step, known, x)
            noisy: dict[int, Tensor] = {}
            for cell in self.cells()[making.taken :]:
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
        making, applied = self._making(keys, on_step, known, x)
        self._prepare(making.start, self.block_frames, making.poses)
        return making, applied

    def _making(
        self,
        keys: Sequence[Control] | None,
        on_step: OnStep | None,
        known: Known | None,
        x: Tensor | None,
    ) -> tuple[Making, Applied]:
        """The first half of `begin`, which changes nothing."""
        applied = self._applied(self._live() if keys is None else keys)
        conditioning, poses = self._conditioning(applied, self.pose)
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

    def _accept(
        self, made: Made, known: Known | None = None, given: Tensor | None = None
    ) -> Played:
        now = self.now
        played = Played(now.changes, now.held, made.block.applied, known, given)
        frame = now.frame + made.block.latents.shape[2]
        self._pending = made
        self.now = replace(
            now,
            block=now.block + 1,
            frame=frame,
            held=heeded(now.held, frame),
            asked_before=now.asked.bare(),
            pose=made.poses[-1] if made.poses else now.pose,
            changes=(),
            past=(*now.past[max(0, len(now.past) + 1 - PAST) :], played),
        )
        return played

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
        # What waits to be committed has heeded a cut, if there was one.
        cut = self._pending is None and self.context.table.cut
        return Applied(states, self.prompt, cut, event)

    def _conditioning(self, applied: Applied, start: Pose) -> tuple[Conditioning, tuple[Pose, ...]]:
        """What controls become, where the player stands at ``start``; see `conditioning`."""
        columns = self.context.pool.shape.grid[1]
        return conditioning(
            self.asked, self.world.config.actions, applied.controls, start, columns,
            self.settings.rows, self.world.device,
        )  # fmt: skip

    def _fresh(self, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        if self._noise is None:
            return noise(self.settings.seed, block, step, shape)
        given = self._noise(block, step, shape)
        check_numbers(f"noise({block}, {step}, …)", given)
        if tuple(given.shape) != shape:
            raise ValueError(f"noise must be {shape}, got {tuple(given.shape)}")
        return given.float()

    def _ran(self, cell: Cell) -> None:
        if self.on_cell is not None:
            self.on_cell(cell)

    # --- its context pass, which comes later --------------------------------------------------
    @torch.inference_mode()
    def settle(self) -> None:
        """Run the context pass of the newest block, if it has not run yet.

        Raises:
            ValueError: if the session is closed, or the world was moved or cast since it began.
        """
        self._check_open()
        if self._pending is not None:
            self._commit(self._pending)
            self._settled(self._pending)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this session is closed: open a new one")
        if self.context.pool is not self.world.pool_of(self.settings.size):
            raise ValueError("the world was moved or cast since this session began: open a new one")

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

    def _settled(self, made: Made) -> None:
        """Note that a block is committed."""
        # Without pictures and text: both would be many times what the latents are.
        bare = Block(made.block.index, made.block.start, made.block.latents, made.block.applied)
        told = replace(made.conditioning, text_keys=(), text_values=())
        kept = latents_kept(self.settings.cache, self.world.config.block_frames)
        all_made = (*self.now.made, replace(made, block=bare, conditioning=told, noisy=()))
        recent = all_made if kept is None else all_made[max(0, len(all_made) - kept) :]
        self.now = replace(self.now, made=recent)
        self._pending = None

    def _prepare(self, start: int, frames: int, poses: Sequence[Pose]) -> None:
        self._lanes.prepare(start, frames, poses[-1] if poses else None)

    @property
    def fuses(self) -> bool:
        """Whether the newest block's context pass and the next one's first cell can be one pass:
        rows of as many frames, nothing to be done in between, and a context whose coming form does
        not depend on what that block leaves behind."""
        self._check_open()
        made, frames = self._pending, self.block_frames
        if made is None or made.given or self.settings.schedule.context != "fused":
            return False
        acts = self.settings.cache.prompt != "keep" and self._new_prompt
        alike = made.block.latents.shape[2] == frames and self.settings.rows == 1
        joined = self.world.fused is not None and alike and not acts
        return joined and self.context.can_foresee(frames)

    def _begin_fused(
        self,
        keys: Sequence[Control] | None,
        on_step: OnStep | None,
        known: Known | None,
        x: Tensor | None,
    ) -> tuple[Making, Applied]:
        """`settle` and `begin`, and the first cell as well."""
        making, applied = self._making(keys, on_step, known, x)
        made, cell = self._pending, self.cells()[0]
        assert made is not None and self.world.fused is not None
        (passing,) = self.settings.schedule.commit_cells(made.block.index)
        flow = fused(self.world.fused, passing, made, cell, making, self.view)
        if flow is None:  # buffers have to grow
            self.ready()
            self._prepare(making.start, self.block_frames, making.poses)
            return making, applied
        publish((passing,), self.lanes)
        self._settled(made)
        self._remember()
        self._ran(passing)
        making.take(cell, flow)
        self._ran(cell)
        return making, applied

    # --- between two blocks -------------------------------------------------------------------
    def _heed_prompt(self) -> None:
        """Do to the context what a change of prompt since the newest block asks for."""
        if self._new_prompt and self.settings.cache.prompt == "flush":
            self._event(Event.FLUSH)
        elif self._new_prompt and self.settings.cache.prompt == "recache":
            self._recache()

    @property
    def _new_prompt(self) -> bool:
        before = self.now.asked_before
        return before is not None and not before.same(self.asked)

    def _event(self, event: Event) -> None:
        self.settle()
        self._lanes.on_event(event)

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

    def _remember(self) -> None:
        # Not where something was done since the newest block: it is what comes after the boundary.
        if self._in_step and not self.now.changes and self.history.wants(self.block):
            self.history.add(self._capture())

    @property
    def _in_step(self) -> bool:
        """Whether the decoder has seen every block, or none so far."""
        return self.decoding.decoded in (0, self.block)

    def _capture(self) -> Snapshot:
        # Many snapshots may be kept, and none of them needs keys and values of its prompt.
        moment = replace(self.now, asked=self.asked.bare())
        pool = self._lanes.pool
        return Snapshot(
            self.settings, moment, self.decoding, *self._lanes.tables(), pool, self._noise
        )


def heeded(held: Held, frame: int) -> Held:
    """What remains to be heeded at latent frame ``frame``, after a block made under ``held``: a
    first picture alone, which nothing moves, has heeded nothing."""
    return held.spent() if frame > 1 else held
