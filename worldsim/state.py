"""What a session is at a block boundary, as plain values that never change.

A session is explicit: everything it goes on from is in a `Snapshot`. Fork, rewind, save and replay
are all the same act, going on from one.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worldsim.cache.context import Event
from worldsim.cache.policy import Pose, Table
from worldsim.cache.pool import PagePool
from worldsim.config import Settings
from worldsim.controls import ControlState, Held, Keys
from worldsim.models.autoencoder import Carry
from worldsim.models.transformer import Conditioning
from worldsim.rollout import Known, Noise

ORIGIN: Pose = (0.0, 0.0, 0.0)


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

    def bare(self) -> "Asked":
        """Without keys and values, which are large, and which a world can make again."""
        return replace(self, keys=(), values=())


Change = Asked | Event  # what is done to a session between two blocks


@dataclass(frozen=True)
class Applied:
    """What a block was made under.

    Attributes:
        controls: of each latent frame.
        prompt: as it was asked for.
        cut: whether it begins a new scene.
        event: the newest event of a player that it heeds, 0 where nobody counts; blocks that were
            made alike are equal whoever asked for them.
    """

    controls: tuple[ControlState, ...]
    prompt: str
    cut: bool = False
    event: int = field(default=0, compare=False)

    @property
    def keys(self) -> tuple[Keys, ...]:
        """Held keys of each latent frame."""
        return tuple(state.buttons for state in self.controls)


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        """Without the numbers, of which there are thousands."""
        return (
            f"Block(index={self.index}, start={self.start}, latents={list(self.latents.shape)}, "
            f"frames={list(self.frames.shape)}, prompt={self.applied.prompt!r})"
        )


@dataclass(frozen=True, eq=False)
class Made:
    """A finished block and what it was made under.

    Attributes:
        poses: at the end of each frame; ``start``: before the first one.
        noisy: what it was at each of those levels at which it is committed as well.
        given: it was not made.
    """

    block: Block
    conditioning: Conditioning
    poses: tuple[Pose, ...]
    start: Pose = ORIGIN
    noisy: tuple[tuple[int, Tensor], ...] = ()
    given: bool = False


@dataclass(frozen=True, eq=False)
class Played:
    """All that a block was made from, beside what came before it: enough to make it again.

    Attributes:
        changes: what was done between the block before and this one, in order; prompts are bare.
        held: what was heard from the player.
        applied: see `Applied`.
        known: frames of it that were given.
        given: its latents, where it was given whole.
    """

    changes: tuple[Change, ...]
    held: Held
    applied: Applied
    known: Known | None = None
    given: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Moment:
    """All of a session beside its pages and its decoder, between two blocks.

    Attributes:
        block: number of the next block.
        frame: absolute index of its first latent frame.
        asked: what is asked for from the next block on; in a snapshot it is bare.
        asked_before: what the newest block was made under, bare.
        held: what was heard from the player, for the next block.
        origin: the same for all that began as one session did.
        pose: where the player is.
        changes: what was done since the newest block; prompts are bare.
        given: its first blocks, where it was given some.
        made: the newest committed blocks, which may be committed anew.
        past: how the newest blocks came to be.
    """

    asked: Asked
    origin: object
    block: int = 0
    frame: int = 0
    asked_before: Asked | None = None
    held: Held = field(default_factory=Held)
    pose: Pose = ORIGIN
    changes: tuple[Change, ...] = ()
    given: tuple[Block, ...] = ()
    made: tuple[Made, ...] = ()
    past: tuple[Played, ...] = ()

    @property
    def reach(self) -> int:
        """The earliest block boundary from which the way to here is known."""
        return self.block - len(self.past)

    def comes_from(self, earlier: "Moment") -> bool:
        """Whether the way from ``earlier`` to here is known."""
        if self.origin is not earlier.origin or not self.reach <= earlier.block <= self.block:
            return False
        if not earlier.past:
            return True  # the beginning itself
        last = earlier.block - self.reach - 1
        return last >= 0 and self.past[last] is earlier.past[-1]


@dataclass(frozen=True, eq=False)
class Decoding:
    """What the decoder goes on from.

    Attributes:
        decoded: number of the next block to decode.
        carry: what it remembers.
    """

    decoded: int = 0
    carry: Carry = None


Tables = Mapping[int, tuple[Table, ...]]  # of each lane, those of its rows


class Snapshot:
    """A session at a block boundary. It keeps its pages from being reused for as long as it lives.

    Attributes:
        settings, moment, decoding: see there.
        noise: where it is a function of the caller's.
        tables: page tables of each lane and row.
        newest: the newest block that each lane and row has committed.
        pool: where the pages are.
    """

    def __init__(
        self,
        settings: Settings,
        moment: Moment,
        decoding: Decoding,
        tables: Tables,
        newest: Mapping[int, tuple[int | None, ...]],
        pool: PagePool,
        noise: Noise | None = None,
    ) -> None:
        self.settings = settings
        self.noise = noise
        self.moment = moment
        self.decoding = decoding
        self.tables = tables
        self.newest = newest
        self.pool = pool
        pages = [entry.page for rows in tables.values() for table in rows for entry in table]
        for page in pages:
            pool.retain(page)
        weakref.finalize(self, pool.later, partial(_release, pages)).atexit = False

    @property
    def block(self) -> int:
        """Number of the block that comes next."""
        return self.moment.block


def _release(pages: Sequence[int], pool: PagePool) -> None:
    for page in pages:
        pool.release(page)
