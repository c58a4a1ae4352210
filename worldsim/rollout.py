"""The serial executor: denoise a block over read-only context, then commit it once.

Everything here is a function of its arguments; nothing is remembered between calls.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from worldsim.cache.policy import Pose
from worldsim.models.transformer import Conditioning
from worldsim.models.view import ContextView
from worldsim.schedule import CLEAN, Cell

Pass = Callable[..., Any]  # the model's forward or commit, compiled or not
Noise = Callable[[int, int, tuple[int, ...]], Tensor]  # (block, step, shape) -> noise
OnStep = Callable[[Cell, Tensor], None]


def denoise(
    forward: Pass,
    cells: Iterable[Cell],
    conditioning: Conditioning,
    view: ContextView,
    noise: Noise,
    shape: tuple[int, ...],
    device: torch.device,
    sampler: str = "renoise",
    on_step: OnStep | None = None,
) -> Tensor:
    """Run a block's denoise cells; returns its clean latents, float32 ``[1, C, F, H, W]``.

    ``renoise`` (Self-Forcing) goes to the predicted clean latent and adds fresh noise for the next
    level; ``euler`` follows the predicted flow down to it. ``on_step`` sees each cell and its
    prediction.
    """
    x = torch.empty(0)
    for cell in cells:
        assert cell.kind == "denoise" and cell.reads == CLEAN, "this executor reads clean context"
        if cell.level == 0:
            x = noise(cell.block, 0, shape).to(device)
        flow = forward(x, timesteps(cell, x), conditioning, [view])
        x0 = clean_from_flow(x, flow, cell.sigma)
        if on_step is not None:
            on_step(cell, x0)
        if cell.next_sigma == 0.0:
            return x0
        if sampler == "euler":
            x = x + (cell.next_sigma - cell.sigma) * flow.to(x.dtype)
        else:
            fresh = noise(cell.block, cell.level + 1, shape).to(device)
            x = (1 - cell.next_sigma) * x0 + cell.next_sigma * fresh
    raise AssertionError("a block's last denoise cell must end at sigma 0")


def commit(
    commit_pass: Pass,
    cell: Cell,
    latents: Tensor,
    conditioning: Conditioning,
    view: ContextView,
    start: int,
    poses: Sequence[Pose] = (),
    only: Container[int] | None = None,
) -> None:
    """The context pass: stage the K/V of a finished block ``[1, C, F, H, W]`` and publish it.

    ``poses``: at the end of each frame, in worlds that have poses. ``only``: publish these frames.
    """
    commit_pass(latents, timesteps(cell, latents), conditioning, [view])
    count = latents.shape[2]
    frames = range(start, start + count)
    view.context.stage(cell.block, cell.level, frames, *view.staged(count), poses=poses)
    view.context.commit(cell.block, cell.level, only)


def timesteps(cell: Cell, latents: Tensor) -> Tensor:
    """The cell's timestep for each row and frame, ``[R, F]``; at least float32, never rounded."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    shape = (latents.shape[0], latents.shape[2])
    return torch.full(shape, cell.timestep, dtype=dtype, device=latents.device)


def clean_from_flow(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """``x0 = x - σ v`` in float64, in the dtype of ``x``."""
    return (x.double() - sigma * flow.double()).to(x.dtype)
