"""Which world it is, to the bit: one short text of its settings and of every weight."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

DIGITS = 16  # bytes
# Of a LoRA's layers in peft: what counts of them and is no tensor.
ADAPTED = ("scaling", "active_adapters", "merged_adapters", "disable_adapters")


def fingerprint(config: Any, models: Mapping[str, nn.Module]) -> str:
    """The same for the same weights in the same dtype, wherever they came from and lie.

    Args:
        config: a frozen dataclass.
        models: by name; what they hold counts, adapters and quantised numbers included.
    """
    digest = hashlib.blake2b(_plain(asdict(config)), digest_size=DIGITS)
    for name, model in sorted(models.items()):
        digest.update(_plain({name: dict(getattr(model, "config", {}))}))
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for key, tensor in sorted(held.items()):
            for part in _parts(tensor):
                digest.update(f"{name}.{key} {part.dtype} {list(part.shape)}".encode())
                digest.update(_bytes(part))
        for key, module in model.named_modules():
            adapted = {trait: getattr(module, trait) for trait in ADAPTED if hasattr(module, trait)}
            if adapted:
                digest.update(_plain({key: adapted}))
    return digest.hexdigest()


def _plain(told: Mapping[str, Any]) -> bytes:
    return json.dumps(told, sort_keys=True, default=str).encode()


def digest_of(latents: Tensor) -> str:
    """The same of a block's latents: two blocks have it in common if they are equal to the bit."""
    return hashlib.blake2b(_bytes(latents), digest_size=DIGITS).hexdigest()


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Itself, or the plain tensors that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) is Tensor:
        yield tensor.detach()
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
