"""Small worlds for the tests: random weights, none of them trivial, made in milliseconds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from worldsim.maze.actions import ACTIONS
from worldsim.maze.recipe import TINY, Recipe
from worldsim.maze.themes import IGNORED, SYNONYMS, VOCABULARY
from worldsim.maze.train import world_config
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.words import WordEncoder
from worldsim.world import World

# Tiny models gain nothing from threads, and beside other work a barrier can cost a hundredfold.
torch.set_num_threads(1)

MakeWorld = Callable[..., World]


def random_world(recipe: Recipe = TINY, **config: object) -> World:
    """An untrained maze of a recipe's sizes; ``config`` overrides fields of its `WorldConfig`."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        autoencoder = CausalAutoencoder(widths=recipe.widths)
        words = WordEncoder(
            tuple(SYNONYMS), VOCABULARY, sorted(IGNORED), recipe.text_dim, recipe.text_length
        )
        channels = autoencoder.config.latent_channels
        transformer = CausalWanTransformer3DModel(
            num_attention_heads=recipe.heads, attention_head_dim=recipe.head_dim,
            in_channels=channels, out_channels=channels, text_dim=recipe.text_dim,
            ffn_dim=recipe.ffn_dim, num_layers=recipe.layers, action_dim=ACTIONS.dim,
            ray_dim=ACTIONS.ray_dim,
        )  # fmt: skip
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
