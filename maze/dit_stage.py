"""Stage two: the DiT learns to denoise a latent frame, given the clean frames before it.

A clip goes through the model once, twice over: a clean copy, whose frames see the clean frames
before them, and a noisy copy, whose frames see themselves and the clean frames before them. That
is exactly what the commit and denoise passes of a rollout compute, for all frames at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worldsim.maze.actions import ACTIONS
from worldsim.maze.fitting import Rank
from worldsim.maze.footage import Library, Walks, make_walks
from worldsim.maze.recipe import Recipe
from worldsim.maze.simulator import PICTURES_PER_LATENT
from worldsim.maze.themes import Theme
from worldsim.maze.two_copies import TwoCopies
from worldsim.models.autoencoder import CausalAutoencoder, from_pictures
from worldsim.models.transformer import CausalWanTransformer3DModel, Conditioning
from worldsim.models.words import WordEncoder

FROM_START = 0.25  # share of clips that begin with the first picture of a walk
CLEAN_CONTEXT = 0.4  # share of clips whose context is free of noise
UNTOLD = 0.5  # share of the noisy contexts that the model takes for clean, as it takes its own
FORGOTTEN_WORDS = 0.15  # chance of each word of a prompt to be left out


@dataclass(frozen=True)
class LatentWalks:
    """Encoded walks: latents ``[B, N, C, h, w]``, actions ``[B, N, A]``, rays ``[B, N, w, Y]``,
    themes ``[B, N, 4]`` and the true pose at the end of each latent frame ``[B, N, 3]``."""

    latents: Tensor
    actions: Tensor
    rays: Tensor
    themes: Tensor
    poses: Tensor


class FlowMatching(nn.Module):
    """Mean squared error of the predicted flow of the noisy copy."""

    def __init__(self, dit: CausalWanTransformer3DModel, words: WordEncoder) -> None:
        super().__init__()
        self.dit = dit
        self.words = words

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `clip_batches` for the batch."""
        clean, eps, sigma = batch["latents"], batch["eps"], batch["sigma"]
        context = mixed(clean, batch["context_eps"], batch["context_sigma"])
        noisy = mixed(clean, eps, sigma)
        text = self.dit.encode_prompt(self.words(batch["ids"]))
        copies = copies_of(self.dit, batch["seen"], clean)
        flow = noisy_flow(
            self.dit, text, batch, copies, context, batch["context_told"], noisy, sigma
        )
        error = (flow - (eps - clean)).square().mean(dim=(1, 3, 4))
        weight = batch["weight"]
        high = (sigma > 0.75) & (weight > 0)
        return {
            "loss": (error * weight).sum() / weight.sum(),
            "high_noise": (error * high).sum() / high.sum().clamp(min=1),
        }


Text = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # see `encode_prompt`


def noisy_flow(
    dit: CausalWanTransformer3DModel,
    text: Text,
    batch: Mapping[str, Tensor],
    copies: TwoCopies,
    context: Tensor,
    told: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    rows: slice = slice(None),
) -> Tensor:
    """Flow of the noisy copy of some ``rows`` of a batch, float32 ``[B, C, F, h, w]``.

    Args:
        copies: see `copies_of`, for these rows.
        context, told: the clean copy, and the noise level that the model takes it for ``[B, F]``.
        noisy, sigma: the noisy copy and its levels ``[B, F]``.
    """
    keys, values = text
    conditioning = Conditioning(
        keys,
        values,
        prompt=batch["prompt"][rows].repeat(1, 2),
        actions=batch["actions"][rows].repeat(1, 2, 1),
        rays=batch["rays"][rows].repeat(1, 2, 1, 1),
    )
    timestep = 1000 * torch.cat((told, sigma), dim=1)
    both = torch.cat((context, noisy), dim=2)
    return dit(both, timestep, conditioning, copies)[:, :, noisy.shape[2] :].float()


def copies_of(dit: CausalWanTransformer3DModel, seen: Tensor, latents: Tensor) -> TwoCopies:
    """The context of clips whose frames see the earlier ones that ``seen [B, F, F]`` names."""
    return TwoCopies(seen, dit.grid(*latents.shape[-2:]), dit.config.attention_head_dim)


def mixed(clean: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """Latents ``[B, C, F, h, w]`` at a noise level for each frame ``[B, F]``."""
    share = sigma[:, None, :, None, None]
    return (1 - share) * clean + share * eps


def shifted(u: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Noise levels of even shares in 0…1."""
    return shift * u / (1 + (shift - 1) * u)


def earlier_frames(frames: int, window: NDArray[np.int64]) -> Tensor:
    """Which earlier frames each frame sees, bool ``[B, F, F]``: the ``window [B]`` before it."""
    index = torch.arange(frames)
    back = index[:, None] - index[None, :]
    return (back > 0)[None] & (back[None] <= torch.from_numpy(window)[:, None, None])


def clip_batches(
    recipe: Recipe, rank: Rank, autoencoder: CausalAutoencoder, words: WordEncoder
) -> Callable[[int], dict[str, Tensor]]:
    """Random clips out of encoded walks, with every random number that the loss needs."""
    plan = recipe.dit
    footage = recipe.dit_footage

    def encode(number: int) -> LatentWalks:
        seeds = (recipe.seed, 3, rank.index, number)
        walks = make_walks(footage.maps, footage.frames, seeds, rank.device)
        return encode_walks(walks, recipe, autoencoder, rank.device)

    library = Library(footage, encode)

    def batch(step: int) -> dict[str, Tensor]:
        random = np.random.default_rng((recipe.seed, 4, rank.index, step))
        held = library.at(step)
        drawn = [
            _clip(held[random.integers(len(held))], plan.frames, random) for _ in range(plan.batch)
        ]
        latents, actions, themes, from_start = zip(*drawn, strict=True)
        clean = torch.stack(latents).float().transpose(1, 2)
        generator = torch.Generator(clean.device).manual_seed(int(random.integers(2**62)))
        eps, context_eps = (
            torch.randn(clean.shape, generator=generator, device=clean.device) for _ in range(2)
        )
        ids, prompt = prompts(torch.stack(themes), words, step >= recipe.open_prompts_from, random)
        weight = torch.ones(plan.batch, plan.frames)
        weight[~torch.tensor(from_start), 0] = 0.0  # nothing leads up to that frame
        rays_shape = (plan.batch, plan.frames, recipe.columns, ACTIONS.ray_dim)
        out = {
            "actions": torch.stack(actions),
            "rays": torch.zeros(*rays_shape),  # not told yet
            "ids": ids,
            "prompt": prompt,
            "weight": weight,
            **_noise_levels(recipe, random),
            "seen": earlier_frames(plan.frames, _windows(plan.batch, plan.frames, random)),
        }
        moved = {key: value.to(rank.device) for key, value in out.items()}
        return {"latents": clean, "eps": eps, "context_eps": context_eps, **moved}

    return batch


def encode_walks(
    walks: Walks, recipe: Recipe, autoencoder: CausalAutoencoder, device: str
) -> LatentWalks:
    """Training walks as the model sees them."""
    rows, frames = walks.themes.shape[:2]
    latents = []
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16):
        at_once = 4 if device == "cpu" else 32
        for row in range(0, rows, at_once):
            pictures = walks.pictures(0, frames, recipe.size, slice(row, row + at_once))
            z = autoencoder.normalised(autoencoder.encode_clip(from_pictures(pictures)))
            latents.append(z.transpose(1, 2).half())
    held = walks.keys.cpu().numpy()
    poses = ACTIONS.reckon(held)
    actions = ACTIONS.actions(held, poses)
    # Cloned out of inference mode, since training differentiates through what it makes of them.
    return LatentWalks(
        torch.cat(latents).clone(),
        torch.from_numpy(actions),
        torch.from_numpy(ACTIONS.rays(poses, recipe.columns)),
        walks.themes.cpu(),
        walks.poses[:, ::PICTURES_PER_LATENT].cpu(),
    )


def _clip(
    walks: LatentWalks, frames: int, random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, bool]:
    row = random.integers(len(walks.latents))
    from_start = random.random() < FROM_START
    first = 0 if from_start else int(random.integers(1, walks.latents.shape[1] - frames + 1))
    part = slice(first, first + frames)
    return walks.latents[row, part], walks.actions[row, part], walks.themes[row, part], from_start


def prompts(
    themes: Tensor, words: WordEncoder, open_ended: bool, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Row numbers of two prompts a clip ``[2B, T]``, and which one each frame reads ``[B, F]``.

    ``open_ended``: half of the prompts lose any share of their words, down to none, so that a
    prompt may leave things open; else each word is lost now and then.
    """
    changed = (themes != themes[:, :1]).any(-1)
    ids = []
    for clip in themes:
        for theme in (clip[0], clip[-1]):
            said = list(Theme.from_indices(tuple(theme.tolist())).words())
            random.shuffle(said)
            share = FORGOTTEN_WORDS
            if open_ended:
                share = random.random() if random.random() < 0.5 else 0.0
            kept = [word for word in said if random.random() >= share]
            ids.append(words.ids(" ".join(kept)))
    which = 2 * torch.arange(len(themes))[:, None] + changed.long()
    return torch.stack(ids), which


def _noise_levels(recipe: Recipe, random: np.random.Generator) -> dict[str, Tensor]:
    shape = (recipe.dit.batch, recipe.dit.frames)
    sigma = shifted(random.random(shape), recipe.shift)
    clip = (recipe.dit.batch, 1)
    noisy = random.random(clip) >= CLEAN_CONTEXT
    context = noisy * recipe.context_noise * random.random(shape)
    told = context * (random.random(clip) >= UNTOLD)
    levels = {"sigma": sigma, "context_sigma": context, "context_told": told}
    return {key: torch.from_numpy(value).float() for key, value in levels.items()}


def _windows(batch: int, frames: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Half of the clips see everything, the others a random number of frames back."""
    return np.where(random.random(batch) < 0.5, frames, random.integers(2, frames, batch))
