"""What a session will ever hold, in bytes, told before anything is allocated, and kept to."""

from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context
from worldsim.cache.pool import PageKind
from worldsim.models.view import ContextView

if TYPE_CHECKING:
    from worldsim.world import World

LATENT_BYTES = 4  # latents are float32


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
        latents: newest clean latents, kept to be committed anew, and those of the newest block.
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
    latents: int
    growth: int = 0

    @property
    def context(self) -> int:
        """Bytes of all pages."""
        return self.sink + self.mid + self.recent + self.spare

    @property
    def session(self) -> int:
        """All that one more session needs."""
        return self.context + self.summaries + self.scratch + self.carry + self.latents

    def figures(self) -> dict[str, Any]:
        """Every number by its name, for tables and JSON."""
        return {**asdict(self), "context": self.context, "session": self.session}


def report(
    world: "World", cache: CacheConfig, live: Context | None = None, scratch: int = 0
) -> MemoryReport:
    """See `World.memory_report`; ``live``: a session's context, whose view takes ``scratch``.

    Raises:
        ValueError: for a mid form that the world does not support.
    """
    frames = world.config.block_frames
    context = live or Context(world.pool, cache, world.actions.camera)
    held = len(context.table.recent)
    pool, shape = world.pool, world.pool.shape
    sink, _, recent = (PageKind(shape.tokens, format_) for format_ in cache.formats)
    mid = context.form.needs(frames)
    _, channels, _, height, width = world.latent_shape
    block = LATENT_BYTES * channels * frames * height * width
    kept = latents_kept(cache, frames)
    return MemoryReport(
        weights=sum(
            tensor.nbytes
            for model in (world.transformer, world.autoencoder, world.text_encoder)
            for tensor in (*model.parameters(), *model.buffers())
        ),
        sink=cache.sink * pool.page_nbytes(sink),
        mid=sum(count * pool.page_nbytes(kind) for kind, count in mid.items()),
        recent=(held if cache.recent is None else cache.recent) * pool.page_nbytes(recent),
        spare=2 * frames * pool.page_nbytes(recent),
        summaries=context.form.nbytes,
        scratch=scratch or ContextView.bytes_needed(context, frames),
        carry=world.autoencoder.carry_nbytes(height, width),
        latents=(1 + (ceil(held / frames) if kept is None else kept)) * block,
        growth=0
        if kept is not None
        else block + frames * (pool.page_nbytes(recent) + ContextView.bytes_per_frame(context)),
    )


def latents_kept(cache: CacheConfig, block_frames: int) -> int | None:
    """How many finished blocks a session keeps to commit them anew; None: all."""
    return None if cache.recent is None else ceil(cache.recent / block_frames)
