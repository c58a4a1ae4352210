"""The serial executor: denoise a block over read-only context, then commit it once.

Everything here is a function of its arguments; nothing is remembered between calls.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldsim.cache.policy import Pose
from worldsim.models.transformer import Conditioning
from worldsim.models.view import ContextView
from worldsim.samplers import SAMPLERS
from worldsim.schedule import CLEAN, Cell

Pass = Callable[..., Any]  # the model's forward or commit, compiled or not
Noise = Callable[[int, int, tuple[int, ...]], Tensor]  # (block, step, shape) -> noise
OnStep = Callable[[Cell, Tensor], None]


def compiled(eager: Pass, **options: Any) -> Pass:
    """A pass of the model as one graph; ``options`` go to `torch.compile`.

    Over quantised pages the pass stays as it is: it reads pages by their numbers, which change from
    block to block and would be constants of the graph.
    """
    graph = torch.compile(eager, fullgraph=True, **options)

    def run(
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        views: Sequence[ContextView],
    ) -> Any:
        quantised = any(view.context.config.quantised for view in views)
        return (eager if quantised else graph)(latents, timestep, conditioning, views)

    return run


@dataclass(frozen=True)
class Known:
    """Frames of a block that are given, not made: a timestep for each frame (as in PUSA).

    Attributes:
        frames: which ones, bool ``[F]``.
        latents: clean, ``[1, C, F, H, W]``; the others' values do not matter.
        timestep: at which the model is told them.
    """

    frames: Tensor
    latents: Tensor
    timestep: float = 0.0


def denoise(
    forward: Pass,
    cells: Iterable[Cell],
    conditioning: Conditioning,
    views: Sequence[ContextView],
    noise: Noise,
    shape: tuple[int, ...],
    device: torch.device,
    sampler: str = "renoise",
    on_step: OnStep | None = None,
    guidance: float = 1.0,
    known: Known | None = None,
) -> Tensor:
    """Run a block's denoise cells; returns its clean latents, float32 ``[1, C, F, H, W]``.

    Args:
        views: what the block reads; a second one is that of the negative prompt, whose flow is left
            behind ``guidance`` times (classifier-free guidance). One row of ``conditioning`` each.
        sampler: see `worldsim.samplers`.
        on_step: sees each cell and its prediction.
        known: frames that are given.
    """
    if known is not None:
        if known.frames.shape != shape[2:3] or tuple(known.latents.shape) != shape:
            raise ValueError(
                f"known needs frames [{shape[2]}] and latents {list(shape)}, got "
                f"{list(known.frames.shape)} and {list(known.latents.shape)}"
            )
        known = Known(known.frames.to(device), known.latents.to(device), known.timestep)
    listed = list(cells)
    first = listed[0]
    x = _ours(noise(first.block, 0, shape).to(device))
    steps = SAMPLERS[sampler](listed, lambda step: noise(first.block, step, shape).to(device))
    for cell in listed:
        assert cell.kind == "denoise" and cell.reads == CLEAN, "this executor reads clean context"
        level = timesteps(cell, x)
        if known is not None:
            x = torch.where(known.frames[:, None, None], known.latents.to(x), x)
            level = torch.where(known.frames, known.timestep, level)
        flow = _guided(forward, x, level, conditioning, views, guidance)
        x0 = clean_from_flow(x, flow, cell.sigma)
        if on_step is not None:
            on_step(cell, x0)
        x = steps.after(cell, x, flow, x0)
    return x if known is None else torch.where(known.frames[:, None, None], known.latents.to(x), x)


def _guided(
    forward: Pass,
    x: Tensor,
    level: Tensor,
    conditioning: Conditioning,
    views: Sequence[ContextView],
    guidance: float,
) -> Tensor:
    rows = len(views)
    if rows == 1:
        return forward(x, level, conditioning, views)
    both = x.expand(rows, *x.shape[1:]), level.expand(rows, -1)
    wanted, unwanted = forward(*both, conditioning, views).chunk(2)
    return unwanted + guidance * (wanted - unwanted)


def commit(
    commit_pass: Pass,
    cell: Cell,
    latents: Tensor,
    conditioning: Conditioning,
    views: Sequence[ContextView],
    start: int,
    poses: Sequence[Pose] = (),
    only: Container[int] | None = None,
) -> None:
    """The context pass: stage the K/V of a finished block ``[1, C, F, H, W]`` and publish it.

    ``poses``: at the end of each frame, in worlds that have poses. ``only``: publish these frames.
    """
    rows = _ours(latents).expand(len(views), *latents.shape[1:])
    commit_pass(rows, timesteps(cell, rows), conditioning, views)
    count = latents.shape[2]
    frames = range(start, start + count)
    for view in views:
        view.context.stage(cell.block, cell.level, frames, *view.staged(count), poses=poses)
    for view in views:  # only now: all of them or none
        view.context.commit(cell.block, cell.level, only)


def _ours(latents: Tensor) -> Tensor:
    """What came from outside as a tensor like those made here: to compiled code, inference tensors
    and all others are two things, and two graphs."""
    return latents if latents.is_inference() else latents.clone()


def timesteps(cell: Cell, latents: Tensor) -> Tensor:
    """The cell's timestep for each row and frame, ``[R, F]``; at least float32, never rounded."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    shape = (latents.shape[0], latents.shape[2])
    return torch.full(shape, cell.timestep, dtype=dtype, device=latents.device)


def clean_from_flow(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """``x0 = x - σ v`` in float64, in the dtype of ``x``."""
    return (x.double() - sigma * flow.double()).to(x.dtype)
