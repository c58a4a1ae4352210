"""Passes that sleep instead of computing: what a run then takes is all but its compute."""

import time
from typing import Any

import torch
from torch import Tensor

from worldsim.world import World


def rehearse(world: World, seconds: float) -> None:
    """Have the transformer's passes of a world sleep; its blocks mean nothing then."""

    def forward(latents: Tensor, *_: Any) -> Tensor:
        time.sleep(seconds)
        return torch.zeros_like(latents)

    def commit(*_: Any) -> None:
        time.sleep(seconds)

    world.forward, world.commit, world.fused = forward, commit, None
