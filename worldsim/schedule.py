"""When each block is denoised, at which level, and what it reads. Plain data, no model.

Levels are flow matching: ``x_t = (1 - σ) x0 + σ ε``, timestep = 1000 σ, warped by a shift
(σ' = s σ / (1 + (s - 1) σ)) and read from a 1000-entry float32 table, as Self-Forcing does.

A *lane* is one context: what all blocks left behind at one level. A cell reads one lane; whatever
it leaves behind goes to others, or to none. When the cells run, on what and side by side with which
others, is `worldsim.wavefront`'s business and changes nothing that they compute.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

TABLE_SIZE = 1000
CLEAN = -1  # the level of a finished block, and the lane of such
LAST = -2  # the lane of what every block's last step leaves behind, whichever level that is
GRIDS = ("warped", "plain", "solver")
CONTEXTS = ("clean", "fused", "last", "lag", "output", "joint")
RULES = ("clean", "last", "output", "joint")  # and lag0, lag1, …; see `Schedule.rule`
LAG_RULE = re.compile(r"lag(\d{1,3})")
ORDERS = ("serial", "batch", "steps", "layers", "joint")
SPREAD = {  # the orders that a context allows
    "clean": ("serial",),
    "fused": ("serial",),
    "last": ("serial",),
    "lag": ("serial", "batch", "steps", "layers"),
    "output": ("serial", "steps"),
    "joint": ("joint",),
}


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
        reads: the lane in which earlier blocks are read.
        publishes: the lane in which later blocks read what this cell leaves behind, or None.
    """

    kind: str
    block: int
    level: int
    timestep: float
    sigma: float
    next_sigma: float = 0.0
    reads: int = CLEAN
    publishes: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Levels of each block, and at which levels it reads those before it.

    Attributes:
        steps: indices into a 1000-step training schedule, descending, for example
            ``(1000, 750, 500, 250)``; blocks beyond ``first_steps`` use this list.
        shift: timestep shift of the table.
        context_timestep: timestep of the context pass of a block that was made.
        first_steps: step lists of the first blocks, where they differ.
        grid: what a step means. ``warped``: an entry of the shifted table (Self-Forcing's
            ``warp_denoising_step``). ``plain``: the timestep itself, whose σ is the table's nearest
            (CausVid). ``solver``: only how many there are counts, in equal steps of unshifted σ
            (Wan2.1's solvers).
        context: what a block reads of those before it.
            ``clean``: a context pass over their finished latents (Self-Forcing).
            ``fused``: the same, but where it can (`worldsim.maker.Maker.fuses`) the pass shares a
            forward with the next block's first step: equal to ``clean`` but for rounding.
            ``last``: what their last step left behind; there is no context pass.
            ``lag``: step s reads what their step s + ``lag`` left behind, or their last one.
            ``output``: step s reads a context pass at the level that it leads to (HiAR).
            ``joint``: the blocks of a window are denoised at once and see each other (Rolling
            Forcing); no executor does that yet.
        lag: see ``context``.
        order: how cells are spread: ``serial``, a tick's cells in one ``batch``, ``steps`` on
            ranks, ``layers`` on ranks, ``joint``. Changes no pixel, but for the rounding of
            batches.
    """

    steps: tuple[int, ...]
    shift: float = 5.0
    context_timestep: float = 0.0
    first_steps: tuple[tuple[int, ...], ...] = ()
    grid: str = "warped"
    context: str = "clean"
    lag: int = 0
    order: str = "serial"

    def __post_init__(self) -> None:
        for steps in (self.steps, *self.first_steps):
            ordered = all(a > b for a, b in pairwise(steps))
            if not steps or not ordered or steps[0] > TABLE_SIZE or steps[-1] < 0 or not steps[0]:
                raise ValueError(
                    f"schedule: steps must be descending numbers in 0…{TABLE_SIZE}, got {steps}"
                )
        if not self.shift > 0:  # nor NaN
            raise ValueError(f"schedule: shift must be above 0, got {self.shift}")
        if not 0 <= self.context_timestep <= TABLE_SIZE:
            raise ValueError(f"schedule: context_timestep must be in 0…{TABLE_SIZE}")
        for name, known in (("grid", GRIDS), ("context", CONTEXTS), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"schedule: {name} must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.lag < 0 or (self.lag and self.context != "lag"):
            raise ValueError(f"schedule: lag must be 0 or more, and only where it is; {self.lag}")
        fits = SPREAD[self.context]
        if self.order not in fits or (self.lag and self.order in ("steps", "layers")):
            what = f"{self.context} {self.lag}" if self.lag else self.context
            raise ValueError(
                f"schedule: what reads {what} cannot be spread as {self.order}; it goes as "
                f"{' or '.join(fits[:2] if self.lag else fits)}"
            )
        if self.context in ("lag", "output", "joint") and any(
            len(steps) != len(self.steps) for steps in self.first_steps
        ):
            raise ValueError(
                "schedule: blocks that read each other level by level have equally many steps; "
                "give one step list, or a context that is clean or last"
            )

    @classmethod
    def uniform(
        cls, steps: int, shift: float, context_timestep: float = 0.0, grid: str = "warped"
    ) -> "Schedule":
        """``steps`` equal steps of the training schedule: 4 gives 1000, 750, 500, 250.

        Raises:
            ValueError: unless 1 ≤ steps ≤ 1000.
        """
        return cls(equal_steps(steps), shift, context_timestep, grid=grid)

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
    def rule(self) -> str:
        """What a model must have been trained with to be at home here: ``clean``, ``last``,
        ``lag0``, ``lag1``, …, ``output`` or ``joint``."""
        if self.context == "lag":
            return f"lag{min(self.lag, len(self.steps) - 1)}"
        return "clean" if self.context == "fused" else self.context

    def under(self, rule: str) -> "Schedule":
        """The same levels under a rule that a model was trained with, see `rule`; its cells run one
        after another, or in a joint window.

        Raises:
            ValueError: for one that nobody knows.
        """
        lagging = LAG_RULE.fullmatch(rule)
        if lagging:
            return replace(self, context="lag", lag=int(lagging[1]), order="serial")
        if rule not in RULES:
            raise ValueError(f"schedule: a rule is {', '.join(RULES)}, lag0, lag1, …, not {rule!r}")
        return replace(self, context=rule, lag=0, order="joint" if rule == "joint" else "serial")

    def check_recache(self) -> None:
        """Raises:
        ValueError: where blocks cannot be committed anew.
        """
        if self.rule != "clean":
            raise ValueError(
                "cache: recache commits finished blocks anew, but this schedule reads blocks in "
                "the making: flush instead"
            )

    @property
    def lanes(self) -> tuple[int, ...]:
        """Every lane that some cell reads."""
        count = len(self.steps)
        if self.context == "lag":
            return tuple(sorted({self._lane(level, count) for level in range(count)}))
        if self.context == "output":
            return (*range(1, count), CLEAN)
        return (LAST,) if self.context == "last" else (CLEAN,)

    def step_list(self, block: int) -> tuple[int, ...]:
        """The step list of a block."""
        return self.first_steps[block] if block < len(self.first_steps) else self.steps

    def cells(self, block: int) -> Iterator[Cell]:
        """The denoise cells of a block, in order; after them come its `commit_cells`."""
        timesteps, sigmas = levels(self.step_list(block), self.shift, self.grid)
        count = len(sigmas)
        for level, (timestep, sigma) in enumerate(zip(timesteps, sigmas, strict=True)):
            after = sigmas[level + 1] if level + 1 < count else 0.0
            yield Cell(
                "denoise", block, level, timestep, sigma, after,
                self._lane(level, count), self._left(level, count),
            )  # fmt: skip

    def commit_cells(self, block: int) -> tuple[Cell, ...]:
        """The context passes of a block, in the order in which they may begin."""
        if self.context in ("last", "lag"):
            return ()
        clean = self.commit_cell(block)
        if self.context != "output":
            return (clean,)
        timesteps, sigmas = levels(self.step_list(block), self.shift, self.grid)
        noisy = (
            Cell("commit", block, s, timesteps[s], sigmas[s], reads=s, publishes=s)
            for s in range(1, len(sigmas))
        )
        return (*noisy, clean)

    def commit_cell(self, block: int) -> Cell:
        """The context pass of a block's clean latents, at ``context_timestep``."""
        return Cell("commit", block, CLEAN, self.context_timestep, 0.0, publishes=CLEAN)

    def given_cells(self, block: int) -> tuple[Cell, ...]:
        """The context passes of a block that is given, not made: it is clean in every lane, and
        told as clean, whatever the `context_timestep` of those that are made."""
        clean = replace(self.commit_cell(block), timestep=0.0)
        return tuple(replace(clean, reads=lane, publishes=lane) for lane in self.lanes)

    def _lane(self, level: int, count: int) -> int:
        """The lane that a denoise cell reads."""
        if self.context == "lag":
            return min(level + self.lag, count - 1)
        if self.context == "output":
            return level + 1 if level + 1 < count else CLEAN
        return LAST if self.context == "last" else CLEAN

    def _left(self, level: int, count: int) -> int | None:
        """The lane of a denoise cell's by-product."""
        if self.context == "lag":
            return level if level >= min(self.lag, count - 1) else None
        return LAST if self.context == "last" and level == count - 1 else None


def equal_steps(count: int) -> tuple[int, ...]:
    """So many equal steps of the training schedule: 4 gives 1000, 750, 500, 250.

    Raises:
        ValueError: unless 1 ≤ count ≤ 1000.
    """
    if not 1 <= count <= TABLE_SIZE:
        raise ValueError(f"schedule: steps must be in 1…{TABLE_SIZE}, got {count}")
    return tuple(TABLE_SIZE - (i * TABLE_SIZE) // count for i in range(count))


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
