"""The training loop of one stage: resumable, on one rank or several, with a progress bar.

A stage is a module whose forward turns a batch into named losses, and a function that makes the
batch of a step. The loop knows nothing else of it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from worldsim.maze.optim import Average, Optimiser
from worldsim.maze.recipe import Fit

Batch = Mapping[str, Tensor]
LOG_EVERY = 20


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is, and the device it trains on."""

    index: int
    count: int
    device: str

    @property
    def first(self) -> bool:
        return self.index == 0


def fit(
    name: str,
    module: nn.Module,
    batch: Callable[[int], Batch],
    plan: Fit,
    folder: Path,
    rank: Rank,
    save_every: float = 120.0,
) -> None:
    """Fit ``module`` and leave its averaged weights in it.

    Args:
        module: ``module(batch) -> {"loss": …, other figures}``.
        batch: makes the batch of a step; a pure function of the step.
        folder: receives ``NAME.pt`` (checkpoint) and ``NAME.csv`` (losses). A checkpoint there is
            continued.
        save_every: seconds between checkpoints.
    """
    module.to(rank.device)
    optimiser, average = Optimiser(module, plan), Average(module, plan.ema)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.csv"
    start = _load(checkpoint, module, optimiser, average, rank.device)
    if rank.first:
        _cut_log(log, start)
    trained = DistributedDataParallel(module) if rank.count > 1 else module
    sums: dict[str, Tensor | float] = {}
    saved, counted = time.monotonic(), 0
    with _progress(rank.first) as progress:
        task = progress.add_task(name, total=plan.steps, completed=start, figures="")
        for step in range(start, plan.steps):
            material = batch(step)
            with torch.autocast(torch.device(rank.device).type, torch.bfloat16):
                figures = trained(material)
            figures["loss"].backward()
            optimiser.step(step)
            average.update(module, step)
            for key, value in figures.items():
                sums[key] = sums.get(key, 0.0) + value.detach()
            counted += 1
            done = step + 1 == plan.steps
            if rank.first and (counted == LOG_EVERY or done):
                means = {key: float(value) / counted for key, value in sums.items()}
                _write_log(log, step + 1, means)
                shown = " ".join(f"{key} {value:.4f}" for key, value in means.items())
                progress.update(task, figures=shown)
            if counted == LOG_EVERY:
                sums, counted = {}, 0
            progress.advance(task)
            if rank.first and (done or time.monotonic() - saved > save_every):
                _save(checkpoint, step + 1, module, optimiser, average)
                saved = time.monotonic()
    average.copy_to(module)


def _load(
    path: Path, module: nn.Module, optimiser: Optimiser, average: Average, device: str
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    with torch.no_grad():
        # In place: the optimiser's matrices are views of these parameters.
        for key, parameter in module.named_parameters():
            parameter.copy_(state["module"][key])
    optimiser.load_state_dict(state["optimiser"])
    average.values = state["average"]
    return state["step"]


def _save(path: Path, step: int, module: nn.Module, optimiser: Optimiser, average: Average) -> None:
    state = {
        "step": step,
        "module": dict(module.named_parameters()),
        "optimiser": optimiser.state_dict(),
        "average": average.values,
    }
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)  # a checkpoint is there whole or not at all


def _write_log(path: Path, step: int, means: Mapping[str, float]) -> None:
    if not path.exists():
        path.write_text("step," + ",".join(means) + "\n")
    with path.open("a") as file:
        file.write(f"{step}," + ",".join(f"{value:.6f}" for value in means.values()) + "\n")


def _cut_log(path: Path, start: int) -> None:
    """Forget what was logged after the checkpoint that training goes on from."""
    if path.exists():
        head, *rows = path.read_text().splitlines(keepends=True)
        kept = [row for row in rows if int(row.split(",")[0]) <= start]
        path.unlink()
        if kept:
            path.write_text("".join([head, *kept]))


def _progress(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        disable=not visible,
        refresh_per_second=2,
    )


def launch(ranks: int, work: Callable[..., None], *args: object) -> None:
    """Run ``work(rank, *args)`` on ``ranks`` processes of one thread each, or here if it is one.

    The processes are torchrun's, started from within.
    """
    if ranks == 1:
        work(0, *args)
        return
    plan = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="worldsim",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    elastic_launch(plan, _joined)(work, args)


def _joined(work: Callable[..., None], args: tuple[object, ...]) -> None:
    # One thread a rank: two one-thread ranks train as fast as one rank with two threads, and
    # nothing else on the machine can stall them at a barrier.
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        work(dist.get_rank(), *args)
    finally:
        dist.destroy_process_group()
