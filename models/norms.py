"""Norms, and the modulation that follows or precedes them, in few passes over memory.

On a CPU every operation between two products is a pass over memory, so they are counted here: what
a compiler fuses by itself, and what training needs for gradients, is written plainly beside it.

Shapes: R rows, F latent frames, N = F · tokens of a frame, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def few_passes(x: Tensor) -> bool:
    """Whether operations run one by one on a CPU, for their results alone."""
    return (
        x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )


class RMSNorm(nn.Module):
    """RMS norm over the full width, rounded to the input's dtype before the gain (as in Wan), or,
    where passes are counted, only after it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if not few_passes(x):
            return F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        y = y * scale if y is x else y.mul_(scale)
        return y.mul_(self.weight.to(wide)).to(x.dtype)


class AffineNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its own parameters (float32 in a half-precision model)."""

    def forward(self, x: Tensor) -> Tensor:
        if few_passes(x) and _takes(x, self.weight):
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) · (1 + scale) + shift`` with ``x [R, N, D]`` and per-frame ``[R, F, D]``."""
    if not (few_passes(x) and _takes(x, shift)):
        return modulated_norm_plainly(x, shift, scale, eps)
    # The modulation of one frame is the gain and the bias of its norm.
    frames = x.unflatten(1, (shift.shape[1], -1)).flatten(0, 1)
    given = zip(frames, (1 + scale).flatten(0, 1), shift.flatten(0, 1), strict=True)
    done = [F.layer_norm(frame, (x.shape[-1],), gain, bias, eps) for frame, gain, bias in given]
    return (torch.cat(done) if len(done) > 1 else done[0]).view(x.shape)


def modulated_norm_plainly(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """What `modulated_norm` does, written out."""
    y = F.layer_norm(x, (x.shape[-1],), eps=eps).unflatten(1, (shift.shape[1], -1))
    y = torch.addcmul(shift[:, :, None], y, 1 + scale[:, :, None])
    return y.flatten(1, 2).to(x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + y · gate`` with ``x, y [R, N, D]`` and a per-frame gate ``[R, F, D]``."""
    if not (few_passes(x) and x.dtype == y.dtype):
        return add_gated_plainly(x, y, gate)
    x, y = (z.unflatten(1, (gate.shape[1], -1)) for z in (x, y))
    return torch.addcmul(x, y, gate[:, :, None].to(x.dtype)).flatten(1, 2)


def add_gated_plainly(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """What `add_gated` does, written out."""
    gated = y.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    return x + gated.flatten(1, 2).to(y.dtype)


def _takes(x: Tensor, parameter: Tensor) -> bool:
    """Whether torch's CPU norms take a parameter of this dtype as it is."""
    return parameter.dtype in (x.dtype, torch.float32) and x.dtype != torch.float64
