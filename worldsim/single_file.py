"""A generator in its original layout, as training code saves it, and the world around it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from worldsim.folder import Models, read_decoder, read_text_encoder
from worldsim.models.checkpoints import load_generator, read_generator
from worldsim.presets import preset_config


def read_single_file(
    path: Path,
    preset: str,
    base: Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    dtype: torch.dtype | None = None,
    tiny: Path | None = None,
) -> Models:
    """Everything that a `World` is made of; see `World.from_single_file`."""
    settings = preset_config(preset)  # before anything large is read
    length = read_generator(path, config).text_len  # only names and shapes are read here
    if length is not None:
        settings = replace(settings, text_length=length)
    transformer = load_generator(path, config, dtype)
    kind = transformer.proj_out.weight.dtype
    text = None if base is None else read_text_encoder(base, kind, settings.text_length)
    return settings, transformer, read_decoder(base, kind, tiny), text
