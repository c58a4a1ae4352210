"""A world as a folder: ``world.json`` and a folder for each model, or what diffusers writes.

The models are told apart by what their ``config.json`` says they are, so the bundled worlds and the
Wan2.1 family lie in the same kind of folder, and diffusers reads the latter as well.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from worldsim.config import FILE, WorldConfig
from worldsim.models.autoencoder import CausalAutoencoder, Decoder
from worldsim.models.files import read_config
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.weights import load_model
from worldsim.models.words import TextEncoder, WordEncoder
from worldsim.presets import preset_config
from worldsim.share import WHOLE, Share

TRANSFORMER, DECODER, TEXT = "transformer", "vae", "text_encoder"
TOKENIZER, SCHEDULER = "tokenizer", "scheduler"
WAN_TRANSFORMER, WAN_VAE, WAN_TEXT = "WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"
INDEX = "model_index.json"
DEFAULT_PRESET = "self-forcing"

Models = tuple[WorldConfig, CausalWanTransformer3DModel, Decoder | None, TextEncoder | None]


def read_folder(
    folder: Path,
    dtype: torch.dtype,
    preset: str | None = None,
    tiny: Path | None = None,
    share: Share = WHOLE,
) -> Models:
    """Everything that a `World` is made of.

    Args:
        preset: how to run a folder that does not say so itself; what it says itself wins.
        tiny: see `read_decoder`.
        share: what is needed of it.

    Raises:
        ValueError: what is missing, damaged, or does not fit.
    """
    config = config_of(folder, preset)
    transformer = _transformer(folder / TRANSFORMER, dtype, share.layers)
    # A generator may be alone; a world that moves is for people, and incomplete without.
    has = {
        name: transformer.config.action_dim > 0 or (folder / name).is_dir()
        for name, needed in ((DECODER, share.decodes), (TEXT, share.reads))
        if needed
    }
    return (
        config,
        transformer,
        read_decoder(folder if has.get(DECODER) else None, dtype, tiny if share.decodes else None),
        read_text_encoder(folder, dtype, config.text_length) if has.get(TEXT) else None,
    )


def read_decoder(folder: Path | None, dtype: torch.dtype, tiny: Path | None) -> Decoder | None:
    """The decoder of a world's folder, or a ``tiny`` one from a file in its place."""
    if tiny is not None:
        from worldsim.models.tiny_decoder import load_tiny_decoder

        return load_tiny_decoder(tiny, dtype)
    if folder is None:
        return None
    if class_of(folder / DECODER) == WAN_VAE:
        from worldsim.models.wan_vae import load_vae

        return load_vae(folder / DECODER, dtype)
    if (kind := class_of(folder / DECODER)) not in ("", CausalAutoencoder.__name__):
        raise ValueError(
            f"{folder / DECODER} holds a {kind}, not a {CausalAutoencoder.__name__} or {WAN_VAE}"
        )
    return load_model(CausalAutoencoder, folder / DECODER, dtype)


def read_text_encoder(folder: Path, dtype: torch.dtype, length: int) -> TextEncoder:
    """The text encoder of a world's folder; ``length``: rows of a prompt, where it has none."""
    if class_of(folder / TEXT) == WAN_TEXT:
        from worldsim.models.umt5 import load_prompt_encoder

        return load_prompt_encoder(folder, dtype, length)
    return load_model(WordEncoder, folder / TEXT, dtype)


def write_folder(
    target: Path, config: WorldConfig, models: Mapping[str, Any], base: Path | None = None
) -> None:
    """The inverse of `read_folder`; diffusers reads it too where all models are its own.

    Args:
        models: by their folder's name.
        base: a folder whose models are copied as they are, where ``models`` has none of that name.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        if name == TRANSFORMER and not model.config.action_dim:
            from worldsim.models.checkpoints import save_transformer

            with TemporaryDirectory(dir=target) as scratch:
                save_transformer(model, Path(scratch) / name)
                _replace_weights(Path(scratch) / name, target / name)
        elif name == TEXT and hasattr(model, "tokenizer"):
            model.save_pretrained(target)  # beside its tokenizer
        else:
            model.save_pretrained(target / name)
    for name in (DECODER, TEXT, TOKENIZER, SCHEDULER):
        if base is not None and name not in models and (base / name).is_dir():
            shutil.copytree(base / name, target / name)
    if class_of(target / DECODER) == WAN_VAE and class_of(target / TEXT) == WAN_TEXT:
        _write_index(target, config)
    config.save(target)  # last: a folder without it is no world


def _replace_weights(new: Path, old: Path) -> None:
    """Put a model's files in the place of older ones, shards and all; other files are not ours."""
    old.mkdir(exist_ok=True)
    written = {path.name for path in new.iterdir()}
    for path in new.iterdir():
        path.replace(old / path.name)
    for path in old.glob("diffusion_pytorch_model*.safetensors*"):
        if path.name not in written:
            path.unlink()


def _write_index(target: Path, config: WorldConfig) -> None:
    """What diffusers' `WanPipeline` wants beside the models."""
    import diffusers

    if not (target / SCHEDULER).is_dir():
        solver = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift
        )
        solver.save_pretrained(target / SCHEDULER)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        SCHEDULER: ["diffusers", "UniPCMultistepScheduler"],
        TEXT: ["transformers", WAN_TEXT],
        TOKENIZER: ["transformers", _tokenizer_class(target / TOKENIZER / "tokenizer_config.json")],
        TRANSFORMER: ["diffusers", WAN_TRANSFORMER],
        DECODER: ["diffusers", WAN_VAE],
    }
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tokenizer_class(path: Path) -> str:
    """The class that a tokenizer's settings name."""
    said = json.loads(path.read_text()) if path.is_file() else {}
    return said.get("tokenizer_class") or "T5TokenizerFast"


def _transformer(
    folder: Path, dtype: torch.dtype, layers: range | None
) -> CausalWanTransformer3DModel:
    if class_of(folder) in (WAN_TRANSFORMER, CausalWanTransformer3DModel.__name__):
        from worldsim.models.checkpoints import load_transformer

        return load_transformer(folder, dtype, layers)
    return load_model(CausalWanTransformer3DModel, folder, dtype)  # which says what is wrong


def config_of(folder: Path, preset: str | None) -> WorldConfig:
    """How a folder is run: as it says itself, else by a preset; see `read_folder`."""
    if (folder / FILE).is_file() or not (folder / INDEX).is_file():
        own = WorldConfig.load(folder)
        if preset is not None:
            _tell(asdict(own), asdict(preset_config(preset)), f"{folder / FILE} wins over {preset}")
        return own
    name = preset or DEFAULT_PRESET
    chosen = preset_config(name)
    scheduler = folder / SCHEDULER / "scheduler_config.json"
    said = read_config(scheduler) if scheduler.is_file() else {}
    shift = float(said.get("flow_shift", said.get("shift", chosen.shift)))
    if preset is not None:  # a scheduler is that of the model before it was made causal
        _tell({"shift": chosen.shift}, {"shift": shift}, f"{name} wins over {scheduler}")
        return chosen
    _tell({"shift": shift}, {"shift": chosen.shift}, f"{scheduler} wins over {name}")
    return replace(chosen, shift=shift)


def _tell(own: Mapping[str, Any], other: Mapping[str, Any], who: str) -> None:
    told = ("name", "prompt", "controls")  # what nobody takes for a mistake
    differ = [
        f"{key}={own[key]} (not {other[key]})"
        for key in own
        if key not in told and own[key] != other[key]
    ]
    if differ:
        warnings.warn(f"{who}: {', '.join(differ)}", stacklevel=4)


def class_of(folder: Path) -> str:
    """What diffusers or transformers call the model in a folder; empty where it does not say."""
    path = folder / "config.json"
    try:
        said = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        return ""  # whoever loads it tells what is wrong
    if not isinstance(said, dict):
        return ""
    return said.get("_class_name") or next(iter(said.get("architectures") or ()), "")
