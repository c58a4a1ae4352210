"""Softmax attention: one function, several kernels.

Shapes: B rows, H heads, Q queries, K keys, D head size. ``native`` (the best that torch has here:
its SDPA, or on some CPUs the products one by one, `worldsim.models.products`) and ``matmul`` (the
formula, written out) are always there and need nothing; the others go through diffusers' dispatcher
and are loaded on first use.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worldsim.models.products import by_products, takes

NATIVE = "native"
MATMUL = "matmul"


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = NATIVE
) -> Tensor:
    """``softmax(q kᵀ / √D) v`` for ``q [B, H, Q, D]`` and ``k, v [B, H, K, D]``.

    Args:
        mask: bool, broadcastable to ``[B, H, Q, K]``; True attends. For training only: the cached
            path slices its keys, since a mask lets NaN through and rounds differently.
        backend: see `check_backend`.
    """
    if backend == NATIVE:
        if mask is None and takes(q, k):
            return by_products(q, k, v)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if backend == MATMUL:
        return softmax_attention(q, k, v, mask)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    rows_last = (x.transpose(1, 2) for x in (q, k, v))  # the dispatcher wants [B, N, H, D]
    return dispatch_attention_fn(*rows_last, attn_mask=mask, backend=backend).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula written out, for any device and with gradients: what every kernel is tested
    against."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def check_backend(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> str:
    """Return ``name`` if that attention kernel runs on such tensors here; it is tried out.

    Raises:
        ValueError: unknown or not installed, naming what there is.
    """
    if name in (NATIVE, MATMUL):
        return name
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
    )

    known = [NATIVE, MATMUL, *sorted(backend.value for backend in AttentionBackendName)]
    if name not in known:
        raise ValueError(f"unknown attention backend {name!r}; choose one of {', '.join(known)}")
    probe = torch.zeros(1, 1, 16, head_dim, device=device, dtype=dtype)
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
        attention(probe, probe, probe, backend=name)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"attention backend {name!r} does not run here ({reason}); use {NATIVE!r}"
        ) from error
    return name
