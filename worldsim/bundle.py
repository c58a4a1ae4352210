"""Where a world's folder is, and in which dtype it is loaded."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

CONFIGS = ["world.json", "model_index.json", "*/config.json", "scheduler/*.json"]
BUNDLED = ("maze", "maze-short")
COMPUTES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BF16_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else float32; never by a timing."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = (getattr(torch.cpu, name, bool)() for name in _BF16_CHECKS)
    return torch.bfloat16 if any(has) else torch.float32


def check_dtype(name: Any) -> torch.dtype:
    """A dtype that models compute in.

    Raises:
        ValueError: for anything else.
    """
    if name not in COMPUTES:
        told = ", ".join(str(dtype) for dtype in COMPUTES)
        raise ValueError(f"torch_dtype must be one of {told}, got {name!r}")
    return name


def check_numbers(what: str, given: Any) -> None:
    """Raises:
    ValueError: unless it is a tensor of finite floating-point numbers.
    """
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"{what} must be a tensor of floating-point numbers, got {kind}")
    if not bool(given.isfinite().all()):
        raise ValueError(f"{what} holds numbers that are not finite")


def locate(source: str, only_configs: bool = False) -> Path:
    """Folder of a bundled world, of a path, or of a hub id (downloaded).

    ``only_configs``: nothing else is downloaded, no weights and no tokenizer.

    Raises:
        ValueError: saying what would be accepted.
    """
    if source in BUNDLED:
        spec = importlib.util.find_spec("worldsim.maze")
        assert spec is not None and spec.submodule_search_locations is not None
        return Path(next(iter(spec.submodule_search_locations))) / "weights" / source
    folder = Path(source)
    if folder.is_dir():
        return folder
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _download(source, CONFIGS if only_configs else None)
    raise ValueError(
        f"no world {source!r}: give 'maze', 'maze-short', a world folder, or a hub id (owner/name)"
    )


def _download(hub_id: str, only: list[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=only))
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"no world {hub_id!r}: no such folder, and the hub says: {reason}"
        ) from None


def check_device(name: torch.device | str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: where it has not.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {str(name)!r}: use 'cpu' or 'cuda'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} is not supported: use 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {str(name)!r} here: use 'cpu'")
    return device
