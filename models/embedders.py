"""What levels, actions and texts become before the first layer: the embedders of the video DiT.

Shapes: R rows, F latent frames, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# float32 products of few rows round differently with thread and row count; a chunk of this many
# rows does not. Embeddings of levels are therefore always computed in chunks of exactly this size.
FIXED_ROWS = 16


class TwoLinears(nn.Module):
    """``linear_2(act(linear_1(x)))``: the embedders of time, text and action."""

    def __init__(self, dim_in: int, dim: int, act: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.act = act
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ConditionEmbedder(nn.Module):
    """Levels, actions and text become the tensors that the layers are modulated by."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int, action_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLinears(freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLinears(text_dim, dim, nn.GELU(approximate="tanh"))
        self.action_embedder = TwoLinears(action_dim, dim, nn.SiLU()) if action_dim else None

    def forward(self, timestep: Tensor, actions: Tensor | None) -> tuple[Tensor, Tensor]:
        """``timestep [R, F]`` → embedding ``[R, F, D]`` and modulation ``[R, F, 6, D]``."""
        rows, frames = timestep.shape
        sinusoid = time_sinusoid(timestep.flatten(), self.freq_dim)
        given = None if actions is None else actions.flatten(0, 1)
        # Training has no bits to keep: one product for all rows.
        size = rows * frames if self.training else FIXED_ROWS
        embedding, modulation = [], []
        for chunk in range(0, rows * frames, size):
            part = slice(chunk, chunk + size)
            missing = max(0, chunk + size - rows * frames)
            e = self.time_embedder(F.pad(sinusoid[part], (0, 0, 0, missing)))
            if self.action_embedder is not None and given is not None:
                e = e + self.action_embedder(F.pad(given[part], (0, 0, 0, missing)))
            m = self.time_proj(F.silu(e).to(self.time_proj.weight.dtype))
            embedding.append(e[: size - missing])
            modulation.append(m[: size - missing])
        return (
            torch.cat(embedding).unflatten(0, (rows, frames)),
            torch.cat(modulation).unflatten(0, (rows, frames)).unflatten(-1, (6, -1)),
        )


def time_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """``[cos(t ω) | sin(t ω)]`` with ω from 1 down to 1/10000, ``[n] → [n, dim]``.

    Computed in float64 and rounded to float32: in float32, or after a cast to bfloat16, a level
    such as 937.5 is another level.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=timestep.device)
    angle = timestep.to(torch.float64)[:, None] * 10_000.0 ** (-steps / half)
    sinusoid = torch.cat((angle.cos(), angle.sin()), dim=-1)
    return sinusoid if timestep.dtype == torch.float64 else sinusoid.float()
