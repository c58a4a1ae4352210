"""When each block is denoised, at which level, and what it reads. Plain data, no model.

Levels are flow matching: ``x_t = (1 - σ) x0 + σ ε``, timestep = 1000 σ, warped by a shift
(σ' = s σ / (1 + (s - 1) σ)) and read from a 1000-entry float32 table, as Self-Forcing does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

TABLE_SIZE = 1000
CLEAN = -1  # the level of a finished block
GRIDS = ("warped", "plain", "solver")


@dataclass(frozen=True)
class Cell:
    """One unit of scheduled work.

    Attributes:
        kind: ``denoise`` or ``commit``.
        block: absolute block number.
        level: step index of that block, or CLEAN for the context pass.
        timestep: the level as the model is told it, 0…1000 (float: never rounded).
        sigma: noise share of the input at that level.
        next_sigma: noise share after this step; 0 ends the block.
        reads: the level at which earlier blocks are read.
    """

    kind: str
    block: int
    level: int
    timestep: float
    sigma: float
    next_sigma: float = 0.0
    reads: int = CLEAN


@dataclass(frozen=True)
class Schedule:
    """The serial schedule: denoise a block step by step, then commit it clean.

    Attributes:
        steps: indices into a 1000-step training schedule, descending, for example
            ``(1000, 750, 500, 250)``; blocks beyond ``first_steps`` use this list.
        shift: timestep shift of the table.
        context_timestep: timestep of the context pass.
        first_steps: step lists of the first blocks, where they differ.
        grid: what a step means. ``warped``: an entry of the shifted table (Self-Forcing's
            ``warp_denoising_step``). ``plain``: the timestep itself, whose σ is the table's nearest
            (CausVid). ``solver``: only how many there are counts, in equal steps of unshifted σ
            (Wan2.1's solvers).
    """

    steps: tuple[int, ...]
    shift: float = 5.0
    context_timestep: float = 0.0
    first_steps: tuple[tuple[int, ...], ...] = ()
    grid: str = "warped"

    def __post_init__(self) -> None:
        for steps in (self.steps, *self.first_steps):
            ordered = all(a > b for a, b in pairwise(steps))
            if not steps or not ordered or steps[0] > TABLE_SIZE or steps[-1] < 0 or not steps[0]:
                raise ValueError(
                    f"schedule: steps must be descending numbers in 0…{TABLE_SIZE}, got {steps}"
                )
        if self.shift <= 0:
            raise ValueError(f"schedule: shift must be above 0, got {self.shift}")
        if not 0 <= self.context_timestep <= TABLE_SIZE:
            raise ValueError(f"schedule: context_timestep must be in 0…{TABLE_SIZE}")
        if self.grid not in GRIDS:
            raise ValueError(f"schedule: grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")

    @classmethod
    def uniform(
        cls, steps: int, shift: float, context_timestep: float = 0.0, grid: str = "warped"
    ) -> "Schedule":
        """``steps`` equal steps of the training schedule: 4 gives 1000, 750, 500, 250.

        Raises:
            ValueError: unless 1 ≤ steps ≤ 1000.
        """
        if not 1 <= steps <= TABLE_SIZE:
            raise ValueError(f"schedule: steps must be in 1…{TABLE_SIZE}, got {steps}")
        listed = tuple(TABLE_SIZE - (i * TABLE_SIZE) // steps for i in range(steps))
        return cls(listed, shift, context_timestep, grid=grid)

    @classmethod
    def listed(
        cls, line: str, shift: float, context_timestep: float = 0.0, grid: str = "warped"
    ) -> "Schedule":
        """The schedule of a step list, such as ``1000,750,500,250``.

        Raises:
            ValueError: for anything else than descending whole numbers in 0…1000.
        """
        parts = [part.strip() for part in line.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ValueError(
                f"schedule: a step list is written as '1000,750,500,250', not {line!r}"
            )
        return cls(tuple(map(int, parts)), shift, context_timestep, grid=grid)

    @property
    def lanes(self) -> tuple[int, ...]:
        """Levels at which a context is kept of earlier blocks."""
        return (CLEAN,)

    def step_list(self, block: int) -> tuple[int, ...]:
        """The step list of a block."""
        return self.first_steps[block] if block < len(self.first_steps) else self.steps

    def cells(self, block: int) -> Iterator[Cell]:
        """The denoise cells of a block, in order; the commit cell is `commit_cell`."""
        timesteps, sigmas = levels(self.step_list(block), self.shift, self.grid)
        for level, (timestep, sigma) in enumerate(zip(timesteps, sigmas, strict=True)):
            after = sigmas[level + 1] if level + 1 < len(sigmas) else 0.0
            yield Cell("denoise", block, level, timestep, sigma, after)

    def commit_cell(self, block: int) -> Cell:
        """The context pass of a block: its clean latents at ``context_timestep``."""
        return Cell("commit", block, CLEAN, self.context_timestep, 0.0)


def shift_table(shift: float) -> tuple[Tensor, Tensor]:
    """σ and timestep of every training step, float32 ``[1000]`` each, from noise to clean."""
    linear = torch.linspace(1.0, 0.0, TABLE_SIZE + 1)[:-1]
    sigmas = shift * linear / (1 + (shift - 1) * linear)
    return sigmas, sigmas * TABLE_SIZE


@lru_cache
def levels(
    steps: tuple[int, ...], shift: float, grid: str = "warped"
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Timesteps and σ of a step list on a grid; see `Schedule`."""
    sigmas, timesteps = shift_table(shift)
    if grid == "warped":
        # Step 0 is told as timestep 0; the table has no such entry, and its nearest σ is the last.
        told = torch.cat((timesteps, torch.zeros(1)))
        index = torch.tensor([TABLE_SIZE - step for step in steps])
        return (
            tuple(told[index].tolist()),
            tuple(sigmas[index.clamp(max=TABLE_SIZE - 1)].tolist()),
        )
    if grid == "plain":
        nearest = [int((timesteps - step).abs().argmin()) for step in steps]
        return tuple(map(float, steps)), tuple(sigmas[nearest].tolist())
    top = 1 - 1 / TABLE_SIZE
    linear = torch.linspace(top, 0.0, len(steps) + 1, dtype=torch.float64)[:-1]
    shifted = shift * linear / (1 + (shift - 1) * linear)
    # Wan's solvers tell the model whole timesteps, rounded towards zero.
    return tuple((TABLE_SIZE * shifted).floor().tolist()), tuple(shifted.tolist())
