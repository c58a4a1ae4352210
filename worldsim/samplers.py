"""From one level of noise to the next: what becomes of a block after each pass of the model.

A sampler is made anew for each block, so whatever it remembers ends with the block.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from worldsim.schedule import Cell

Fresh = Callable[[int], Tensor]  # step -> the noise that is added before that pass


class Sampler(Protocol):
    """Made of a block's cells and of its noise."""

    def __init__(self, cells: Sequence[Cell], fresh: Fresh) -> None: ...

    def after(self, cell: Cell, x: Tensor, flow: Tensor, x0: Tensor) -> Tensor:
        """The next input, or after the last cell the clean latents.

        Args:
            x: the cell's input.
            flow: what the model said of it.
            x0: the clean latents that follow from it.
        """
        ...


class Renoise:
    """Go to the predicted clean latents and add fresh noise for the next level (Self-Forcing)."""

    def __init__(self, cells: Sequence[Cell], fresh: Fresh) -> None:
        self._fresh = fresh

    def after(self, cell: Cell, x: Tensor, flow: Tensor, x0: Tensor) -> Tensor:
        if cell.next_sigma == 0.0:
            return x0
        return (1 - cell.next_sigma) * x0 + cell.next_sigma * self._fresh(cell.level + 1)


class Euler:
    """Follow the predicted flow down to the next level."""

    def __init__(self, cells: Sequence[Cell], fresh: Fresh) -> None:
        pass

    def after(self, cell: Cell, x: Tensor, flow: Tensor, x0: Tensor) -> Tensor:
        if cell.next_sigma == 0.0:
            return x0
        return x + (cell.next_sigma - cell.sigma) * flow.to(x.dtype)


class UniPC:
    """UniPC of second order (Zhao et al. 2023) through diffusers, for models that want many steps;
    its settings are those of Wan2.1 and of Self-Forcing's many-step pipeline."""

    def __init__(self, cells: Sequence[Cell], fresh: Fresh) -> None:
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        self._solver: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
        )
        self._solver.set_timesteps(sigmas=np.array([cell.sigma for cell in cells]))

    def after(self, cell: Cell, x: Tensor, flow: Tensor, x0: Tensor) -> Tensor:
        timestep = self._solver.timesteps[cell.level]
        return self._solver.step(flow.to(x.dtype), timestep, x).prev_sample


SAMPLERS: dict[str, type[Sampler]] = {"renoise": Renoise, "euler": Euler, "unipc": UniPC}
