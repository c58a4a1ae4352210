"""Calling a world in the shapes of diffusers' video pipelines: what goes in, what comes out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from worldsim.rollout import OnStep
from worldsim.schedule import Cell
from worldsim.state import Block

OUTPUTS = ("np", "pil", "pt", "latent")

Told = Callable[[int, float, dict[str, Any]], Any]


@dataclass
class WorldOutput:
    """``frames`` has one entry for each video, as in diffusers."""

    frames: Any


def drawn(generator: torch.Generator) -> int:
    """A seed."""
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))


def telling(callback: Told) -> OnStep:
    """What tells ``callback`` of each step: ``(step, timestep, {"latents": x0})``."""

    def on_step(cell: Cell, x0: Tensor) -> None:
        callback(cell.level, cell.timestep, {"latents": x0})

    return on_step


def shown(blocks: Iterable[Block], count: int, disable: bool) -> list[Block]:
    """All of ``count`` blocks, with a bar while they are made."""
    return list(track(blocks, "blocks", count, console=Console(stderr=True), disable=disable))


def output(blocks: Iterable[Block], num_frames: int, output_type: str) -> WorldOutput:
    """What a call returns: latents of whole blocks, or so many pictures."""
    if output_type == "latent":
        return WorldOutput(torch.cat([block.latents for block in blocks], dim=2))
    frames = np.concatenate([block.frames for block in blocks])[:num_frames]
    return WorldOutput(as_output(frames, output_type))


def as_output(frames: NDArray[np.uint8], output_type: str) -> Any:
    """Pictures ``[F, H, W, 3]`` as ``np``, ``pil`` or ``pt``, see `World.__call__`."""
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(frame) for frame in frames]]
    scaled = frames.astype(np.float32)[None] / 255
    if output_type == "pt":
        return torch.from_numpy(scaled).permute(0, 1, 4, 2, 3)
    return scaled
