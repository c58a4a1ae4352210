"""What self-attention reads: the seam between the transformer and any form of memory.

A context answers ``attend(layer, q, k, v)`` with queries and keys *before* RoPE. Two forms:
`worldsim.models.view.ContextView` reads the pages of one session (the cached path); `ClipContext`
attends within one whole clip under a frame mask (training, and the slow path that the cached path
must equal).

Shapes: L layers, H heads, N tokens of the own frames, D head size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from worldsim.models.attention import NATIVE, attention
from worldsim.models.rope import rotate, rotation, token_positions


class Attends(Protocol):
    """Anything that self-attention can ask: softmax over pages, a recurrent state, …"""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q, k, v [rows, H, N, D]`` un-rotated → attention output ``[rows, H, N, D]``."""
        ...

    @property
    def asks(self) -> bool:
        """Whether a commit pass leaves queries behind as well."""
        ...

    def stage(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """Record the keys, the values and, where it `asks`, the queries of a commit pass."""
        ...


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

    @property
    def asks(self) -> bool:
        return any(view.asks for view in self.views)

    def stage(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        for row, view in enumerate(self.views):
            one = slice(row, row + 1)
            asked = q[one] if q is not None and view.asks else None
            view.stage(layer, asked, k[one], v[one])


class ClipContext:
    """A whole clip at once: every frame attends to the frames that ``visible`` names.

    Args:
        visible: bool ``[rows or 1, F, F]``, query frame × key frame.
        frames: temporal position of each frame, ``[F]``; frames may share a position (a clean and
            a noisy copy of the same frame, say).
        grid: tokens of one frame, (height, width).
        head_dim: size of one attention head.
        dtype: see `rotation`.
        backend: of attention; training on a CPU is faster with ``matmul``.
    """

    def __init__(
        self,
        visible: Tensor,
        frames: Tensor,
        grid: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        backend: str = NATIVE,
    ) -> None:
        self._backend = backend
        tokens = grid[0] * grid[1]
        mask = visible.repeat_interleave(tokens, -1).repeat_interleave(tokens, -2)
        self._mask = mask[:, None]
        self._cos, self._sin = rotation(token_positions(frames, *grid), head_dim, dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del layer
        q, k = (rotate(x, self._cos, self._sin) for x in (q, k))
        return attention(q, k, v, self._mask, self._backend)

    asks = False

    def stage(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a clip leaves nothing behind")


def block_causal(frames: int, block_frames: int, device: torch.device | None = None) -> Tensor:
    """``visible [1, F, F]``: own block in both directions, and every earlier block."""
    block = torch.arange(frames, device=device) // block_frames
    return (block[:, None] >= block[None, :])[None]
