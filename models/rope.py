"""Three-axis rotary position embedding, from positions alone.

Angles come from ``position * frequency`` in float64, never from a table, so a stream has no length
limit. Pairs are interleaved, ``(x[2j], x[2j+1])``, and split over (t, h, w) as in Wan2.1.
This file does not know pages, blocks or policies: it turns positions into rotations.
"""

import torch
from torch import Tensor

THETA = 10_000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs of one head given to the (t, h, w) axes; time takes the remainder.

    Raises:
        ValueError: if ``head_dim`` is odd or too small to give each axis a pair.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"attention_head_dim must be even and at least 6, got {head_dim}")
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def token_positions(frames: Tensor, height: int, width: int) -> Tensor:
    """(t, h, w) of every token in (frame, row, column) order.

    Args:
        frames: temporal position of each latent frame, ``[F]`` (any real number type).
        height, width: the token grid of one latent frame.

    Returns:
        float64 ``[F * height * width, 3]``.
    """
    t = frames.to(torch.float64)
    h = torch.arange(height, dtype=torch.float64, device=t.device)
    w = torch.arange(width, dtype=torch.float64, device=t.device)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1).reshape(-1, 3)


def rotation(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine that rotate the pairs of a head at ``positions``.

    Args:
        positions: float64 ``[N, 3]``, see `token_positions`.
        head_dim: size of one attention head.
        dtype: the dtype of the keys; below float32 the rotation is still computed in float32.

    Returns:
        two tensors ``[N, head_dim / 2]``.
    """
    angles = []
    for axis, pairs in enumerate(axis_pairs(head_dim)):
        steps = torch.arange(pairs, dtype=torch.float64, device=positions.device)
        angles.append(positions[:, axis, None] * THETA ** (-steps / pairs))
    angle = torch.cat(angles, dim=-1)
    working = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(working), angle.sin().to(working)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of ``x [..., N, head_dim]`` by ``cos, sin [N, head_dim / 2]``.

    A pair is one complex number: a single pass over memory, with the bits of `rotate_pairs`.
    """
    if torch.compiler.is_compiling():  # which makes one pass of anything but complex numbers
        return rotate_pairs(x, cos, sin)
    working = x.to(cos.dtype)
    pairs, turn = torch.view_as_complex(working.unflatten(-1, (-1, 2))), torch.complex(cos, sin)
    turned = pairs * turn if working is x else pairs.mul_(turn)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rotate` does, written out."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
