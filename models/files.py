"""Files of weights and configs: what they hold, or one line that says what is wrong with them."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of a sharded folder


def mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from None


def unpickled(path: Path) -> Any:
    """What torch saved, without running any code of it."""
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, and loading it could run any code: convert it to "
            "safetensors with the tool that made it"
        ) from None
    except Exception:  # damage comes out of an unpickler as nearly any of them
        raise ValueError(
            f"{path} is damaged, or no checkpoint of torch 1.6 or later: fetch it again, or "
            "convert it to safetensors with the tool that made it"
        ) from None


def stored_in(folder: Path) -> dict[str, Tensor]:
    """Tensors of a diffusers folder, mapped from its file or its shards.

    Raises:
        ValueError: a file is missing or damaged, or two hold the same.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        shard, _ = mapped(file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{file} holds {twice[0]}, which another file of {folder} holds, too")
        tensors |= shard
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file() and (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds both {WEIGHTS} and {INDEX}: remove the one that is old")
    if not index.is_file() and not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: the weights are incomplete")
    if not index.is_file():
        return [folder / WEIGHTS]
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise ValueError(f"{folder} has no {file.name}: the weights are incomplete")
    return files


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is missing, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return parsed(path.read_bytes(), path)


def parsed(text: str | bytes, source: Path) -> dict[str, Any]:
    """The same of text; ``source`` is where it is from."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the config in {source} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"the config in {source} is no JSON object")
    return config
