"""Weights: loading them strictly, and casting them."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from worldsim.models.files import CONFIG, read_config, stored_in

Model = TypeVar("Model", bound=nn.Module)


def load_model(kind: type[Model], folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A model from a diffusers folder (``config.json`` and weights in one file or in shards).

    Unlike a plain `from_pretrained` it refuses what does not fit.

    Raises:
        ValueError: a file is missing, truncated, of another model, or has NaN in it.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: the weights are incomplete")
    config = read_config(folder / CONFIG)
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise ValueError(f"{folder} holds a {config['_class_name']}, not a {kind.__name__}")
    tensors = stored_in(folder)
    try:
        model = kind.from_config(config)  # type: ignore[attr-defined]
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG} does not fit {kind.__name__}: {error}") from None
    check_fit(model, tensors, folder)
    model.load_state_dict(tensors)  # one by one, out of the file
    return cast(model.eval().requires_grad_(False), dtype)


def check_fit(model: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Refuse tensors that are not exactly this model's, or that are not finite.

    Raises:
        ValueError: listing what is missing, unexpected, misshapen or not finite.
    """
    expected = model.state_dict()
    problems = {
        "missing": sorted(set(expected) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(expected)),
        "wrong shape": sorted(
            f"{name} {list(tensors[name].shape)} for {list(expected[name].shape)}"
            for name in set(expected) & set(tensors)
            if expected[name].shape != tensors[name].shape
        ),
        "not finite": sorted(
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ),
    }
    found = [f"{kind}: {_first(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(found)}")


def only_layers(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], layers: range
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A transformer's config and weights with these layers alone, numbered from 0. Files are mapped
    into memory, so what is left out here is never read."""
    kept = {}
    for name, tensor in tensors.items():
        head, number, rest = ([*name.split(".", 2), "", ""])[:3]
        if head != "blocks":
            kept[name] = tensor
        elif int(number) in layers:
            kept[f"blocks.{int(number) - layers.start}.{rest}"] = tensor
    return {**config, "num_layers": len(layers)}, kept


def cast(model: Model, dtype: torch.dtype) -> Model:
    """Cast a model in place, but keep what must stay float32, as its library does on loading."""
    keep = _kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        low = dtype.itemsize < 4 and any(part in keep for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if low else dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return model


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the modules; diffusers' models have a list, and ours may say it for each dtype."""
    if (told := getattr(model, "kept_in_float32", None)) is not None:
        return tuple(told(dtype))
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def first_line(error: Exception) -> str:
    """What a library's error says, for one line of ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _first(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
