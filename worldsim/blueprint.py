"""Worlds without their weights: models of the right sizes and dtypes on torch's meta device.

Only configs are read, and of a generator's file its names and shapes. Such a world computes
nothing, but it tells what it would take; see `worldsim.forecast`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from worldsim.config import WorldConfig
from worldsim.folder import (
    DECODER,
    TEXT,
    TOKENIZER,
    TRANSFORMER,
    WAN_TEXT,
    WAN_TRANSFORMER,
    WAN_VAE,
    class_of,
    config_of,
)
from worldsim.models.autoencoder import CausalAutoencoder, Decoder
from worldsim.models.files import CONFIG, read_config
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.weights import cast
from worldsim.models.words import TextEncoder, WordEncoder
from worldsim.presets import preset_config
from worldsim.world import World


def world_of_folder(
    folder: Path, dtype: torch.dtype, preset: str | None = None, tiny: Path | None = None
) -> World:
    """What `World.from_pretrained` would make of a folder; its weights need not be there.

    Args:
        preset, tiny: see `worldsim.folder.read_folder`; only a tiny decoder's file is read.

    Raises:
        ValueError: a config is missing, damaged, or does not fit; an unknown preset.
    """
    config = config_of(folder, preset)
    transformer = cast(
        _empty(CausalWanTransformer3DModel, folder / TRANSFORMER, WAN_TRANSFORMER), dtype
    )
    # As `worldsim.folder.read_folder` has it: a generator may be alone.
    decoder, text = (
        folder / name if transformer.config.action_dim > 0 or (folder / name).is_dir() else None
        for name in (DECODER, TEXT)
    )
    return World(
        config,
        transformer,
        None if decoder is None and tiny is None else _decoder(decoder, dtype, tiny),
        None if text is None else _text_encoder(text, dtype, config.text_length),
    )


def world_of_file(
    path: Path,
    preset: str,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    tiny: Path | None = None,
) -> World:
    """What `World.from_single_file` would make of a generator's file.

    Args:
        dtype: of the weights; None is the file's own.
        base: a folder whose decoder and text encoder are meant; its weights need not be there.
        tiny: a tiny decoder's file.

    Raises:
        ValueError: as `World.from_single_file`.
    """
    from worldsim.models.checkpoints import read_generator

    settings = preset_config(preset)
    generator = read_generator(path)  # mapped: no tensor is read
    if generator.config is None:
        raise ValueError(
            f"{path} does not tell the number of its heads: make a folder of it with `worldsim "
            "convert --config`, and name that"
        )
    if generator.text_len is not None:
        settings = replace(settings, text_length=generator.text_len)
    transformer = _made(CausalWanTransformer3DModel, generator.config, path)
    kind = dtype or generator.tensors["proj_out.weight"].dtype
    decoder, text = None if base is None else base / DECODER, None
    if base is not None:
        text = _text_encoder(base / TEXT, kind, settings.text_length)
    alone = decoder is None and tiny is None
    return World(
        settings, cast(transformer, kind), None if alone else _decoder(decoder, kind, tiny), text
    )


def check_base(config: WorldConfig, transformer: CausalWanTransformer3DModel, base: Path) -> None:
    """Whether a folder's decoder and text encoder are there and fit a generator.

    Raises:
        ValueError: a part is missing, damaged, or of other sizes.
    """
    tokenizer = [(TOKENIZER, "*.json")] if class_of(base / TEXT) == WAN_TEXT else []
    for name, files in ((DECODER, "*.safetensors"), (TEXT, "*.safetensors"), *tokenizer):
        if not any((base / name).glob(files)):
            raise ValueError(f"{base} has no {name}/{files}: a base holds what a generator lacks")
    dtype = transformer.proj_out.weight.dtype
    World(
        config,
        transformer,
        _decoder(base / DECODER, dtype),
        _text_encoder(base / TEXT, dtype, config.text_length),
    )


def _decoder(folder: Path | None, dtype: torch.dtype, tiny: Path | None = None) -> Decoder:
    if tiny is not None:
        from worldsim.models.tiny_decoder import load_tiny_decoder

        return load_tiny_decoder(tiny, dtype)
    assert folder is not None
    if class_of(folder) != WAN_VAE:
        return cast(_empty(CausalAutoencoder, folder), dtype)
    from diffusers import AutoencoderKLWan

    from worldsim.models.wan_vae import WanAutoencoder

    return WanAutoencoder(cast(_empty(AutoencoderKLWan, folder), dtype))


def _text_encoder(folder: Path, dtype: torch.dtype, length: int) -> TextEncoder:
    if class_of(folder) != WAN_TEXT:
        return cast(_empty(WordEncoder, folder), dtype)
    from transformers import UMT5Config, UMT5EncoderModel

    from worldsim.models.umt5 import PromptEncoder

    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**read_config(folder / CONFIG)))
    return cast(PromptEncoder(None, model, length), dtype)


def _empty(kind: type[Any], folder: Path, *also: str) -> Any:
    """A model of a diffusers folder; ``also``: other names under which configs know it.

    Raises:
        ValueError: the config is missing, or of another model.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: this world is incomplete")
    config = read_config(folder / CONFIG)
    said = config.get("_class_name", kind.__name__)
    if said not in (kind.__name__, *also):
        raise ValueError(f"{folder} holds a {said}, not a {kind.__name__}")
    return _made(kind, config, folder / CONFIG)


def _made(kind: type[Any], config: Mapping[str, Any], source: Path) -> Any:
    try:
        with torch.device("meta"):
            return kind.from_config(dict(config))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} does not fit {kind.__name__}: {error}") from None
