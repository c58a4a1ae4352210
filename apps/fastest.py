"""The fastest kernel there is for one product or one attention: what a roofline is made of.

What is compared are torch's own kernels, alone, on the very tensors: a linear as torch computes it
and with its weight packed beforehand; attention as torch's kernel, as the model's own products
(`worldsim.models.products`), and as two products with a softmax between them in buffers that are
there already. On other devices nothing is compared.

Timing decides here what a *measurement* is set against; no pass of a model is chosen by it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from worldsim.models.packed import DTYPES
from worldsim.models.products import by_products

Run = Callable[[], object]
Maker = Callable[[], Run]  # packing and buffers are made by it, outside of what is timed
TRIES = 5
ATTENTION: tuple[Callable[..., Any], ...] = (F.scaled_dot_product_attention, by_products)


def ways(kernel: Callable[..., Any], args: tuple[Any, ...], options: Any) -> list[Maker]:
    """All ways to do a call; the first is to do it as it is."""
    made: list[Maker] = [lambda: partial(kernel, *args, **options)]
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.device.type != "cpu" or first.dtype not in DTYPES:
        return made
    if kernel is F.linear and not options:
        made.append(partial(_packed, *args))
    masks = options.get("attn_mask") is not None or len(args) > 3
    if kernel in ATTENTION and not masks:
        others = [other for other in ATTENTION if other is not kernel]
        made += [partial(partial, other, *args) for other in others]
        made.append(partial(_written_out, *args))
    return made


def fastest(made: list[Maker]) -> tuple[int, float]:
    """Number of the fastest of some ways, and its seconds (0 where there is no choice)."""
    if len(made) == 1:
        return 0, 0.0
    seconds, number = min((_seconds(way()), number) for number, way in enumerate(made))
    return number, seconds


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Run:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    product = torch.ops.mkldnn._linear_pointwise
    return lambda: product(x, packed, bias, "none", [], "")


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Run:
    scale = q.shape[-1] ** -0.5
    scores = q.new_empty(*q.shape[:-1], k.shape[-2]).flatten(0, 1)
    out = torch.empty_like(q).flatten(0, 1)

    def run() -> None:
        torch.bmm((q * scale).flatten(0, 1), k.flatten(0, 1).transpose(-1, -2), out=scores)
        torch._softmax(scores, -1, False, out=scores)
        torch.bmm(scores, v.flatten(0, 1), out=out)

    return run


def _seconds(run: Run) -> float:
    run()
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
