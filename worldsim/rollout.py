"""The cells: denoise a block over read-only context, stage what it leaves behind, publish it once.

Every executor runs a cell through these functions, so they differ only in what runs when and where.
The serial one is `worldsim.maker`: all of a block's cells, and then the next block.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldsim.cache.policy import Pose
from worldsim.models.transformer import Conditioning
from worldsim.models.view import ContextView
from worldsim.samplers import SAMPLERS
from worldsim.schedule import Cell

Pass = Callable[..., Any]  # the model's forward, commit or fused, compiled or not
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
        *stage: bool,
    ) -> Any:
        quantised = any(view.context.config.quantised for view in views)
        return (eager if quantised else graph)(latents, timestep, conditioning, views, *stage)

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


Lanes = Mapping[int, Sequence[ContextView]]  # of each lane, the views of its rows


class Making:
    """A block in the making: what its cells share, and how far it is.

    Attributes:
        conditioning: one row for each view that a cell reads.
        start: absolute index of its first latent frame.
        poses: at the end of each frame, in worlds that have poses.
        taken: cells that have run.
        x: input of the next cell, ``[1, C, F, H, W]``; in the end its clean latents, float32.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        conditioning: Conditioning,
        noise: Noise,
        shape: tuple[int, ...],
        device: torch.device,
        sampler: str = "renoise",
        on_step: OnStep | None = None,
        guidance: float = 1.0,
        known: Known | None = None,
        *,
        start: int = 0,
        poses: Sequence[Pose] = (),
        x: Tensor | None = None,
    ) -> None:
        """Args:
        cells: its denoise cells, or those of them that come from here on.
        noise: what it is made of and what is added between cells.
        sampler: see `worldsim.samplers`.
        on_step: sees each cell and its prediction.
        guidance: where there is a second view, that of the negative prompt, its flow is left
            behind so many times (classifier-free guidance).
        known: frames that are given.
        x: the first cell's input; None begins with noise.
        """
        if known is not None:
            if known.frames.shape != shape[2:3] or tuple(known.latents.shape) != shape:
                raise ValueError(
                    f"known needs frames [{shape[2]}] and latents {list(shape)}, got "
                    f"{list(known.frames.shape)} and {list(known.latents.shape)}"
                )
            if known.frames.dtype != torch.bool:
                raise ValueError(f"known needs frames of bool, got {known.frames.dtype}")
            known = Known(known.frames.to(device), known.latents.to(device), known.timestep)
        block, self.taken = cells[0].block, 0
        self.conditioning, self.start, self.poses = conditioning, start, poses
        self.x = ours((noise(block, 0, shape) if x is None else x).to(device))
        self._sampler = SAMPLERS[sampler](cells, lambda step: noise(block, step, shape).to(device))
        self._on_step, self._guidance, self._known = on_step, guidance, known

    def rows(self, cell: Cell, count: int) -> tuple[Tensor, Tensor]:
        """What the model is told: latents ``[count, C, F, H, W]`` and levels ``[count, F]``."""
        level = timesteps(cell, self.x)
        if self._known is not None:
            self.x = self._with_known(self.x)
            level = torch.where(self._known.frames, self._known.timestep, level)
        if count == 1:
            return self.x, level
        return self.x.expand(count, *self.x.shape[1:]), level.expand(count, -1)

    def take(self, cell: Cell, flow: Tensor) -> None:
        """Go on to the next cell, by what the model said of `rows`."""
        if len(flow) > 1:
            wanted, unwanted = flow.chunk(2)
            flow = unwanted + self._guidance * (wanted - unwanted)
        x0 = clean_from_flow(self.x, flow, cell.sigma)
        if self._on_step is not None:
            self._on_step(cell, x0)
        self.x, self.taken = self._sampler.after(cell, self.x, flow, x0), self.taken + 1
        if cell.next_sigma == 0.0 and self._known is not None:
            self.x = self._with_known(self.x)

    def _with_known(self, x: Tensor) -> Tensor:
        assert self._known is not None
        return torch.where(self._known.frames[:, None, None], self._known.latents.to(x), x)


def denoise(forward: Pass, cell: Cell, making: Making, lanes: Lanes) -> None:
    """Run one denoise cell of a block. What it leaves behind is staged, and nothing committed."""
    views = lanes[cell.reads]
    latents, level = making.rows(cell, len(views))
    if cell.publishes is None:
        flow = forward(latents, level, making.conditioning, views)
    else:
        flow = forward(latents, level, making.conditioning, views, True)
        stage(cell, making.start, making.poses, views, lanes[cell.publishes], latents.shape[2])
    making.take(cell, flow)


def commit(
    commit_pass: Pass,
    cell: Cell,
    latents: Tensor,
    conditioning: Conditioning,
    lanes: Lanes,
    start: int,
    poses: Sequence[Pose] = (),
) -> None:
    """A context pass: stage the K/V of a block ``[1, C, F, H, W]`` at the cell's level.

    ``poses``: at the end of each frame, in worlds that have poses.
    """
    views = lanes[cell.reads]
    rows = ours(latents).expand(len(views), *latents.shape[1:])
    commit_pass(rows, timesteps(cell, rows), conditioning, views)
    assert cell.publishes is not None, "a context pass is for later blocks"
    stage(cell, start, poses, views, lanes[cell.publishes], latents.shape[2])


def stage(
    cell: Cell,
    start: int,
    poses: Sequence[Pose],
    views: Sequence[ContextView],
    into: Sequence[ContextView],
    count: int,
) -> None:
    """Stage what the cell's pass left in the views it read, in the contexts of a lane."""
    frames = range(start, start + count)
    for view, to in zip(views, into, strict=True):
        to.context.stage(cell.block, cell.level, frames, *view.staged(count), poses=poses)


def publish(cells: Iterable[Cell], lanes: Lanes, only: Container[int] | None = None) -> None:
    """Commit what these cells of one block have staged; ``only``: of its frames, these.

    All of it is staged by now, so that each lane has the block or none.
    """
    for cell in cells:
        for view in lanes[cell.publishes] if cell.publishes is not None else ():
            view.context.commit(cell.block, cell.level, only)


def ours(latents: Tensor) -> Tensor:
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


def side_by_side(rows: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of several passes as one of more rows."""
    if len(rows) == 1:
        return rows[0]
    first = rows[0]

    def joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        alike = all(part is parts[0] for part in parts)
        if alike and all(tensor.shape[0] == 1 for tensor in parts[0]):
            return tuple(x.expand(len(parts), *x.shape[1:]) for x in parts[0])  # no copy
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    return Conditioning(
        joined([row.text_keys for row in rows]),
        joined([row.text_values for row in rows]),
        actions=None if first.actions is None else torch.cat([_of(row.actions) for row in rows]),
        rays=None if first.rays is None else torch.cat([_of(row.rays) for row in rows]),
    )


def _of(given: Tensor | None) -> Tensor:
    assert given is not None, "rows of one world are conditioned alike"
    return given
