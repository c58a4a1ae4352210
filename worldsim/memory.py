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
        scratch: rotated copies that attention reads, and staging rows.
        carry: what the decoder remembers.
        latents: newest clean latents, kept to be committed anew.
        growth: what each further block adds; 0 where a cache is bounded.
    """

    weights: int
    sink: int
    mid: int
    recent: int
    spare: int
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
        return self.context + self.scratch + self.carry + self.latents

    def figures(self) -> dict[str, Any]:
        """Every number by its name, for tables and JSON."""
        return {**asdict(self), "context": self.context, "session": self.session}


def report(world: "World", cache: CacheConfig, held: int = 0) -> MemoryReport:
    """See `World.memory_report`; ``held``: recent frames of a cache without bounds.

    Raises:
        ValueError: for a mid form that the world does not support.
    """
    frames = world.config.block_frames
    context = Context(world.pool, cache, world.actions.camera)
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
        scratch=ContextView.bytes_needed(context, frames),
        carry=world.autoencoder.carry_nbytes(height, width),
        latents=(ceil(held / frames) if kept is None else kept) * block,
        growth=0 if kept is not None else frames * pool.page_nbytes(recent) + block,
    )


def latents_kept(cache: CacheConfig, block_frames: int) -> int | None:
    """How many finished blocks a session keeps to commit them anew; None: all."""
    if cache.recent is None:
        return None
    # A window that is no multiple of the block holds a part of one more.
    return ceil((cache.recent + block_frames - 1) / block_frames)
