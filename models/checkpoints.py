"""Checkpoints of the Wan2.1 family: generators in their original layout, and diffusers folders.

Everything is strict: what does not fit is told in one line, before a model is made. Tensors stay
mapped from their file until they are copied, one by one, into the model, so that the weights lie
in memory once. How a world runs (steps, shift, context) is no matter of this file.
"""

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from worldsim.models.files import (
    CONFIG,
    WEIGHTS,
    mapped,
    parsed,
    read_config,
    stored_in,
    unpickled,
)
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.weights import cast, check_fit, only_layers

PLAIN, OURS = "WanTransformer3DModel", CausalWanTransformer3DModel.__name__
PICKLED = (".pt", ".pth", ".ckpt")

# Where a training run keeps the generator, the best first.
NESTS = ("generator_ema", "generator", "model", "state_dict")
# What wrappers leave in names: some anywhere, some in front only (``ffn.net`` is no prefix).
ANYWHERE = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
IN_FRONT = {"generator", "model", "net", "diffusion_model"}
IMAGE = {"k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "image_embedder"}
VACE = {"vace_blocks", "vace_patch_embedding", "vace_layers"}

# Original names of sizes → ours. ``dim`` has none: it is heads · head_dim.
RENAMED = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
FIELDS = set(signature(CausalWanTransformer3DModel).parameters)
# (dim, ffn_dim, layers) of the released sizes → heads, which no tensor's shape tells.
RELEASED_HEADS = {(1536, 8960, 30): 12, (5120, 13824, 40): 40}

Config = Mapping[str, Any] | str | Path | None


@dataclass(frozen=True)
class Generator:
    """A generator as it was read.

    Attributes:
        tensors: by diffusers' names, in the file's own dtypes, mapped from it.
        config: fields of `CausalWanTransformer3DModel`; None where the number of heads is unknown.
        text_len: rows that prompts are padded to, where a config says so.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    text_len: int | None


def read_generator(path: str | Path, config: Config = None) -> Generator:
    """Read a generator: in Wan's or diffusers' names, bare or as a training run wrapped it.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.ckpt`` with nothing but tensors in it.
        config: sizes in Wan's or diffusers' names, or a JSON file of them, or a folder with a
            ``config.json``. Needed are at most ``num_heads`` and, where it is not 1e-6, ``eps``:
            shapes tell the rest. They must agree with what the file says of itself.

    Raises:
        ValueError: a file that is missing, damaged, of another kind, would run code on loading,
            or holds another model; a config that contradicts it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the checkpoint file in it")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        stored, metadata = mapped(path)
    elif path.suffix in PICKLED:
        stored = _nested(unpickled(path), path)
    else:
        raise ValueError(f"{path} must end in .safetensors, {', '.join(PICKLED)}")
    tensors = _diffusers_names(_unwrapped(stored, path))
    _check_kind(tensors, path)
    own = _fields(parsed(metadata["config"], path)) if "config" in metadata else {}
    given = _fields(_given(config))
    for name in own.keys() & given.keys():
        if own[name] != given[name]:
            raise ValueError(f"{path} says {name} = {own[name]}, the config says {given[name]}")
    told = own | given
    return Generator(tensors, _complete(told, tensors, path), told.get("text_len"))


def load_generator(
    path: str | Path, config: Config = None, dtype: torch.dtype | None = torch.float32
) -> CausalWanTransformer3DModel:
    """A model from a generator's checkpoint, on the CPU, in eval mode and without gradients.

    Args:
        path, config: see `read_generator`.
        dtype: of the weights, but for those that stay float32 (see `worldsim.models.weights.cast`);
            None takes that of the file's last matrix.

    Raises:
        ValueError: as `read_generator`; also where the number of heads is unknown, or tensors are
            missing, too many, misshapen or not finite.
    """
    path = Path(path)
    generator = read_generator(path, config)
    if generator.config is None:
        raise ValueError(
            f"{path} is of no released size, so the number of its heads is unknown: give a config "
            "(such as {'num_heads': 12})"
        )
    own = generator.tensors["proj_out.weight"].dtype
    return _model(generator.config, generator.tensors, path, dtype or own)


def load_transformer(
    folder: str | Path, dtype: torch.dtype = torch.float32, layers: range | None = None
) -> CausalWanTransformer3DModel:
    """A model from a diffusers folder, ours or plain Wan2.1, in one file or in shards.

    Args:
        folder: with ``config.json`` and the weights.
        dtype: of the weights, but for those that stay float32 (see `worldsim.models.weights.cast`).
        layers: only these are read.

    Raises:
        ValueError: a file is missing or damaged, or holds another model; tensors are missing, too
            many, misshapen or not finite.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    if config.get("_class_name") not in (PLAIN, OURS):
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, not a {PLAIN} or {OURS}")
    tensors = stored_in(folder)
    _check_kind(tensors, folder)
    if layers is not None:
        config, tensors = only_layers(config, tensors, layers)
    return _model(config, tensors, folder, dtype)


def save_transformer(model: CausalWanTransformer3DModel, folder: str | Path) -> None:
    """Write a diffusers folder, whole or not at all.

    diffusers' own `WanTransformer3DModel` loads it, unless the model takes actions or rays.

    Args:
        model: any; weights are written in the dtypes that they have.
        folder: a new or an empty one.

    Raises:
        ValueError: there is such a file, or a folder with something in it.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: name a new or an empty folder")
    config = json.loads(model.to_json_string())
    if not (config["action_dim"] or config["ray_dim"]):
        del config["action_dim"], config["ray_dim"]
        config["_class_name"] = PLAIN
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that moving is renaming; one below, for the usual permissions.
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        written = Path(scratch) / folder.name
        written.mkdir()
        (written / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, written / WEIGHTS, metadata={"format": "pt"})
        written.replace(folder)


# --- files ------------------------------------------------------------------------------------
def innermost(found: Any, nests: Iterable[str]) -> Any:
    """What lies under the first of these names, and under the first of them there, and so on."""
    while isinstance(found, Mapping):
        inner = [found[name] for name in nests if isinstance(found.get(name), Mapping)]
        if not inner:
            break
        found = inner[0]
    return found


def bare_name(name: str, in_front: Container[str]) -> str:
    """A tensor's name without what wrappers leave in it, nor any of the words ``in_front``."""
    parts = [part for part in name.split(".") if part not in ANYWHERE]
    while parts and parts[0] in in_front:
        del parts[0]
    return ".".join(parts)


def _nested(found: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors that a training run's state keeps the generator in."""
    found = innermost(found, NESTS)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} holds no dictionary of tensors")
    strange = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"{path} holds {strange[0]!r}, which is no tensor; a generator lies at the top or "
            f"under {', '.join(NESTS)}"
        )
    return {str(name): value.detach() for name, value in found.items()}


# --- names ------------------------------------------------------------------------------------
def _unwrapped(stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        bare = bare_name(name, IN_FRONT)
        if bare in tensors:
            raise ValueError(f"{path} holds {bare} twice, under different prefixes")
        tensors[bare] = tensor
    return tensors


def _diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # The converter may not see converted names: it would swap their norms again.
    if any(name.startswith("condition_embedder.") for name in tensors):
        return tensors
    return convert_wan_transformer_to_diffusers(dict(tensors))  # it empties what it is given


def _check_kind(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse quantised weights and models with other inputs."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{source} is quantised ({name} is {kind}), which cannot be computed on here: use "
                "a bf16 or fp32 file"
            )
    parts = _parts(tensors)
    if parts & VACE:
        raise ValueError(f"{source} is a VACE model; only text-to-video models are supported")
    if parts & IMAGE:
        raise ValueError(
            f"{source} is an image-to-video model with image cross-attention; only text-to-video "
            "models are supported"
        )


def _parts(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".")}


# --- configs ----------------------------------------------------------------------------------
def _given(config: Config) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    path = Path(config)
    return read_config(path / CONFIG if path.is_dir() else path)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What matters of a config, in our names, plus ``dim`` and ``text_len``."""
    fields = {
        RENAMED.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in config.items()
    }
    if fields.get("qk_norm") is True:  # Wan's word for the only kind there is
        fields["qk_norm"] = "rms_norm_across_heads"
    return {name: fields[name] for name in fields.keys() & (FIELDS | {"dim", "text_len"})}


def _complete(
    told: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, Any] | None:
    """A config out of what is told and what shapes tell; None where nothing tells the heads."""
    dim, sizes = _sizes(tensors, path)
    if told.get("dim", dim) != dim:
        raise ValueError(f"{path} is of width {dim}, but its config says {told['dim']}")
    config = sizes | {name: told[name] for name in told.keys() & FIELDS}
    heads = told.get("num_attention_heads")
    if heads is None:
        heads = RELEASED_HEADS.get((dim, config["ffn_dim"], config["num_layers"]))
    if heads is None:
        return None
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(f"{path} is of width {dim}, which is not divided by {heads!r} heads")
    return {"attention_head_dim": dim // heads} | config | {"num_attention_heads": heads}


def _sizes(tensors: Mapping[str, Tensor], path: Path) -> tuple[int, dict[str, Any]]:
    """The width, and the fields that shapes tell."""

    def shape(name: str, axes: int) -> torch.Size:
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim != axes or not tensor.numel():
            raise ValueError(f"{path} is no whole Wan2.1 generator: no {name} with {axes} axes")
        return tensor.shape

    dim, channels, *patch = shape("patch_embedding.weight", 5)
    return dim, {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0] // math.prod(patch),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "cross_attn_norm": "blocks.0.norm2.weight" in tensors,
    }


# --- the model --------------------------------------------------------------------------------
def _model(
    config: dict[str, Any], tensors: Mapping[str, Tensor], source: Path, dtype: torch.dtype
) -> CausalWanTransformer3DModel:
    try:
        with torch.device("meta"):
            model = CausalWanTransformer3DModel.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the config of {source} does not fit {OURS}: {error}") from None
    given, made = model.config.in_channels, model.config.out_channels
    if given != made:
        raise ValueError(
            f"{source} takes {given} channels and makes {made}, as image-to-video models do; only "
            "text-to-video models are supported"
        )
    check_fit(model, dict(tensors), source)
    # Copies, also where no dtype changes: a mapped tensor would change with its file.
    kinds = cast(model, dtype).state_dict()
    copies = {
        name: tensor.to(kinds[name].dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(copies, assign=True)
    return model.eval().requires_grad_(False)
