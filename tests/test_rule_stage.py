"""The stage for TPP's rule: what it computes is what a rollout computes; and the world it makes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_world
from torch import Tensor

from worldsim.maze.fitting import Rank
from worldsim.maze.recipe import PRESETS, TINY
from worldsim.maze.rule_stage import RULE, SameLevel, rule_batches
from worldsim.maze.train import WORLD, train
from worldsim.world import World

FRAMES, STEPS = 6, 3
KEYS = [frozenset({"KeyW"}), frozenset({"KeyJ"}), frozenset({"KeyD", "KeyL"})]
PROMPT = "red brick, night"
Batch = Mapping[str, Tensor]


def staged(world: World) -> SameLevel:
    schedule = world.config.schedule(STEPS).under(RULE)
    return SameLevel(world.transformer, world.text_encoder, schedule)


@pytest.fixture(scope="module")
def world() -> World:
    return random_world(rule=RULE)


def rolled_out(world: World, cache: str, given: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A session: the inputs of every step and the finished clip, as `SameLevel.rollout` has them,
    and what it was told and made of, as the stage reads it."""
    generator = torch.Generator().manual_seed(1)
    eps, clean = torch.randn(2, FRAMES, *world.latent_shape, generator=generator)
    inputs: list[list[Tensor]] = []
    told: list[Any] = []

    def watched(model: Callable[..., Any]) -> Callable[..., Any]:
        def run(latents: Tensor, timestep: Tensor, conditioning: Any, *rest: Any) -> Any:
            inputs[-1].append(latents.clone())
            told[-1] = conditioning
            return model(latents, timestep, conditioning, *rest)

        return run

    with (
        pytest.MonkeyPatch.context() as patch,
        world.session(PROMPT, 3, STEPS, cache, noise=lambda block, *_: eps[block]) as one,
    ):
        patch.setattr(world, "forward", watched(world.forward))
        patch.setattr(world, "commit", watched(world.commit))
        for frame in range(FRAMES):
            inputs.append([])
            told.append(None)
            keys = [KEYS[frame % len(KEYS)]]
            if frame < given:
                block = one.give(clean[frame], keys)
                one.settle()  # its pass in every lane, each over clean latents
            else:
                block = one.denoise(keys)
            inputs[-1].append(block.latents)
    known = torch.arange(FRAMES) < given
    batch = {
        "latents": torch.cat(list(clean), dim=2) * known[:, None, None],
        "eps": torch.cat(list(eps), dim=2),
        "given": known[None],
        "actions": torch.cat([one.actions for one in told], dim=1),
        "rays": torch.cat([one.rays for one in told], dim=1),
        "prompt": torch.zeros(1, FRAMES, dtype=torch.long),
        "ids": world.text_encoder.ids(PROMPT)[None],
    }
    return [torch.cat(frames, dim=2) for frames in zip(*inputs, strict=True)], batch


@pytest.mark.parametrize("given", [0, 2])
@pytest.mark.parametrize(("cache", "window"), [("recent=all", FRAMES), ("recent=2", 2)])
def test_a_clip_in_training_is_a_rollout_under_the_rule(
    world: World, cache: str, window: int, given: int
) -> None:
    made, batch = rolled_out(world, cache, given)
    back = torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)
    batch["seen"] = ((back > 0) & (back <= window))[None]
    stage = staged(world)
    with torch.no_grad():
        text = world.transformer.encode_prompt(stage.words(batch["ids"]))
        ours = stage.rollout(text, batch, batch["eps"])
    assert len(ours) == len(made) == STEPS + 1
    for level, (one, other) in enumerate(zip(ours, made, strict=True)):
        assert torch.allclose(one, other, atol=2e-5), level
    # Each level by itself, as the loss has it: given its inputs, the step that a session takes.
    for level, (sigma, following) in enumerate(stage.levels):
        with torch.no_grad():
            flow = stage.flow(text, batch, made[level], torch.full((1, FRAMES), sigma))
        x = made[level] + (following - sigma) * flow
        own = slice(given, None)
        assert torch.allclose(x[:, :, own], made[level + 1][:, :, own], atol=2e-5), level
    blind = {**batch, "seen": torch.zeros_like(batch["seen"])}
    with torch.no_grad():
        assert not torch.allclose(stage.rollout(text, blind, batch["eps"])[-1], ours[-1], atol=1e-3)


@pytest.fixture(scope="module")
def material(world: World) -> Batch:
    """A batch of the tiny recipe, with given frames and levels."""
    models = (world.autoencoder, world.text_encoder)
    return rule_batches(TINY, TINY.lessons[0], Rank(0, 1, "cpu"), *models)(0)


def test_every_parameter_learns_from_every_step(material: Batch) -> None:
    world = random_world(rule=RULE)
    stage = SameLevel(world.transformer, world.text_encoder, world.config.schedule())
    stage.criticism = 0.1
    stage.requires_grad_(True)
    figures = stage(material)
    assert all(torch.isfinite(value) for value in figures.values())
    figures["loss"].backward()
    assert not [name for name, p in stage.named_parameters() if p.grad is None]


def test_given_frames_come_first_and_are_no_task(world: World, material: Batch) -> None:
    given = material["given"]
    assert (given.long().diff(dim=1) <= 0).all() and not given[:, -1].any()
    assert (given[:, 0] | (material["weight"][:, 0] == 1)).all(), (
        "what nothing leads up to is given"
    )
    assert material["level"][-1] == TINY.few_steps - 1
    stage = SameLevel(world.transformer, world.text_encoder, world.config.schedule())
    last = torch.full_like(material["level"], TINY.few_steps - 1)
    noise = torch.where(given[None, :, None, :, None, None], 9.0, material["own_eps"])
    with torch.no_grad():
        plain = stage({**material, "level": last})
        other = stage({**material, "level": last, "own_eps": noise})
        moved = stage({**material, "level": last, "own_eps": material["own_eps"].flip(0, 1)})
    assert other["loss"] == plain["loss"], "noise in place of given frames is never seen"
    assert moved["taught"] == plain["taught"] and moved["own"] != plain["own"]


def test_the_recipe_goes_on_from_a_bundled_world_and_says_its_rule(tmp_path: Path) -> None:
    train(PRESETS["maze-tpp"]["tiny"], tmp_path)
    start = World.from_pretrained("maze-short", torch.float16)
    world = World.from_pretrained(tmp_path / WORLD, torch.float16)
    assert world.config.rule == RULE == world.config.schedule().rule
    for name in ("autoencoder", "text_encoder", "transformer"):
        mine, theirs = (getattr(one, name).state_dict() for one in (world, start))
        same = all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert same == (name == "autoencoder"), name
