"""Self-attention over a clip that is there twice: a clean copy and a noisy copy of every frame.

Clean frames see clean frames up to their own; noisy frames see themselves and the clean frames
before them. Written out, it costs half of what masking the square of all tokens would.

Shapes: B clips, H heads, F frames, S tokens of a frame, N = F·S, D head size.
"""

import torch
from torch import Tensor

from worldsim.models.rope import rotate, rotation, token_positions

HIDDEN = -1e4  # added to a score: far below any other, and finite in half precision


class TwoCopies:
    """A context (`worldsim.models.context.Attends`) for training.

    Args:
        seen: which earlier frames each frame sees, bool ``[B, F, F]`` (query × key), never itself.
        grid: tokens of one frame, (height, width).
        head_dim: size of one attention head.
    """

    def __init__(self, seen: Tensor, grid: tuple[int, int], head_dim: int) -> None:
        self._frames = seen.shape[-1]
        self._tokens = grid[0] * grid[1]
        own = torch.eye(self._frames, dtype=torch.bool, device=seen.device)
        self._clean_bias = self._bias(seen | own)
        self._noisy_bias = self._bias(seen)
        positions = token_positions(torch.arange(self._frames, device=seen.device).repeat(2), *grid)
        self._cos, self._sin = rotation(positions, head_dim, torch.float32)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q, k, v [B, H, 2N, D]`` → ``[B, H, 2N, D]``; the clean copy comes first."""
        del layer
        half = q.shape[-2] // 2
        q = rotate(q, self._cos, self._sin) * q.shape[-1] ** -0.5
        k = rotate(k, self._cos, self._sin)
        (clean_q, noisy_q), (clean_k, noisy_k), (clean_v, noisy_v) = (
            x.split(half, dim=2) for x in (q, k, v)
        )
        scores = clean_q @ clean_k.transpose(-1, -2)
        clean = (scores + self._clean_bias.to(scores.dtype)).softmax(-1) @ clean_v

        before = noisy_q @ clean_k.transpose(-1, -2)
        before = before + self._noisy_bias.to(before.dtype)
        own = self._by_frame(noisy_q) @ self._by_frame(noisy_k).transpose(-1, -2)
        weights = torch.cat((before, own.flatten(2, 3)), dim=-1).softmax(-1)
        on_clean, on_own = weights.split((half, self._tokens), dim=-1)
        own_part = self._by_frame(on_own) @ self._by_frame(noisy_v)
        return torch.cat((clean, on_clean @ clean_v + own_part.flatten(2, 3)), dim=2)

    asks = False

    def stage(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a clip leaves nothing behind")

    def _by_frame(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self._frames, self._tokens))

    def _bias(self, seen: Tensor) -> Tensor:
        mask = seen.repeat_interleave(self._tokens, -1).repeat_interleave(self._tokens, -2)
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, HIDDEN)[:, None]
