"""`worldsim train maze`: pictures → autoencoder → latents → DiT → a folder that a world loads."""

from pathlib import Path

import torch

from worldsim.maze.autoencoder_stage import Reconstruction, picture_batches, set_statistics
from worldsim.maze.fitting import Rank, fit, launch
from worldsim.maze.recipe import Recipe
from worldsim.models.autoencoder import CausalAutoencoder


def train(recipe: Recipe, folder: Path, device: str = "cpu", ranks: int = 1) -> None:
    """Run or resume the whole recipe; weights, curves and sheets appear in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    launch(ranks, _train, ranks, recipe, folder, device)


def _train(index: int, ranks: int, recipe: Recipe, folder: Path, device: str) -> None:
    rank = Rank(index, ranks, device)
    autoencoder = _autoencoder(recipe, folder, rank)


def _autoencoder(recipe: Recipe, folder: Path, rank: Rank) -> CausalAutoencoder:
    torch.manual_seed(recipe.seed)
    autoencoder = CausalAutoencoder(widths=recipe.widths, depths=(2, 2, 1))
    batch = picture_batches(recipe, rank)
    stage = Reconstruction(autoencoder, recipe.latent_noise)
    fit("autoencoder", stage, batch, recipe.autoencoder, folder, rank)
    autoencoder.requires_grad_(False).eval()
    return autoencoder
