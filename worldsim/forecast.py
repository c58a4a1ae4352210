"""What a world and one of its sessions will take at their most, told before anything is allocated.

What stays (weights, pages, copies, carry) is counted to the byte; pages and copies are those of
`worldsim.memory`. What comes and goes while a block is made is estimated out of sizes: the largest
set of tensors that live at one time, where they are made in the order in which the code makes them.
Not counted: workspaces inside of kernels and what an allocator holds back (a process grew by 13 to
25 % more on a CPU), further prompts, what loading needs for a moment, and the moment after a cut or
a fork, when all pages are turned at once.

Sizes: L layers, F frames of a block, N = F · tokens of a frame, D width of the transformer.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from worldsim.cache.config import BANKED
from worldsim.cache.context import Context
from worldsim.config import Settings
from worldsim.memory import MemoryReport
from worldsim.models.autoencoder import Decoder
from worldsim.models.packed import packed_nbytes
from worldsim.models.view import DECODED, layers_at_once
from worldsim.quantize import nbytes
from worldsim.world import World

FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Forecast:
    """Bytes by what they are for.

    Attributes:
        weights: of each model, which all sessions of a world share.
        packed: copies of weights in the order of a CPU's products, see `worldsim.models.packed`.
        kept: what a session promises to hold, see `MemoryReport`.
        pictures: of the newest block.
        passes: what each part of a block's work takes for a while, at its most: ``gather``,
            ``denoise``, ``commit``, ``decode``.
    """

    weights: Mapping[str, int]
    packed: int
    kept: MemoryReport
    pictures: int
    passes: Mapping[str, int]

    @property
    def world(self) -> int:
        """Of all weights, and of copies in another order."""
        return sum(self.weights.values()) + self.packed

    @property
    def session(self) -> int:
        """What one more session holds."""
        return self.kept.session + self.pictures

    @property
    def making(self) -> int:
        """The largest of the parts that make a block; they follow one another."""
        return max(taken for part, taken in self.passes.items() if part != "decode")

    @property
    def total(self) -> int:
        """One session that decodes a block while it makes the next, as ``worldsim stream`` does."""
        return self.world + self.session + self.making + self.passes["decode"]

    def figures(self) -> dict[str, Any]:
        """Every number by its name, for tables and JSON."""
        return {
            "weights": dict(self.weights),
            "packed": self.packed,
            "kept": self.kept.figures(),
            "prompt": self.kept.prompt,
            "pictures": self.pictures,
            "passes": dict(self.passes),
            "world": self.world,
            "session": self.session,
            "total": self.total,
        }


def forecast(
    world: World,
    cache: str | None = None,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> Forecast:
    """Of a world, loaded or not (see `worldsim.blueprint`), and a session with this cache.

    Args:
        cache: see `CacheConfig.parse`; None is the world's own.
        size: height and width of a picture; None is the world's own.
        device: where it is to run.

    Raises:
        ValueError: for a cache or a size that this world cannot do.
    """
    settings = world.settings(cache=cache)
    if size is not None:
        world.latents_of(size, 1)
        settings = replace(settings, size=size)
    context = Context(world.pool_of(settings.size), settings.cache, world.actions.camera)
    frames = world.config.block_frames
    decode, pictures = _decoding(world, settings)
    return Forecast(
        weights=_weights(world),
        packed=packed_nbytes(world.transformer) if torch.device(device).type == "cpu" else 0,
        kept=world.memory_of(settings, context, None, history=0),
        pictures=pictures,
        passes={
            "gather": _gather(context, frames),
            "denoise": _denoise(world, context, settings.rows),
            "commit": _commit(context, frames),
            "decode": decode,
        },
    )


def _weights(world: World) -> dict[str, int]:
    models: dict[str, Any] = {
        "transformer": world.transformer,
        "decoder": world.autoencoder,
        "text encoder": world.text_encoder,
    }
    return {
        name: sum(map(nbytes, (*model.parameters(), *model.buffers())))
        for name, model in models.items()
        if model is not None
    }


# --- what comes and goes ----------------------------------------------------------------------
def _turned(context: Context) -> int:
    """Bytes for each number of what `worldsim.models.rope.rotate` turns: the number in float32
    (where it is not) and the result."""
    return _widened(context) + context.pool.dtype.itemsize


def _widened(context: Context) -> int:
    """Bytes for each number that is computed on in float32 and is not in it already."""
    return 0 if context.pool.dtype.itemsize >= FLOAT else FLOAT


def _gather(context: Context, frames: int) -> int:
    """Rotated copies of pages that are new or were moved, read and turned for some layers at once;
    shared copies are filled within the passes."""
    cache, pool = context.config, context.pool
    if cache.quantised:
        return 0
    moved = max(
        cache.sink if cache.positions == "packed" else 0, cache.mid if cache.form in BANKED else 0
    )
    pages = frames + moved
    if cache.capacity is not None:
        pages = min(pages, cache.capacity + cache.mid)
    layers = pool.shape.layers
    one = pages * _page_keys(context) // layers
    keys = min(layers, layers_at_once(one)) * one
    read = 2 * pool.dtype.itemsize if pages > 1 else 0  # a single page is read where it lies
    return keys * (read + _turned(context))


def _denoise(world: World, context: Context, rows: int) -> int:
    """A layer at its widest: in the feed-forward network, or where it attends."""
    config, itemsize = world.transformer.config, world.dtype.itemsize
    tokens = world.config.block_frames * context.pool.shape.tokens
    width = config.num_attention_heads * config.attention_head_dim
    x = rows * tokens * width * itemsize
    inner = rows * tokens * config.ffn_dim * itemsize
    # Held by name: the layer's input, the stream, queries, keys, values and the last branch's
    # output. In the network, its input as well, and its inner rows before and after the GELU.
    network = 7 * x + 2 * inner
    turned = tokens * width * _turned(context)
    return max(network, 5 * x + max(turned, _decoded(context, itemsize)))


def _decoded(context: Context, itemsize: int) -> int:
    """Of quantised pages, a few at a time of one layer: their codes, twice in float32, and as what
    they become."""
    if not context.config.quantised:
        return 0
    shape, held = context.pool.shape, context.config.capacity
    pages = DECODED if held is None else min(DECODED, held)
    numbers = 2 * pages * shape.tokens * shape.heads * shape.head_dim
    return numbers * (1 + 2 * FLOAT + itemsize)


def _commit(context: Context, frames: int) -> int:
    """A finished block's staged rows in one piece, and one frame of it on its way into a page."""
    itemsize, page = context.pool.dtype.itemsize, _page_keys(context)
    staged = (2 + context.config.asks) * frames * page * itemsize
    # A codec has the frame in float32, the codes before and after a sum, and the codes in bytes.
    coded = _widened(context) + 2 * FLOAT + 1 if context.config.quantised else 0
    return staged + 2 * page * (itemsize + coded)


def _page_keys(context: Context) -> int:
    """Numbers in the keys of a latent frame, of all layers."""
    shape = context.pool.shape
    return shape.layers * shape.tokens * shape.heads * shape.head_dim


def _decoding(world: World, settings: Settings) -> tuple[int, int]:
    """Bytes that decoding a block takes at its most, and those of its pictures."""
    if world.autoencoder is None:
        return 0, 0
    frames = world.config.block_frames
    _, channels, _, height, width = world.latents_of(settings.size, frames)
    frame = torch.empty(1, channels, 1, height, width, device="meta")
    decoder, seen = _watched(world.autoencoder)
    with torch.inference_mode():
        _, carry = decoder.decode(frame)
        shown, _ = decoder.decode(frame, carry)
    carried = decoder.carry_nbytes(height, width)
    # The widest module, the block's pictures so far, the new carry, and within a block that of the
    # frame before.
    inside = max(seen) + (frames - 1) * shown.nbytes + min(2, frames) * carried
    # In the end the pictures as they came, and twice in float32 on their way to bytes.
    numbers = frames * shown.numel()
    return max(inside, numbers * (shown.itemsize + 2 * FLOAT) + carried), numbers


def _watched(decoder: Decoder) -> tuple[Decoder, list[int]]:
    """A copy of a decoder that computes shapes alone, and a list that fills with the bytes that
    live while each of its modules runs."""
    seen: list[int] = []

    def saw(held: int, _: nn.Module, taken: tuple[Any, ...], given: Tensor) -> None:
        seen.append(held * (given.nbytes + sum(x.nbytes for x in taken if isinstance(x, Tensor))))

    assert isinstance(decoder, nn.Module)
    watched = deepcopy(decoder).to("meta")
    for name, module in watched.named_modules():
        if next(module.children(), None) is None:
            # What it takes and gives; within a block, the block has about as much by other names.
            within = name.count(".") > 1
            module.register_forward_hook(partial(saw, 2 if within else 1))
    return watched, seen
