"""Attention on a CPU as two products and a softmax, where torch's own kernel is the slower way.

torch's SDPA multiplies tiles with MKL. In bfloat16 that is the processor's bfloat16 unit only where
it is AMX; elsewhere oneDNN's products, which know AVX512-BF16, take half the time. In float32 MKL
has no AVX-512 code for AMD's processors, which have units of that width since Zen 5. Capability
decides, never a timing.

Scores are made piece by piece in the dtype of the products: of bfloat16 they are rounded once more
than inside SDPA (against float64 0.4 % in place of 0.2 %, relative RMS).

Shapes: B rows, H heads, Q queries, K keys, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from worldsim.models.packed import DTYPES

PIECE = 1 << 20  # scores at a time: they stay in the caches, and the allocator keeps their memory
FEWEST = 32  # queries, of fewer the single operations take longer than what they save
SUMMED = 1 << 13  # numbers, of more oneDNN shares a float32 sum out among threads


def _dtypes() -> tuple[torch.dtype, ...]:
    """In which products one by one are the faster way on this processor."""
    if torch.cpu._is_amx_tile_supported():
        return ()
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    full_width = "AMD" in told.get("cpu_name", "") and told.get("avx512_vp2intersect", False)
    faster = {torch.bfloat16: torch.cpu._is_avx512_bf16_supported(), torch.float32: full_width}
    return tuple(dtype for dtype in DTYPES if faster[dtype])


FASTER = _dtypes()


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether `by_products` is the way for these: a pass for its result alone, run one operation
    after the other, whose bits do not depend on the number of threads."""
    return (
        q.dtype in FASTER
        and q.shape[-2] >= FEWEST
        and (q.dtype != torch.float32 or k.shape[-2] <= SUMMED)
        and q.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q kᵀ / √D) v`` for ``q [B, H, Q, D]`` and ``k, v [B, H, K, D]``, on a CPU."""
    if has_torch_function((q, k, v)):  # whoever watches torch's calls sees one attention
        return handle_torch_function(by_products, (q, k, v), q, k, v)
    *_, heads, queries, size = q.shape
    keys = k.shape[-2]
    out = q.new_empty(len(q), queries, heads, size).transpose(1, 2)  # rows whole, as `out` reads
    at_once = max(1, PIECE // (queries * keys))
    tile = queries if at_once > 1 else min(queries, max(1, PIECE // keys))
    for row in range(len(q)):
        for head in range(0, heads, at_once):
            of = slice(head, head + at_once)
            for query in range(0, queries, tile):
                some = slice(query, query + tile)
                out[row, of, some] = _piece(q[row, of, some], k[row, of], v[row, of])
    return out


def _piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of some heads and queries, without a row axis."""
    scale = q.shape[-1] ** -0.5
    if q.dtype == torch.float32:
        heads = zip(q * scale, k, v, strict=True)
        return torch.stack([_onednn(_weights(_onednn(x, y)), z.t()) for x, y, z in heads])
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(-1, -2), beta=0, alpha=scale)
    return torch.bmm(_weights(scores), v)


def _weights(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, out=scores)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """``x weightᵀ``, which torch's own float32 products leave to MKL."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.contiguous(), None, "none", [], "")
    return out
