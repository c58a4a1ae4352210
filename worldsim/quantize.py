"""Weights of fewer bits, through torchao: the transformer's linears, on loading."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as holds_others

from worldsim.models.transformer import CausalWanTransformer3DModel


def check_quantization(config: Any) -> tuple[Any, tuple[str, ...]]:
    """A torchao config, and the modules that it is not for, out of either library's.

    Args:
        config: diffusers' ``TorchAoConfig(...)`` or a config of torchao such as
            ``Int8WeightOnlyConfig()``.

    Raises:
        ValueError: for anything else, or where torchao is missing.
    """
    if find_spec("torchao") is None:
        raise ValueError("quantisation needs torchao: pip install 'worldsim[quantize]'")
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import FqnToConfig

    kind = getattr(config, "quant_type", config)
    if not isinstance(kind, AOBaseConfig) or isinstance(kind, FqnToConfig):
        raise ValueError(
            "quantization_config must be diffusers' TorchAoConfig or a torchao config for all "
            f"linears, got {type(kind).__name__}"
        )
    return kind, tuple(getattr(config, "modules_to_not_convert", None) or ())


def quantize(transformer: CausalWanTransformer3DModel, config: Any, device: torch.device) -> None:
    """Quantise all linears in place, but for what must stay float32; it ends up on ``device``.

    Args:
        config: see `check_quantization`.

    Raises:
        ValueError: as `check_quantization`, or torchao cannot do it here.
    """
    kind, unwanted = check_quantization(config)
    from torchao.quantization import quantize_

    kept = set(transformer._keep_in_fp32_modules)

    def wanted(module: nn.Module, name: str) -> bool:
        # As diffusers: a name of a module to leave out may be that of a parent, or a part of it.
        left_out = any(f"{part}." in f"{name}." for part in unwanted)
        return isinstance(module, nn.Linear) and not left_out and kept.isdisjoint(name.split("."))

    try:
        quantize_(transformer, kind, wanted, device=device)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"torchao cannot quantise this model by {type(kind).__name__} on {device}: {reason}"
        ) from None


def is_quantized(model: nn.Module) -> bool:
    """Whether some of its weights are quantised."""
    return any(holds_others(parameter) for parameter in model.parameters())


def nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds. A quantised one is made of others; what it says itself is what
    it would be without."""
    if not holds_others(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(nbytes(getattr(tensor, name)) for name in names)
