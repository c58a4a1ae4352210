"""Linear layers with their weights in the order in which oneDNN multiplies, and GELU inside.

torch's own linear reorders a half-precision weight at every call, as much work as a product of few
rows; in float32 it takes sums apart differently on different numbers of threads. A packed weight
does neither. It is a copy, made at the first call and kept beside the weight, so only weights up to
`PACKED` numbers have one: larger ones come with more rows, beside which a reorder is little. In
float32 weights up to `SMALL` have none either: torch reads them faster where rows are few, and how
many rows there are must not choose the kernel, since batches and ranks have to agree in their bits.
Sizes and dtypes decide, never a timing.

The copy belongs to one state of its weight: one that was moved, cast, trained or replaced is packed
anew. What is written into ``weight.data`` nobody can see; `unpack` is for that.

Whoever cannot take this path takes torch's: gradients, compilers (which pack by themselves),
autocast, quantised weights, other devices and dtypes.
"""

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

PACKED = 1 << 20  # numbers of a weight that has a packed copy, at most
SMALL = 1 << 18  # numbers of a float32 weight that is not worth one


def _dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN multiplies here: by capability, never by a timing."""
    if not torch.backends.mkldnn.is_available():
        return ()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


DTYPES = _dtypes()


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed as the module docstring says."""

    _copy: Tensor | None = None
    _of: "tuple[StorageWeakRef, int, int] | None" = None

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x) if self._here(x) else F.linear(x, self.weight, self.bias)

    def with_gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh) of what `forward` gives; in half precision it is rounded once, not twice."""
        if self._here(x):
            return self._product(x, "gelu", "tanh")
        return F.gelu(F.linear(x, self.weight, self.bias), approximate="tanh")

    def packs(self) -> bool:
        """Whether its weight has a packed copy, once it was used on a CPU."""
        weight = self.weight
        plain = type(weight) is nn.Parameter  # a quantised one is of another kind
        least = SMALL if weight.dtype == torch.float32 else 0
        return plain and least < weight.numel() <= PACKED and weight.dtype in DTYPES

    def unpack(self) -> None:
        """Forget the packed copy."""
        self._copy = self._of = None

    def _here(self, x: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and self.packs()
            and not torch.is_autocast_enabled("cpu")
        )

    def _product(self, x: Tensor, activation: str = "none", form: str = "") -> Tensor:
        weight = self._packed()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, activation, [], form)
        return out

    def _packed(self) -> Tensor:
        weight = self.weight
        storage = weight.untyped_storage()
        # Weights that were moved while no gradients were tracked count no versions.
        at = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        copy, of = self._copy, self._of
        # The reference is weak, but as long as it is there no other storage takes that name.
        if copy is None or of is None or of[0].cdata != storage._cdata or of[1:] != at:
            copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
            self._copy, self._of = copy, (StorageWeakRef(storage), *at)
        return copy

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # as torch has it
        self.unpack()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_copy", "_of")}


def unpack(model: nn.Module) -> None:
    """Forget the packed copies of a model whose weights were written to behind torch's back."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.unpack()


def packed_nbytes(model: nn.Module) -> int:
    """Bytes of all packed copies that a model on a CPU will have."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    return sum(linear.weight.nbytes for linear in linears if linear.packs())
