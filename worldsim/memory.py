"""What a session will ever hold, in bytes, told before anything is allocated, and kept to."""

from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context
from worldsim.cache.pool import PageKind
from worldsim.config import Settings
from worldsim.models.view import ContextView

if TYPE_CHECKING:
    from worldsim.stocked import Stocked

KEPT = 16  # snapshots at most


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by what they are for.

    Attributes:
        weights: of the models, which all sessions of a world share.
        sink, mid, recent: pages of each partition of the context.
        spare: pages for a block that is staged and for one that can be taken back.
        summaries: mean queries and keys by which a mid form chooses.
        scratch: rotated copies that attention reads, and staging rows.
        carry: what the decoder remembers.
        history: pages that only snapshots hold, which a rewind starts from.
        latents: newest clean latents, kept to be committed anew, and those of the newest block.
        prompt: cross-attention keys and values of what is asked for; after a change those from
            before it as well, until the block made under them is committed.
        given: latents that it began with, kept for a rewind.
        growth: what each further block adds; 0 where a cache is bounded.
    """

    weights: int
    sink: int
    mid: int
    recent: int
    spare: int
    summaries: int
    scratch: int
    carry: int
    history: int
    latents: int
    prompt: int = 0
    given: int = 0
    growth: int = 0

    @property
    def context(self) -> int:
        """Bytes of all pages."""
        return self.sink + self.mid + self.recent + self.spare

    @property
    def session(self) -> int:
        """All that one more session needs."""
        beside = self.summaries + self.scratch + self.carry + self.history + self.latents
        return self.context + beside + self.prompt + self.given

    def figures(self) -> dict[str, Any]:
        """Every number by its name, for tables and JSON."""
        return {**asdict(self), "context": self.context, "session": self.session}


def report(
    world: "Stocked",
    settings: Settings,
    context: Context,
    scratch: int | None,
    history: int,
    given: int = 0,
) -> MemoryReport:
    """Of a session with this context, whether it runs yet or not.

    Args:
        scratch: what one of the session's views takes; None where it is not made yet.
        history: bytes that its snapshots may keep.
        given: bytes of the latents that it begins with.
    """
    shape = world.latents_of(settings.size, world.config.block_frames)
    rows = settings.rows * len(settings.schedule.lanes)
    decoder = world.autoencoder
    cache, pool, frames = context.config, context.pool, shape[2]
    sink, _, recent = (PageKind(pool.shape.tokens, format_) for format_ in cache.formats)
    held = len(context.table.recent) if cache.recent is None else cache.recent
    kept = latents_kept(cache, frames)
    each = rows * sum(n * pool.page_nbytes(kind) for kind, n in context.needs(0).items())
    block = latents_nbytes(shape)
    frame = pool.page_nbytes(recent) + ContextView.bytes_per_frame(context)
    return MemoryReport(
        weights=world.weights_nbytes,
        sink=rows * cache.sink * pool.page_nbytes(sink),
        mid=rows
        * sum(n * pool.page_nbytes(kind) for kind, n in context.form.needs(frames).items()),
        recent=rows * held * pool.page_nbytes(recent),
        spare=rows * 2 * frames * pool.page_nbytes(recent),
        summaries=rows * context.form.nbytes,
        scratch=rows * (ContextView.bytes_needed(context, frames) if scratch is None else scratch),
        carry=0 if decoder is None else decoder.carry_nbytes(*shape[-2:]),
        history=snapshots_kept(history, each) * each,
        latents=(1 + (ceil(held / frames) if kept is None else kept)) * block,
        prompt=_prompt_nbytes(world, settings.rows),
        given=given,
        growth=0 if kept is not None else block + rows * frames * frame,
    )


def latents_nbytes(shape: tuple[int, ...]) -> int:
    """Of latents ``[1, C, F, h, w]``, which are float32."""
    return 4 * prod(shape)


def _prompt_nbytes(world: "Stocked", rows: int) -> int:
    """Of the keys and values that a session with so many rows asks for in words."""
    sizes = world.transformer.config
    width = sizes.num_attention_heads * sizes.attention_head_dim
    one = 2 * sizes.num_layers * world.text_length * width * world.dtype.itemsize
    # The world keeps each prompt's own; a guided session has a copy of both, side by side.
    return one if rows == 1 else 2 * rows * one


def latents_kept(cache: CacheConfig, block_frames: int) -> int | None:
    """How many finished blocks a session keeps to commit them anew; None: all."""
    return None if cache.recent is None else ceil(cache.recent / block_frames)


def snapshots_kept(history: int, each: int) -> int:
    """How many snapshots a session keeps beside its beginning, where each may hold pages of
    ``each`` bytes that nobody else does; those of an endless context share all of them."""
    return min(KEPT, history // each) if each else KEPT
