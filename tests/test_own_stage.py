"""Stage three on tiny models: what it differentiates, what it leaves alone, what it wears."""

from collections.abc import Callable, Mapping

import pytest
import torch
from conftest import random_world
from torch import Tensor

from worldsim.maze.critic import Critic, losses
from worldsim.maze.fitting import Rank
from worldsim.maze.judged import detail
from worldsim.maze.own_stage import OwnFrames, own_batches, worn
from worldsim.maze.recipe import TINY
from worldsim.world import World


def batches_of(world: World) -> Callable[[int], dict[str, Tensor]]:
    models = (world.autoencoder, world.text_encoder)
    return own_batches(TINY, TINY.lessons[0], Rank(0, 1, "cpu"), *models)


@pytest.fixture(scope="module")
def stage() -> tuple[OwnFrames, Mapping[str, Tensor]]:
    world = random_world()
    module = OwnFrames(world.transformer, world.text_encoder, TINY)
    module.requires_grad_(True)
    batch = own_batches(
        TINY, TINY.lessons[0], Rank(0, 1, "cpu"), world.autoencoder, world.text_encoder
    )
    return module, batch(0)


def test_every_parameter_learns_from_every_step(
    stage: tuple[OwnFrames, Mapping[str, Tensor]],
) -> None:
    module, batch = stage
    figures = module(batch)
    assert all(torch.isfinite(value) for value in figures.values())
    figures["loss"].backward()
    silent = [name for name, p in module.named_parameters() if p.grad is None]
    module.zero_grad()
    assert not silent


def test_a_batch_is_a_pure_function_of_the_step(
    stage: tuple[OwnFrames, Mapping[str, Tensor]],
) -> None:
    world = random_world()
    again = own_batches(
        TINY, TINY.lessons[0], Rank(0, 1, "cpu"), world.autoencoder, world.text_encoder
    )(0)
    assert all(torch.equal(again[key], value) for key, value in stage[1].items())


def test_the_own_half_sees_its_own_frames(stage: tuple[OwnFrames, Mapping[str, Tensor]]) -> None:
    """Where every place of the context is given, own noise makes no difference; else it does."""
    module, batch = stage
    batch = {**batch, "final": torch.zeros_like(batch["final"])}
    other = {**batch, "own_eps": batch["own_eps"].flip(0)}
    with torch.no_grad():
        assert module(batch)["own"] != module(other)["own"]
        assert module(batch)["taught"] == module(other)["taught"]
        all_given = torch.ones_like(batch["given"])
        one, two = ({**given, "given": all_given} for given in (batch, other))
        assert module(one)["own"] == module(two)["own"]


def test_a_context_that_is_not_worn_is_the_clip(
    stage: tuple[OwnFrames, Mapping[str, Tensor]],
) -> None:
    _, batch = stage
    unworn = {
        **batch,
        **{key: torch.zeros_like(batch[key]) for key in ("blur", "context_sigma", "offset")},
        "gain": torch.ones_like(batch["gain"]),
    }
    assert torch.equal(worn(unworn), batch["latents"])
    blurred = worn({**unworn, "blur": torch.ones_like(batch["blur"])})
    assert detail(blurred) < 0.7 * detail(batch["latents"])


def test_the_makers_loss_leaves_the_critic_alone() -> None:
    torch.manual_seed(0)
    critic = Critic(4, width=8)
    true, noise = torch.randn(2, 6, 4, 4, 4)
    made = torch.randn(6, 4, 4, 4, requires_grad=True)
    themes = torch.zeros(6, 4, dtype=torch.long)
    maker, own = losses(critic, true, made, themes, noise)
    maker.backward(retain_graph=True)
    assert made.grad is not None and made.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())
    before = made.grad.clone()
    own.backward()
    assert torch.equal(made.grad, before), "the critic's loss does not teach the maker"


def test_a_critic_comes_to_tell_two_kinds_apart() -> None:
    torch.manual_seed(0)
    critic = Critic(4, width=16)
    optimiser = torch.optim.Adam(critic.parameters(), 2e-3)
    themes = torch.zeros(32, 4, dtype=torch.long)
    for _ in range(60):
        true, made = torch.randn(32, 4, 8, 8), 0.4 * torch.randn(32, 4, 8, 8)
        _, own = losses(critic, true, made, themes, torch.randn(32, 4, 8, 8))
        optimiser.zero_grad()
        own.backward()
        optimiser.step()
    with torch.no_grad():
        true, made = torch.randn(32, 4, 8, 8), 0.4 * torch.randn(32, 4, 8, 8)
        assert (critic(true, themes) > critic(made, themes)).float().mean() > 0.9
