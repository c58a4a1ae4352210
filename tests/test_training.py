"""The recipe end to end on tiny models: it proves the path and the resumption, not the picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from worldsim.maze.fitting import Rank, fit
from worldsim.maze.measures import MOST_ALIKE, forkable, true_forks
from worldsim.maze.optim import Optimiser
from worldsim.maze.recipe import TINY, Fit
from worldsim.maze.train import RECIPE, WORLD, train
from worldsim.maze.truth import FORKS, GIVEN, held_out
from worldsim.maze.walks import HELD_OUT
from worldsim.metrics import psnr
from worldsim.world import World

PLAN = Fit(steps=8, batch=2, frames=2, warmup=2)


def test_a_tiny_recipe_makes_a_world_that_streams(tmp_path: Path) -> None:
    train(TINY, tmp_path)
    world = World.from_pretrained(tmp_path / WORLD, torch.float32)
    blocks = list(world.stream("red brick", blocks=3))
    assert [len(block.frames) for block in blocks] == [1, 4, 4]
    for name in ("losses.png", "rollouts.png", RECIPE):
        assert (tmp_path / name).stat().st_size > 0
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(TINY, seed=8), tmp_path)


class Regression(nn.Module):
    """Something small with a matrix, a bias, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.layer(batch["x"]) - batch["y"]).square().mean()}


def regression_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(5, n, generator=generator) for name, n in (("x", 4), ("y", 3))}


def fitted(folder: Path, stop_before: int | None = None) -> Regression:
    """Fit from one start; ``stop_before`` dies at that step, with every step checkpointed."""
    torch.manual_seed(0)
    module = Regression()

    def batch(step: int) -> dict[str, Tensor]:
        if step == stop_before:
            raise KeyboardInterrupt
        return regression_batch(step)

    fit("tiny", module, batch, PLAN, folder, Rank(0, 1, "cpu"), save_every=0.0)
    return module


def test_a_resumed_fit_equals_one_that_never_stopped(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = fitted(whole)
    with pytest.raises(KeyboardInterrupt):
        fitted(broken, stop_before=5)
    resumed = fitted(broken)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_a_log_row_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, stop_before=5)
    log = tmp_path / "tiny.csv"
    log.write_text("step,loss\n3,0.5\n7,0.4\n")
    fitted(tmp_path)
    assert [row.split(",")[0] for row in log.read_text().splitlines()] == ["step", "3", "8"]


def test_matrices_are_stepped_in_place() -> None:
    module = Regression()
    before = module.layer.weight.detach().clone()
    optimiser = Optimiser(module, PLAN)
    module(regression_batch(0))["loss"].backward()
    optimiser.step(4)
    assert not torch.equal(before, module.layer.weight)
    assert module.layer.weight.grad is None


def test_held_out_walks_are_a_pure_function_of_seeds_training_never_draws() -> None:
    a, b = (held_out(3, GIVEN + 2, (64, 64), 5) for _ in range(2))
    assert torch.equal(a.pictures(1), b.pictures(1))
    assert len(a.pictures(0)) == 1 + 4 * (GIVEN + 1)
    assert HELD_OUT >= 2**31
    # What is predicted for a walk's own keys is what the walk shows.
    track = a.track(0)
    first = 4 * (GIVEN - 1)
    assert torch.equal(a.continued(0, first, track[GIVEN], 1), a.pictures(0, first + 1, first + 5))


def test_forks_count_only_where_their_truths_differ() -> None:
    truth = held_out(24, GIVEN, (64, 64))
    chosen = forkable(truth, 2)
    for row in range(chosen[-1] + 1):
        future = true_forks(truth, row)
        assert len(future) == len(FORKS)
        closest = max(psnr(a, b) for i, a in enumerate(future) for b in future[:i])
        assert (row in chosen) == (closest <= MOST_ALIKE)
    with pytest.raises(ValueError, match="walks can be forked"):
        forkable(truth, 25)
