"""Quantised pages: round to nearest, one scale for a few tokens of a channel.

Symmetric RTN as in the field's studies of KV quantisation: groups of up to 16 tokens for each head
and channel share a scale ``amax / (2ᵇ⁻¹ - 1)`` in float16. Codes are really packed: INT8 is one
byte a number, INT4 half of one, scales add an eighth of a byte. With ``hadamard`` the channels are
rotated first, which spreads a token that is much larger than its neighbours over all of them
(QuaRot).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from worldsim.cache.config import FORMATS, FULL

GROUP = 16  # tokens that share a scale, at most
LEAST, MOST = 2.0**-14, 65504.0  # normal float16: below it a scale would lose its own digits


@dataclass(frozen=True)
class Codec:
    """Numbers of ``bits`` bits (8 or 4), with or without a rotation of the channels."""

    bits: int
    hadamard: bool = False

    @property
    def most(self) -> int:
        """The largest code; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1

    def width(self, channels: int) -> int:
        """Bytes of the codes of one token."""
        return channels * self.bits // 8

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[…, T, D]`` → codes uint8 ``[…, T, width]`` and scales float16 ``[…, groups, D]``."""
        y = x.float()
        if self.hadamard:
            y = y @ hadamard(x.shape[-1], x.device)
        groups = y.unflatten(-2, (-1, group_size(x.shape[-2])))
        scale = (groups.abs().amax(-2) / self.most).clamp(LEAST, MOST).to(torch.float16)
        codes = (groups / scale.float()[..., None, :]).round_().clamp_(-self.most, self.most)
        codes = (codes.flatten(-3, -2) + 2 ** (self.bits - 1)).to(torch.uint8)
        if self.bits == 4:
            low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
            codes = low | (high << 4)
        return codes, scale

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `encode`, to within half a scale."""
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        groups = codes.unflatten(-2, (scales.shape[-2], -1)).float() - 2 ** (self.bits - 1)
        y = (groups * scales.float()[..., None, :]).flatten(-3, -2)
        if self.hadamard:
            y = y @ hadamard(y.shape[-1], y.device)
        return y.to(dtype)


CODECS = {
    name: Codec(bits=int(name[3]), hadamard=name.endswith("h")) for name in FORMATS if name != FULL
}


def group_size(tokens: int) -> int:
    """The largest divisor of ``tokens`` that is at most `GROUP`."""
    return next(size for size in range(min(GROUP, tokens), 0, -1) if tokens % size == 0)


@cache
def hadamard(channels: int, device: torch.device | str = "cpu") -> Tensor:
    """The normalised Hadamard matrix, its own inverse, ``[D, D]``; where D is no power of two, one
    of the largest power of two that divides it, repeated along the diagonal."""
    size = channels & -channels
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix / size**0.5] * (channels // size))
