"""What a session will ever hold, in bytes, told before anything is allocated, and kept to."""

from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context
from worldsim.cache.pool import PageKind
from worldsim.models.view import ContextView

LATENT_BYTES = 4  # latents are float32
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
    context: Context,
    latent_shape: tuple[int, ...],
    weights: int,
    carry: int,
    scratch: int | None = None,
    rows: int = 1,
    history: int = 0,
    prompt: int = 0,
    given: int = 0,
) -> MemoryReport:
    """Of a session with this context, whether it runs yet or not.

    Args:
        latent_shape: of a block, ``[1, C, F, h, w]``.
        weights, carry: their bytes.
        scratch: what one of the session's views takes; None where it is not made yet.
        rows: contexts of the session, see `Settings.rows`.
        history: bytes that its snapshots may keep.
        prompt, given: their bytes.
    """
    cache, pool, frames = context.config, context.pool, latent_shape[2]
    sink, _, recent = (PageKind(pool.shape.tokens, format_) for format_ in cache.formats)
    held = len(context.table.recent) if cache.recent is None else cache.recent
    kept = latents_kept(cache, frames)
    each = rows * sum(n * pool.page_nbytes(kind) for kind, n in context.needs(0).items())
    block = LATENT_BYTES * prod(latent_shape)
    frame = pool.page_nbytes(recent) + ContextView.bytes_per_frame(context)
    return MemoryReport(
        weights=weights,
        sink=rows * cache.sink * pool.page_nbytes(sink),
        mid=rows
        * sum(n * pool.page_nbytes(kind) for kind, n in context.form.needs(frames).items()),
        recent=rows * held * pool.page_nbytes(recent),
        spare=rows * 2 * frames * pool.page_nbytes(recent),
        summaries=rows * context.form.nbytes,
        scratch=rows * (ContextView.bytes_needed(context, frames) if scratch is None else scratch),
        carry=carry,
        history=snapshots_kept(history, each) * each,
        latents=(1 + (ceil(held / frames) if kept is None else kept)) * block,
        prompt=prompt,
        given=given,
        growth=0 if kept is not None else block + rows * frames * frame,
    )


def latents_kept(cache: CacheConfig, block_frames: int) -> int | None:
    """How many finished blocks a session keeps to commit them anew; None: all."""
    return None if cache.recent is None else ceil(cache.recent / block_frames)


def snapshots_kept(history: int, each: int) -> int:
    """How many snapshots a session keeps beside its beginning, where each may hold pages of
    ``each`` bytes that nobody else does; those of an endless context share all of them."""
    return min(KEPT, history // each) if each else KEPT
