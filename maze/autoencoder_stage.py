"""Stage one: the autoencoder learns the pictures of the maze."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from worldsim.maze.fitting import Rank
from worldsim.maze.footage import Library, make_walks
from worldsim.maze.recipe import Recipe
from worldsim.maze.simulator import PICTURES_PER_LATENT
from worldsim.models.autoencoder import CausalAutoencoder, from_pictures

LATENT_PENALTY = 3e-4  # keeps the latents from growing until the noise on them means nothing
EDGE_WEIGHT = 0.02


class Reconstruction(nn.Module):
    """Squared error of the pictures, plus a little of their edges, over noisy latents."""

    def __init__(self, autoencoder: CausalAutoencoder, latent_noise: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_noise = latent_noise

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``batch["pictures"]``: uint8 ``[B, P, H, W, 3]``."""
        pictures = from_pictures(batch["pictures"])
        z = self.autoencoder.encode_clip(pictures)
        noisy = z + self.latent_noise * torch.randn_like(z)
        decoded = self.autoencoder.decode_clip(noisy).float()
        error = (decoded - pictures).square().mean()
        edges = sum(
            (decoded.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean() for dim in (-1, -2)
        )
        loss = error + EDGE_WEIGHT * edges + LATENT_PENALTY * z.float().square().mean()
        return {"loss": loss, "psnr": psnr_of(error)}


def psnr_of(squared_error: Tensor) -> Tensor:
    """PSNR in dB of a mean squared error of pictures in -1…1."""
    return 10 * torch.log10(4 / squared_error.detach())


def picture_batches(recipe: Recipe, rank: Rank) -> Callable[[int], dict[str, Tensor]]:
    """Random short clips out of rendered walks."""
    footage, plan = recipe.autoencoder_footage, recipe.autoencoder
    assert plan is not None
    pictures = PICTURES_PER_LATENT * (plan.frames - 1) + 1

    def render_all(number: int) -> Tensor:
        seeds = (recipe.seed, 1, rank.index, number)
        walks = make_walks(footage.maps, footage.frames, seeds, rank.device)
        parts = [
            walks.pictures(0, footage.frames, recipe.size, slice(row, row + 16))
            for row in range(0, footage.maps, 16)
        ]
        return torch.cat(parts)

    library = Library(footage, render_all)

    def batch(step: int) -> dict[str, Tensor]:
        random = np.random.default_rng((recipe.seed, 2, rank.index, step))
        held = library.at(step)
        clips = []
        for _ in range(plan.batch):
            source = held[random.integers(len(held))]
            first = random.integers(source.shape[1] - pictures + 1)
            clips.append(source[random.integers(len(source)), first : first + pictures])
        torch.manual_seed(int(random.integers(2**62)))  # for the noise on the latents
        return {"pictures": torch.stack(clips)}

    return batch


def set_statistics(autoencoder: CausalAutoencoder, pictures: Tensor) -> None:
    """Measure the latents of ``pictures [B, P, H, W, 3]`` and normalise by them from now on."""
    with torch.inference_mode():
        z = torch.cat([autoencoder.encode_clip(from_pictures(clip[None])) for clip in pictures])
    flat = rearrange(z.double(), "b t c h w -> c (b t h w)")
    mean, std = flat.mean(1), flat.std(1)
    autoencoder.mean = mean.to(autoencoder.mean)
    autoencoder.std = std.to(autoencoder.std)
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
