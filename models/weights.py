"""Weights: casting and checking them."""

import torch
from torch import nn


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model in place, but keep what must stay float32 (as diffusers does on loading)."""
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        low = dtype.itemsize < 4 and any(part in keep for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if low else dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return model
