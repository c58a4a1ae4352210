"""Models that do not fit on a device together: they wait on the CPU and come when they are called.

The libraries' hooks see a module's ``forward``. Worlds also call `commit`, `encode_prompt`,
``encode`` and ``decode``, so here every way in is hooked.
"""

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from worldsim.models.transformer import CausalWanTransformer3DModel

CPU = torch.device("cpu")
GROUP_HOOK = "group_offloading"  # diffusers' name of it
WAYS_IN = ("forward", "commit", "fused", "encode_prompt", "encode", "decode")

Call = Callable[..., Any]


class Turns:
    """A device that models use in turn: who is called comes, and who was there before leaves.

    Unlike accelerate's chain of hooks it needs no order of the models, and is safe where stages
    run on several threads: a call has the device to itself until it returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there: nn.Module | None = None
        self._one_call = RLock()  # a model's ways in call each other

    def take(self, model: nn.Module, stays: bool = True) -> None:
        """From now on ``model`` waits on the CPU; ``stays``: after a call, until another comes."""
        nn.Module.to(model, CPU)
        for name in WAYS_IN:
            if hasattr(model, name):
                setattr(model, name, self._turn(model, getattr(model, name), stays))

    def _turn(self, model: nn.Module, call: Call, stays: bool) -> Call:
        @wraps(call)
        def turn(*args: Any, **options: Any) -> Any:
            with self._one_call:
                inner = self._there is model
                if not inner:
                    self._leave()
                    nn.Module.to(model, self.device)
                    self._there = model
                try:
                    return call(*args, **options)
                finally:
                    if not stays and not inner:
                        self._leave()

        return turn

    def _leave(self) -> None:
        if self._there is not None:
            nn.Module.to(self._there, CPU)
            self._there = None


def offload_layers(
    transformer: CausalWanTransformer3DModel, device: torch.device, **options: Any
) -> None:
    """Keep the layers on the CPU; each group of them is on the device while it is computed.

    Args:
        options: of diffusers' `apply_group_offloading`.
    """
    apply_group_offloading(
        transformer,
        onload_device=device,
        offload_device=CPU,
        offload_type="block_level",
        **options,
    )
    modules: list[nn.Module] = [transformer, *transformer.layers]
    for module in modules:
        for name in ("commit", "fused", "encode_prompt", "projected", "end_fused", "encode_text"):
            if hasattr(module, name):
                setattr(module, name, _hooked(module, getattr(module, name)))


def _hooked(module: nn.Module, call: Call) -> Call:
    """``call`` within the hook that diffusers put around the module's forward."""

    @wraps(call)
    def hooked(*args: Any) -> Any:
        # Looked up each time: after a LoRA there is a new one.
        hook = HookRegistry.check_if_exists_or_initialize(module).get_hook(GROUP_HOOK)
        hook.pre_forward(module)
        return hook.post_forward(module, call(*args))

    return hooked
