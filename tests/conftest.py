"""Small worlds for the tests: random weights, none of them trivial, made in milliseconds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from worldsim.maze.recipe import TINY, Recipe
from worldsim.maze.train import untrained, world_config
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.world import World

# Tiny models gain nothing from threads, and beside other work a barrier can cost a hundredfold.
torch.set_num_threads(1)

MakeWorld = Callable[..., World]


def random_world(recipe: Recipe = TINY, **config: object) -> World:
    """An untrained maze of a recipe's sizes; ``config`` overrides fields of its `WorldConfig`."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        autoencoder = CausalAutoencoder(widths=recipe.widths)
        transformer, words = untrained(recipe, autoencoder.config.latent_channels)
    models = (transformer, autoencoder, words)
    for model in models:
        model.eval().requires_grad_(False)
    wanted = {"height": 32, "width": 48} | config  # no square: a mixed-up axis shows
    return World(replace(world_config(recipe), **wanted), *models)


@pytest.fixture(scope="session")
def make_world() -> MakeWorld:
    return random_world


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved world that the command line can open; nobody may change it."""
    folder = tmp_path_factory.mktemp("worlds") / "tiny"
    random_world().save_pretrained(folder)
    return folder
