"""LoRA: small additions to a transformer's linear layers, through diffusers' loader and peft.

They are computed beside the weights, which stay as they are: taken off again, the very bits are
back; half-precision weights round nothing away, and quantised ones take them too. The price is two
narrow products for each linear.

Shapes: r rank, I and O inputs and outputs of a linear.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading as rehook
from torch import Tensor, nn

from worldsim.models.checkpoints import IN_FRONT, NESTS, PICKLED, bare_name, innermost
from worldsim.models.files import mapped, unpickled
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.weights import first_line

Source = str | Path | Mapping[str, Any]
Tensors = dict[str, Tensor]

# Where a training run keeps it, the best first.
LORA_NESTS = ("generator_lora", "lora", *NESTS)
LORA_FRONT = IN_FRONT | {"base_model", "transformer"}
MUSUBI = "lora_unet_"  # in front of names in which dots became underscores
PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
HEADER = "lora_adapter_metadata"  # diffusers' own, in the header of its safetensors files
# peft's own file, and the one beside it that tells alpha.
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_lora(
    transformer: CausalWanTransformer3DModel, source: Source, scale: float, name: str
) -> None:
    """Add a LoRA to a model, beside those that it has: ``W + scale · alpha / r · B A``.

    Args:
        source: see `read_lora`.
        name: to tell several apart.

    Raises:
        ValueError: as `read_lora`; also a name that is taken or has a dot, or peft is missing.
            Nothing has changed then.
    """
    _check_peft()
    if not name or "." in name:
        raise ValueError(f"a LoRA's name must have letters and no dot, got {name!r}")
    if name in lora_names(transformer):
        raise ValueError(f"there is a LoRA {name!r} already: give name=, or unload_lora() first")
    tensors = read_lora(source, transformer)

    from peft.tuners.lora import LoraLayer

    try:
        with warnings.catch_warnings():
            # That there is another one already, and that quantised weights cannot be merged with.
            warnings.simplefilter("ignore", UserWarning)
            transformer.load_lora_adapter(tensors, prefix=None, adapter_name=name)
    except Exception as error:
        if not lora_names(transformer):
            transformer.unload_lora()
        raise ValueError(f"peft cannot add LoRA {name!r}: {first_line(error)}") from None
    transformer.set_adapter(lora_names(transformer))
    for module in transformer.modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            module.set_scale(name, scale)
            for part in (module.lora_A, module.lora_B):
                part[name].to(module.weight.dtype)  # peft reads them as float32
    transformer.requires_grad_(False).train(transformer.training)
    rehook(transformer)  # offloaded layers bring their new tensors as well


def unload_lora(transformer: CausalWanTransformer3DModel) -> None:
    """Take all LoRAs off again; the weights are, bit for bit, what they were.

    Raises:
        ValueError: there is none.
    """
    if not lora_names(transformer):
        raise ValueError("this world has no LoRA to unload")
    transformer.unload_lora()


def lora_names(transformer: CausalWanTransformer3DModel) -> list[str]:
    """Names of the LoRAs that a model has."""
    return list(getattr(transformer, "peft_config", None) or ())


# --- reading ----------------------------------------------------------------------------------
def read_lora(source: Source, transformer: CausalWanTransformer3DModel) -> Tensors:
    """A LoRA's tensors by diffusers' names, with alpha / r multiplied into ``lora_A``.

    Args:
        source: tensors by name, or a file of them, ``.safetensors`` or ``.pt``: in diffusers',
            peft's, Wan's or musubi's names, bare or as a training run wrapped them. Where nothing
            tells alpha, it is r.

    Returns:
        for each linear that is added to: ``….lora_A.weight [r, I]``, ``….lora_B.weight [O, r]``
        and, where there is one, ``….lora_B.bias [O]``.

    Raises:
        ValueError: a file that is missing, damaged, or of another kind; names or shapes that do
            not fit the model; numbers that are not finite.
    """
    where = "this LoRA" if isinstance(source, Mapping) else str(source)
    stored, told = _stored(source, where)
    linears = _linears(transformer)
    named = _diffusers_names(_bare(stored, where), told, linears, where)
    for name, tensor in named.items():
        target = _target(name)
        if target not in linears or name.removeprefix(f"{target}.") not in PARTS:
            raise ValueError(f"{where} does not fit this model, which has no place for {name}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where} has numbers that are not finite in {name}")
    for target in dict.fromkeys(map(_target, named)):
        down, up, bias = (named.get(f"{target}.{part}") for part in PARTS)
        if down is None or up is None:
            raise ValueError(f"{where} is incomplete: {target} has no lora_A and lora_B")
        inputs, outputs = linears[target].in_features, linears[target].out_features
        given = [list(tensor.shape) for tensor in (down, up, bias) if tensor is not None]
        rank = down.shape[0]
        if given != [[rank, inputs], [outputs, rank], [outputs]][: len(given)]:
            raise ValueError(
                f"{where} does not fit this model: {target} is {outputs}×{inputs}, "
                f"its lora_A and lora_B are {given}"
            )
    return named


def _stored(source: Source, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a source holds, and what it tells of alpha."""
    found: Any = source
    told: dict[str, Any] = {}
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no LoRA file {path}")
        if path.suffix == ".safetensors":
            found, header = mapped(path)
            told = json.loads(header.get(HEADER, "{}"))
            if path.name == PEFT_FILE and path.with_name(PEFT_CONFIG).is_file():
                told = json.loads(path.with_name(PEFT_CONFIG).read_text())
        elif path.suffix in PICKLED:
            found = unpickled(path)
        else:
            raise ValueError(f"{path} must end in .safetensors, {', '.join(PICKLED)}")
    found = innermost(found, LORA_NESTS)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{where} holds no dictionary of tensors")
    return found, {name.removeprefix("transformer."): value for name, value in told.items()}


def _bare(stored: Mapping[str, Any], where: str) -> Tensors:
    """Tensors by names without prefixes; ``lora_A`` and ``lora_B`` have no other names."""
    tensors: Tensors = {}
    for name, tensor in stored.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where} holds {name!r}, which is no tensor")
        bare = bare_name(name, LORA_FRONT)
        if not bare.startswith(MUSUBI):
            bare = bare.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
            # peft's models name the adapter as well: lora_A.default.weight
            bare = re.sub(r"\.(lora_[AB])\.\w+\.(weight|bias)$", r".\1.\2", bare)
        # Differences of whole weights are often there for completeness, and nought.
        if bare.endswith((".diff", ".diff_b")) and not bool(tensor.any()):
            continue
        if bare.endswith(".diff") or "norm" in bare:
            raise ValueError(f"{where} changes {bare}, and only linears can be added to")
        if bare in tensors:
            raise ValueError(f"{where} holds {bare} twice, under different prefixes")
        tensors[bare] = tensor.detach()
    return tensors


def _diffusers_names(
    tensors: Tensors, told: Mapping[str, Any], linears: Mapping[str, nn.Linear], where: str
) -> Tensors:
    if not any(name.startswith(MUSUBI) for name in tensors):
        tensors = _scaled(tensors, told)
        if all(_target(name) in linears for name in tensors):
            return tensors
        prefixed = {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    else:
        prefixed = dict(tensors)

    from diffusers.loaders import WanLoraLoaderMixin

    try:
        converted = WanLoraLoaderMixin.lora_state_dict(prefixed)
    except Exception:  # of many kinds: its names are looked up, counted and popped
        strange = next((name for name in tensors if _target(name) not in linears), "its names")
        raise ValueError(
            f"{where} does not fit this model: diffusers does not understand {strange}"
        ) from None
    given = sum(not name.endswith(".alpha") for name in tensors)
    if len(converted) != given:
        raise ValueError(f"{where} has {given} tensors, of which diffusers reads {len(converted)}")
    return {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}


def _scaled(tensors: Tensors, told: Mapping[str, Any]) -> Tensors:
    """The same with each alpha / r multiplied into ``lora_A``, in float32 where it is not 1."""
    from peft.utils.other import get_pattern_key

    scaled = dict(tensors)
    patterns = told.get("alpha_pattern") or {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        rank = tensors[name].shape[0]
        root = math.sqrt(rank) if told.get("use_rslora") else rank
        key = get_pattern_key(patterns.keys(), _target(name))
        alpha = patterns.get(key, told.get("lora_alpha", root))
        if (own := scaled.pop(f"{_target(name)}.alpha", None)) is not None:
            alpha, root = own.item(), rank
        if alpha != root:
            scaled[name] = tensors[name].float() * (alpha / root)
    return scaled


def _linears(transformer: CausalWanTransformer3DModel) -> dict[str, nn.Linear]:
    """All linears by their names, as if there were no LoRA yet."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def _target(name: str) -> str:
    return name.partition(".lora_")[0]


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise ValueError("LoRA needs peft: pip install 'worldsim[lora]'")
