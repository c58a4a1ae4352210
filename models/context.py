"""What self-attention reads: the seam between the transformer and any form of memory.

A context answers ``attend(layer, q, k, v)`` with queries and keys *before* RoPE. Two forms:
`ContextView` reads the pages of one session (the cached path); `ClipContext` attends within one
whole clip under a frame mask (training, and the slow path that the cached path must equal).

Shapes: L layers, H heads, N tokens of the own frames, D head size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from worldsim.cache.context import Context
from worldsim.models.attention import NATIVE, attention
from worldsim.models.rope import rotate, rotation, token_positions


class Attends(Protocol):
    """Anything that self-attention can ask: softmax over pages, a recurrent state, …"""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q, k, v [rows, H, N, D]`` un-rotated → attention output ``[rows, H, N, D]``."""
        ...

    def stage(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Record the K/V that a commit pass leaves behind."""
        ...


class ContextView:
    """One session's pages, rotated for the current block.

    Keys and values of a layer lie in one preallocated buffer, seen as ``[H, own + capacity, D]``:
    the block's own rows first, then one slot for each page. So the own rows have a fixed address, a
    filling context only lengthens a slice, and a slot is written again only when its page or its
    position changes. In memory rows come before heads, which makes every slice's strides the same:
    a compiled pass fits all lengths.
    """

    def __init__(
        self,
        context: Context,
        block_frames: int,
        grid: tuple[int, int],
        backend: str = NATIVE,
    ) -> None:
        self.context = context
        self.grid = grid
        self.backend = backend
        shape = context.pool.shape
        self._own = block_frames * shape.tokens
        self._slots: list[tuple[tuple[int, int], int]] = []  # (page version, position)
        self._allocate(context.config.capacity or block_frames)
        staging = (shape.heads, self._own, shape.head_dim)
        self.staged_keys = [self._zeros(staging) for _ in range(shape.layers)]
        self.staged_values = [self._zeros(staging) for _ in range(shape.layers)]
        self.own_rotation: tuple[Tensor, Tensor] | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the rotated copies and of the staging rows."""
        tensors = (*self._keys, *self._values, *self.staged_keys, *self.staged_values)
        return sum(tensor.nbytes for tensor in tensors)

    def prepare(self, start: int, frames: int) -> None:
        """Bring the buffers up to date for the block at absolute frame ``start``; once per block.

        Raises:
            ValueError: if the block has more frames than the view was made for.
        """
        shape = self.context.pool.shape
        own = frames * shape.tokens
        if own > self._own:
            raise ValueError(
                f"a block of {frames} latent frames does not fit this session, which was opened "
                f"for {self._own // shape.tokens}"
            )
        plan = self.context.plan(start, frames)
        if len(plan.pages) > self._capacity:
            self._allocate(2 * len(plan.pages))  # only where nothing is ever evicted
        wanted = [
            (self.context.pool.version(page), position)
            for page, position in zip(plan.pages, plan.key_positions, strict=True)
        ]
        for slot, content in enumerate(wanted):
            if slot >= len(self._slots) or self._slots[slot] != content:
                self._write(slot, plan.pages[slot], plan.key_positions[slot])
        self._slots = wanted
        # A block shorter than the buffer's own rows ends right before the first slot.
        first = self._own - own
        end = self._own + len(wanted) * shape.tokens
        self.keys = [keys[:, first:end] for keys in self._keys]
        self.values = [values[:, first:end] for values in self._values]
        for rows in (*self.keys, *self.values):
            # Tells `torch.compile` beforehand that this one length grows: it compiles once.
            torch._dynamo.maybe_mark_dynamic(rows, 1)
        self.own_rotation = self._rotation(plan.query_positions)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.own_rotation is not None, "prepare() comes before attend()"
        cos, sin = self.own_rotation
        own = k.shape[-2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :own] = rotate(k[0], cos, sin)
        values[:, :own] = v[0]
        return attention(rotate(q, cos, sin), keys[None], values[None], backend=self.backend)

    def stage(self, layer: int, k: Tensor, v: Tensor) -> None:
        own = k.shape[-2]
        self.staged_keys[layer][:, :own] = k[0]
        self.staged_values[layer][:, :own] = v[0]

    def staged(self, frames: int) -> tuple[Tensor, Tensor]:
        """The K/V of the last commit pass, ``[L, H, frames * tokens, D]`` each."""
        own = frames * self.context.pool.shape.tokens
        return (
            torch.stack([keys[:, :own] for keys in self.staged_keys]),
            torch.stack([values[:, :own] for values in self.staged_values]),
        )

    def _write(self, slot: int, page: int, position: int) -> None:
        pool = self.context.pool
        first = self._own + slot * pool.shape.tokens
        rows = slice(first, first + pool.shape.tokens)
        cos, sin = self._rotation((position,))
        keys, values = rotate(pool.keys(page), cos, sin), pool.values(page)
        for layer in range(pool.shape.layers):
            self._keys[layer][:, rows] = keys[layer]
            self._values[layer][:, rows] = values[layer]

    def _rotation(self, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        pool = self.context.pool
        positions = token_positions(torch.tensor(frames), *self.grid)
        cos, sin = rotation(positions, pool.shape.head_dim, pool.dtype)
        return cos.to(pool.device), sin.to(pool.device)

    def _allocate(self, capacity: int) -> None:
        shape = self.context.pool.shape
        size = (self._own + capacity * shape.tokens, shape.heads, shape.head_dim)
        self._capacity = capacity
        self._keys = [self._zeros(size).transpose(0, 1) for _ in range(shape.layers)]
        self._values = [self._zeros(size).transpose(0, 1) for _ in range(shape.layers)]
        self._slots = []

    def _zeros(self, size: tuple[int, ...]) -> Tensor:
        # Always plain tensors: compiled code does not take an inference tensor for the same thing.
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=self.context.pool.dtype, device=self.context.pool.device)


class Rows:
    """Several one-row contexts side by side: attention runs per row, each over its own keys."""

    def __init__(self, views: Sequence[Attends]) -> None:
        self.views = views

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = [
            view.attend(layer, q[row : row + 1], k[row : row + 1], v[row : row + 1])
            for row, view in enumerate(self.views)
        ]
        return torch.cat(out) if len(out) > 1 else out[0]

    def stage(self, layer: int, k: Tensor, v: Tensor) -> None:
        for row, view in enumerate(self.views):
            view.stage(layer, k[row : row + 1], v[row : row + 1])


class ClipContext:
    """A whole clip at once: every frame attends to the frames that ``visible`` names.

    Args:
        visible: bool ``[rows or 1, F, F]``, query frame × key frame.
        frames: temporal position of each frame, ``[F]``; frames may share a position (a clean and
            a noisy copy of the same frame, say).
        grid: tokens of one frame, (height, width).
        head_dim: size of one attention head.
        dtype: see `rotation`.
    """

    def __init__(
        self,
        visible: Tensor,
        frames: Tensor,
        grid: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        tokens = grid[0] * grid[1]
        mask = visible.repeat_interleave(tokens, -1).repeat_interleave(tokens, -2)
        self._mask = mask[:, None]
        self._cos, self._sin = rotation(token_positions(frames, *grid), head_dim, dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del layer
        q, k = (rotate(x, self._cos, self._sin) for x in (q, k))
        return attention(q, k, v, mask=self._mask)

    def stage(self, layer: int, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a clip leaves nothing behind")


def block_causal(frames: int, block_frames: int, device: torch.device | None = None) -> Tensor:
    """``visible [1, F, F]``: own block in both directions, and every earlier block."""
    block = torch.arange(frames, device=device) // block_frames
    return (block[:, None] >= block[None, :])[None]
