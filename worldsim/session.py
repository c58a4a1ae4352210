"""One live world: all state that changes, changed only at block boundaries.

A session holds its context (page table), the decoder's carry, the position, the prompt, the held
keys, the dead-reckoned pose and the newest clean latents. Noise is a function of (seed, block,
step), so this is everything.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldsim.cache.context import Context, Event
from worldsim.cache.policy import Pose
from worldsim.cache.pool import PageKind
from worldsim.config import Settings
from worldsim.controls import IDLE, Keys
from worldsim.memory import MemoryReport, latents_kept
from worldsim.models.autoencoder import Carry, Decoder, to_pictures
from worldsim.models.transformer import Conditioning
from worldsim.models.view import ContextView
from worldsim.noise import noise
from worldsim.parts import part
from worldsim.rollout import Known, Noise, OnStep, commit, denoise
from worldsim.script import Script

if TYPE_CHECKING:
    from worldsim.world import World


@dataclass(frozen=True)
class Applied:
    """What a block was made under: held keys of each latent frame, the prompt, and whether it
    begins a new scene."""

    keys: tuple[Keys, ...]
    prompt: str
    cut: bool = False


@dataclass
class Block:
    """One finished block.

    Attributes:
        index: absolute block number.
        start: absolute index of its first latent frame.
        latents: clean, normalised, float32 ``[1, C, F, h, w]``.
        frames: pictures, uint8 ``[P, H, W, 3]``; empty until decoded.
        applied: the controls it was made under.
        timings: seconds spent by part (``commit`` is that of the block before).
    """

    index: int
    start: int
    latents: Tensor
    applied: Applied
    frames: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked for in words.

    Attributes:
        prompt: the words; empty where only their embeddings were given.
        embeds, negative: the text encoder's rows of the prompt and of the negative one, where they
            were given instead.
        keys, values: cross-attention K/V of each layer, ``[rows, heads, T, head_dim]``: a row for
            each of the session's views.
    """

    prompt: str
    embeds: Tensor | None
    negative: Tensor | None
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def same(self, other: "Asked") -> bool:
        return self.prompt == other.prompt and self.embeds is other.embeds


@dataclass(frozen=True)
class _Made:
    """A finished block, what it was made under, and the pose at the end of each frame."""

    block: Block
    conditioning: Conditioning
    poses: tuple[Pose, ...]


class Session:
    """Opened by `World.session`. Not to be shared between threads, except that one thread may
    `denoise` while another decodes the blocks that came before.
    """

    def __init__(
        self, world: "World", settings: Settings, asked: Asked, noise: Noise | None = None
    ) -> None:
        self.world = world
        self.settings = settings
        self.block = 0  # number of the next block
        self.frame = 0  # absolute index of its first latent frame
        self.asked = asked
        self.held: Keys = IDLE
        self.pose = np.zeros(3)
        self.carry: Carry = None
        self.decoded = 0  # number of the next block to decode
        self.given: list[Block] = []  # its first blocks, where it was given some
        pool, frames = world.pool_of(settings.size), world.config.block_frames
        contexts = [
            Context(pool, settings.cache, world.actions.camera) for _ in range(settings.rows)
        ]
        self._needs = sum((context.needs(frames) for context in contexts), Counter[PageKind]())
        pool.reserve(self._needs)
        try:
            # One for the prompt and, where a negative one guides, one for that.
            self.views = [ContextView(context, frames, settings.attention) for context in contexts]
        except BaseException:
            pool.give_back(self._needs)  # out of memory: nobody may keep a promise of pages
            raise
        self._noise = noise
        self._closed = False
        self._pending: _Made | None = None  # its context pass has not run yet
        self._asked_before: Asked | None = None  # of the newest block
        # What is committed and may be committed anew.
        self._made: deque[_Made] = deque(maxlen=latents_kept(settings.cache, frames))

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
        return self.views[0].context

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
        buttons: Sequence[str] | Keys | None = None,
        prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
    ) -> None:
        """Set what is held or asked for, from the next block on; None leaves it as it is.

        Raises:
            ValueError: for a key or prompt that this world does not know.
        """
        if buttons is not None:
            self.held = self.world.actions.resolve(frozenset(buttons))
        if prompt is not None or prompt_embeds is not None:
            negative = self.asked.negative
            self.asked = self.world.ask(self.settings, prompt, prompt_embeds, negative)

    def follow(self, script: Script) -> list[Keys]:
        """Take over what a script asks for at the next block; returns its held keys."""
        frames = self.block_frames
        if (prompt := script.prompt(self.frame)) != self.prompt:
            self.control(prompt=prompt)
        if script.cuts(self.frame, frames):
            self.cut()
        return script.held(self.frame, frames)

    def step(
        self,
        keys: Sequence[Keys] | None = None,
        on_step: OnStep | None = None,
        known: Known | None = None,
    ) -> Block:
        """Make and decode the next block; ``keys`` gives held keys for each of its frames.

        ``known``: frames of it that are given, and only guide the others (a last picture, say).
        """
        for given in self.given[self.decoded :]:
            self.decode(given)  # the decoder remembers what it began with
        return self.decode(self.denoise(keys, on_step, known))

    def __iter__(self) -> Iterator[Block]:
        """Blocks for ever."""
        while True:
            yield self.step()

    @torch.inference_mode()
    def denoise(
        self,
        keys: Sequence[Keys] | None = None,
        on_step: OnStep | None = None,
        known: Known | None = None,
    ) -> Block:
        """Make the next block's latents. The block before is committed first, the new one later:
        nobody waits for a context pass who wants to see a picture.
        """
        timings = {"commit": 0.0}
        with part("commit", self.block - 1, timings) if self.block else nullcontext():
            self.settle()
            self._heed_prompt()
        frames = self.block_frames
        if keys is None:  # the very first latent frame is a single picture, which nothing moves
            keys = [self.held if self.frame + i else IDLE for i in range(frames)]
        applied = self._applied(keys)
        with part("denoise", self.block, timings):
            conditioning, poses = self._conditioning(applied)
            self._prepare(self.frame, frames, poses)
            latents = denoise(
                self.world.forward,
                self.settings.schedule.cells(self.block),
                conditioning,
                self.views,
                self._fresh,
                self.latent_shape,
                self.world.device,
                self.settings.sampler,
                on_step,
                self.settings.guidance,
                known,
            )
        block = Block(self.block, self.frame, latents, applied, timings=timings)
        self._accept(_Made(block, conditioning, poses))
        return block

    @torch.inference_mode()
    def give(self, latents: Tensor, keys: Sequence[Keys] | None = None) -> Block:
        """Take ``[1, C, F, h, w]`` as the next block instead of making it; draws no noise."""
        self.settle()
        self._heed_prompt()
        frames = self.block_frames
        if tuple(latents.shape) != self.latent_shape:
            raise ValueError(
                f"a given block must be {self.latent_shape}, got {tuple(latents.shape)}"
            )
        applied = self._applied((IDLE,) * frames if keys is None else keys)
        conditioning, poses = self._conditioning(applied)
        self._prepare(self.frame, frames, poses)
        # A copy: its context pass comes later, and by then the caller's may be something else.
        own = latents.detach().to(self.world.device, torch.float32, copy=True)
        block = Block(self.block, self.frame, own, applied)
        block.timings.update(commit=0.0, denoise=0.0)  # it was neither waited for nor made
        self._accept(_Made(block, conditioning, poses))
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
        self.carry = decode(self.world.autoencoder, block, self.carry)
        self.decoded += 1
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
        self._commit(made, made.conditioning)
        # Without pictures and text: both would be many times what the latents are.
        bare = Block(made.block.index, made.block.start, made.block.latents, made.block.applied)
        told = replace(made.conditioning, text_keys=(), text_values=())
        self._made.append(replace(made, block=bare, conditioning=told))
        self._pending = None

    # --- events -------------------------------------------------------------------------------
    def cut(self) -> None:
        """The next block begins a new scene: it sees all that came before as if from afar."""
        self._event(Event.CUT)

    def flush(self) -> None:
        """Forget all but the sink and the newest frame."""
        self._event(Event.FLUSH)

    def reset(self) -> None:
        """Forget everything."""
        self._event(Event.RESET)

    @torch.inference_mode()
    def recache(self) -> None:
        """Commit the recent frames anew under the present prompt, block by block, each over what
        was committed before it (LongLive). The sink and mid stay as they are."""
        self.settle()
        frames = {entry.frame for entry in self.context.table.recent}
        to_come = self.context.table.cut
        self._event(Event.REOPEN)
        for made in self._made:
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
            self._commit(made, again, frames)
        if to_come:
            self._event(Event.CUT)

    def _heed_prompt(self) -> None:
        """Do to the context what a change of prompt since the newest block asks for."""
        if self._asked_before is None or self._asked_before.same(self.asked):
            return
        if self.settings.cache.prompt == "flush":
            self.flush()
        elif self.settings.cache.prompt == "recache":
            self.recache()

    def _event(self, event: Event) -> None:
        self.settle()
        for view in self.views:
            view.context.on_event(event)

    def _prepare(self, start: int, frames: int, poses: tuple[Pose, ...]) -> None:
        """Bring what the next passes read up to date."""
        for view in self.views:
            view.prepare(start, frames, poses[-1] if poses else None)

    def _commit(
        self, made: _Made, conditioning: Conditioning, only: set[int] | None = None
    ) -> None:
        block = made.block
        cell = self.settings.schedule.commit_cell(block.index)
        commit(
            self.world.commit, cell, block.latents, conditioning, self.views, block.start,
            made.poses, only,
        )  # fmt: skip

    def fork(self) -> "Session":
        """A twin that goes its own way from here; both share the pages committed so far."""
        self.settle()
        twin = Session(self.world, self.settings, self.asked, self._noise)
        twin.block, twin.frame, twin.held = self.block, self.frame, self.held
        twin.pose, twin.carry, twin.decoded = self.pose, self.carry, self.decoded
        twin._asked_before = self._asked_before
        twin.given = [replace(block) for block in self.given]
        for view, mine in zip(twin.views, self.views, strict=True):
            view.context = mine.context.fork()
        twin._made.extend(self._made)
        return twin

    def memory_report(self) -> MemoryReport:
        """Bytes that it holds and ever will; see `World.memory_report`, which says it before."""
        return self.world.memory_of(self.settings, self.context, self.view.nbytes)

    def close(self) -> None:
        """Give the pages back to the world."""
        self._pending = None
        self._made.clear()
        for view in self.views:
            view.context.close()
        self.context.pool.give_back(self._needs)
        self._needs.clear()
        self._closed = True

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self, made: _Made) -> None:
        self._pending = made
        self._asked_before = self.asked
        if made.poses:
            self.pose = np.array(made.poses[-1])
        self.block += 1
        self.frame += made.block.latents.shape[2]

    def _applied(self, keys: Sequence[Keys]) -> Applied:
        """The receipt of a block under ``keys``; aliases are resolved, unknown keys refused."""
        frames = self.block_frames
        if len(keys) != frames:
            raise ValueError(f"a block has {frames} latent frames, got keys for {len(keys)}")
        held = tuple(map(self.world.actions.resolve, keys))
        return Applied(held, self.prompt, self.context.table.cut)

    def _conditioning(self, applied: Applied) -> tuple[Conditioning, tuple[Pose, ...]]:
        """The tensors that controls become, and the poses they lead to where there are any."""
        keys, values = self.asked.keys, self.asked.values
        spec = self.world.config.actions
        if spec is None:
            return Conditioning(keys, values), ()
        held = spec.multi_hot(applied.keys)
        poses = spec.reckon(held, self.pose)
        columns = self.context.pool.shape.grid[1]
        told = spec.actions(held, poses), spec.rays(poses, columns)
        actions, rays = (
            torch.from_numpy(x)[None].to(self.world.device).expand(len(self.views), *x.shape)
            for x in told
        )
        reached = tuple((x, y, heading) for x, y, heading in poses.tolist())
        return Conditioning(keys, values, actions=actions, rays=rays), reached

    def _fresh(self, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        if self._noise is None:
            return noise(self.settings.seed, block, step, shape)
        given = self._noise(block, step, shape)
        if tuple(given.shape) != shape:
            raise ValueError(f"noise must be {shape}, got {tuple(given.shape)}")
        return given.float()


@torch.inference_mode()
def decode(autoencoder: Decoder, block: Block, carry: Carry) -> Carry:
    """Fill in the pictures of a stream's next block; returns the decoder's new carry."""
    with part("decode", block.index, block.timings):
        decoded, carry = autoencoder.decode(block.latents, carry)
        block.frames = to_pictures(decoded).cpu().numpy()
    return carry
