"""The roofline of a block: its matrix products and its attention alone, nothing around them.

What counts is recorded from the model at work, so that no size is written down twice: every call of
a linear layer, a written-out matrix product, an attention kernel or a convolution. Denoising thus
counts the products and the attention of all its steps; a commit those up to the last layer's K/V,
where it ends; decoding its convolutions. What does not count is everything between them: norms,
rotations, activations, modulation, copies, noise, the page table, Python. K/V of a text are made
once for each prompt, so they are in neither side.

The recorded calls are run again by themselves, in their order, on random tensors of the same size,
layout, dtype and device. Each weight and each layer's context has a twin of its own, and tensors
that shared memory share a twin: caches see what they see in the real pass. A bias is added inside
its kernel, so it counts as well; a GELU does not, even where the model has it inside.

Kernels are those of the model until `Roofline.sharpen`: from then on each shape has the fastest
that there is (`worldsim.apps.fastest`), whether or not it is the model's own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from worldsim.apps.fastest import Run, fastest, ways
from worldsim.models.products import by_products


def _by_row(out: Tensor, x: Tensor, *_: Any) -> int:
    """Every output sums over the last axis of ``x``: linear layers and matrix products."""
    return 2 * out.numel() * x.shape[-1]


def _by_kernel(out: Tensor, _x: Tensor, weight: Tensor, *_: Any) -> int:
    """Every output sums over one filter: convolutions."""
    return 2 * out.numel() * weight[0].numel()


def _by_keys(out: Tensor, q: Tensor, k: Tensor, *_: Any) -> int:
    """``q kᵀ`` and the product with the values; softmax is in the kernel, but not counted."""
    return 2 * (q.numel() + out.numel()) * k.shape[-2]


# Floating-point operations of each kernel that counts, from its output and its arguments.
FLOPS: Mapping[Callable[..., Tensor], Callable[..., int]] = {
    F.linear: _by_row,
    torch.matmul: _by_row,
    torch.bmm: _by_row,
    Tensor.matmul: _by_row,
    Tensor.__matmul__: _by_row,
    F.scaled_dot_product_attention: _by_keys,
    by_products: _by_keys,
    F.conv1d: _by_kernel,
    F.conv2d: _by_kernel,
    F.conv3d: _by_kernel,
}


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """What a packed linear computes, as arguments of the plain one; a packed weight has neither
    address nor strides, but it is one object for as long as it is there."""
    rows, columns = weight.shape
    plain = Layout(id(weight), (rows, columns), (columns, 1), x.dtype, x.device)
    return (x, plain) if bias is None else (x, plain, bias)


@dataclass(frozen=True)
class Layout:
    """What a tensor is apart from its values; the address is in bytes, strides in elements."""

    address: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def random(self) -> Tensor:
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        flat = torch.randn(last + 1, device=self.device).to(self.dtype)
        return flat.as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Call:
    """One call of a kernel; tensors are named by their layout."""

    kernel: Callable[..., Tensor]
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    flops: int


class Roofline:
    """The kernels of each part of a block, recorded once, run alone as often as one likes."""

    def __init__(self) -> None:
        self._calls: dict[str, list[Call]] = {}
        self._ways: dict[str, list[Run]] = {}
        self.gemm = 0.0  # operations a second of the fastest product, once it is known
        self._twins: dict[Layout, Tensor] = {}

    @contextmanager
    def record(self, part: str) -> Iterator[None]:
        """Take what this thread calls inside as the kernels of ``part``."""
        # A graph does not say what it calls: compiled passes run as they were.
        with torch.compiler.set_stance("force_eager"), _Recorder() as recorder:
            yield
        # Only now, so that no twin takes the place that a tensor of the model would have had.
        self._calls[part] = [
            Call(
                call.kernel,
                tuple(self._twin(value) for value in call.args),
                {name: self._twin(value) for name, value in call.options.items()},
                call.flops,
            )
            for call in recorder.calls
        ]
        self._ways[part] = [partial(c.kernel, *c.args, **c.options) for c in self._calls[part]]

    @torch.inference_mode()
    def sharpen(self) -> None:
        """Take the fastest kernel for each shape: tried out once, here and now."""
        best: dict[Any, int] = {}  # by shape
        made: dict[Any, Run] = {}  # by tensors: a weight that is used in each step is packed once
        for part, calls in self._calls.items():
            self._ways[part] = [self._fastest(call, best, made) for call in calls]

    def _fastest(self, call: Call, best: dict[Any, int], made: dict[Any, Run]) -> Run:
        there = ways(call.kernel, call.args, call.options)
        tensors = [x for x in call.args if isinstance(x, Tensor)]
        shape = (call.kernel, *((x.shape, x.stride(), x.dtype) for x in tensors))
        if shape not in best:
            best[shape], seconds = fastest(there)
            if call.kernel is F.linear and seconds:
                self.gemm = max(self.gemm, call.flops / seconds)
        same = (call.kernel, *map(id, call.args), *map(id, call.options.values()))
        if same not in made:
            made[same] = there[best[shape]]()
        return made[same]

    @torch.inference_mode()
    def run(self, part: str) -> None:
        """Run the kernels of a part by themselves."""
        for run in self._ways[part]:
            run()

    def flops(self, part: str) -> int:
        """Floating-point operations of a part; a multiplication and its addition are two."""
        return sum(call.flops for call in self._calls[part])

    def _twin(self, value: Any) -> Any:
        if isinstance(value, Layout):
            if value not in self._twins:
                self._twins[value] = value.random()
            return self._twins[value]
        return value


class _Recorder(TorchFunctionMode):
    """Sees the calls of torch's functions on one thread, and notes those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        out = func(*args, **options)
        if func is torch.ops.mkldnn._linear_pointwise:
            args, func = _pointwise(*args), F.linear
        if func in FLOPS:
            flops = FLOPS[func](out, *args)
            named = {name: _layout(value) for name, value in options.items()}
            self.calls.append(Call(func, tuple(map(_layout, args)), named, flops))
        return out


def _layout(value: Any) -> Any:
    """The layout of a tensor of figures; masks and everything else stay what they are."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value  # and what is a layout already
    return Layout(value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.device)
