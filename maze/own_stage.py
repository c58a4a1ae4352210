"""Stage three: the DiT goes on from its own frames, in few steps, and learns to remember.

What stage two saw was the truth; what a rollout sees is what it made itself. So half of the clips
here get a context that the model has just made, frame by frame in few steps, and are asked for the
truth all the same (self-forcing, for all frames at once instead of one after the other). Their last
denoising step is also judged by a critic, since the mean of what may come next is a blur. The
other half learns as in stage two, with contexts worn in the ways in which rollouts wear.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from worldsim.maze.clips import Clip, Clips
from worldsim.maze.dit_stage import (
    LatentWalks,
    copies_of,
    encode_walks,
    mixed,
    noisy_flow,
    prompts,
    shifted,
)
from worldsim.maze.fitting import Rank
from worldsim.maze.footage import Library, make_walks
from worldsim.maze.judged import Judged
from worldsim.maze.layout import SIZE
from worldsim.maze.recipe import Lesson, Recipe
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.words import WordEncoder
from worldsim.schedule import Schedule

CLEAN_CONTEXT = 0.3  # share of clips whose context is not worn
ALONE = 0.6  # share of returning clips that see at most two of the frames right before
FINAL = 0.5  # share of an own clip's frames that train the last step of a rollout


class OwnFrames(Judged):
    """Flow matching on true and on own contexts, and a critic of the frames that come out."""

    def __init__(
        self, dit: CausalWanTransformer3DModel, words: WordEncoder, recipe: Recipe
    ) -> None:
        super().__init__(dit, words, Schedule.uniform(recipe.few_steps, recipe.shift))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `own_batches` for the batch; the second half of its clips are own ones."""
        clean, context = batch["latents"], worn(batch)
        half = len(clean) // 2
        text = self.dit.encode_prompt(self.words(batch["ids"]))
        told, sigma = batch["context_told"].clone(), batch["sigma"].clone()
        noisy = mixed(clean, batch["eps"], sigma)

        with torch.no_grad():
            own = slice(half, None)
            flow = partial(
                noisy_flow, self.dit, text, batch, copies_of(self.dit, batch["seen"][own], clean),
                rows=own,
            )  # fmt: skip
            before, said = context[own], told[own]
            *generations, last = batch["own_eps"][:, own]
            given = batch["given"][own]
            for eps in generations:
                made = few_steps(flow, eps, self.levels, before, said)
                before = torch.where(given[:, None, :, None, None], before, made)
                said = said * given
            last = few_steps(flow, last, self.levels[:-1], before, said)
            final = batch["final"][own]
            noisy[own] = torch.where(final[:, None, :, None, None], last, noisy[own])
            sigma[own] = torch.where(final, self.levels[-1][0], sigma[own])
            context = torch.cat((context[:half], before))
            told[own] = said

        copies = copies_of(self.dit, batch["seen"], clean)
        predicted = noisy_flow(self.dit, text, batch, copies, context, told, noisy, sigma)
        weight = batch["weight"]
        judged = batch["final"] & (weight > 0)
        return self.figures(batch, noisy, sigma, predicted, weight, judged)


def few_steps(
    flow: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    levels: Sequence[tuple[float, float]],
    context: Tensor,
    told: Tensor,
) -> Tensor:
    """Every frame as a rollout makes it, through these levels (each with the following one)."""
    for sigma, following in levels:
        level = x.new_full((x.shape[0], x.shape[2]), sigma)
        x = x + (following - sigma) * flow(context, told, x, level)
    return x


def worn(batch: Mapping[str, Tensor]) -> Tensor:
    """The clips' contexts after what rollouts do to them: blur, fade, shift of colour, noise
    (the simulated drift of Helios)."""
    clean = batch["latents"]
    flat = clean.transpose(1, 2).flatten(0, 1)
    padded = F.pad(flat, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, stride=1).unflatten(0, (len(clean), -1)).transpose(1, 2)
    share = batch["blur"][:, None, :, None, None]
    x = (1 - share) * clean + share * blurred
    x = x * batch["gain"][:, :, None, None, None] + batch["offset"][:, :, None, None, None]
    return mixed(x, batch["context_eps"], batch["context_sigma"])


def own_batches(
    recipe: Recipe, lesson: Lesson, rank: Rank, autoencoder: CausalAutoencoder, words: WordEncoder
) -> Callable[[int], dict[str, Tensor]]:
    """Clips as `Clips` draws them, with every random number that the losses need."""
    plan, footage = lesson.fit, lesson.footage
    # Lessons after the first draw footage and numbers of their own.
    place = recipe.lessons.index(lesson)
    seed = recipe.seed if place == 0 else 1000 * place + recipe.seed

    def library(homing_rows: int) -> Library[tuple[LatentWalks, Clips]]:
        def encode(number: int) -> tuple[LatentWalks, Clips]:
            seeds = (seed, 6, rank.index, number)
            made = make_walks(
                footage.maps, footage.frames, seeds, rank.device,
                switches=0.5, homing_rows=homing_rows, drilled=lesson.drilled,
            )  # fmt: skip
            walks = encode_walks(made, recipe, autoencoder, rank.device)
            shares = (lesson.returning, lesson.switching)
            return walks, Clips(walks.poses, walks.themes, plan.frames, SIZE, *shares)

        return Library(footage, encode)

    roaming, homing = library(0), library(footage.maps // 2)

    def batch(step: int) -> dict[str, Tensor]:
        random = np.random.default_rng((seed, 7, rank.index, step))
        held = (homing if step >= lesson.homing_from else roaming).at(step)
        latents, actions, rays, themes, clips = [], [], [], [], []
        for _ in range(plan.batch):
            walks, source = held[random.integers(len(held))]
            clip = source.draw(random)
            latents.append(walks.latents[clip.row, clip.frames])
            actions.append(walks.actions[clip.row, clip.frames])
            rays.append(walks.rays[clip.row, clip.frames])
            themes.append(walks.themes[clip.row, clip.frames])
            clips.append(clip)
        clean = torch.stack(latents).float().transpose(1, 2)
        generator = torch.Generator(clean.device).manual_seed(int(random.integers(2**62)))
        # Two for the clip itself, one for each generation, one for the last step's input.
        drawn = 2 + (1 + int(random.integers(lesson.generations))) + 1
        eps, context_eps, *own_eps = (
            torch.randn(clean.shape, generator=generator, device=clean.device) for _ in range(drawn)
        )
        ids, prompt = prompts(torch.stack(themes), words, True, random)
        out = {
            "actions": torch.stack(actions),
            "rays": torch.stack(rays) * (step >= lesson.rays_from),
            "themes": torch.stack(themes),
            "ids": ids,
            "prompt": prompt,
            **_frames(clips, plan.frames, step >= lesson.alone_from, random),
            **_wear(recipe, clean.shape, random),
        }
        moved = {key: value.to(rank.device) for key, value in out.items()}
        noise = {"eps": eps, "context_eps": context_eps, "own_eps": torch.stack(own_eps)}
        return {"latents": clean, **noise, **moved}

    return batch


def _frames(
    clips: list[Clip], frames: int, alone: bool, random: np.random.Generator
) -> dict[str, Tensor]:
    """What each frame sees, counts for, and whether its place in an own context is given.

    ``alone``: most returning clips see few or none of the frames right before, so that what they
    remember is all they have. Else the frames before would nearly always do, and nobody would learn
    to look further back.
    """
    index = np.arange(frames)
    remembered = np.array([clip.remembered for clip in clips])[:, None]
    from_start = np.array([clip.frames[0] == 0 for clip in clips])[:, None]
    # Remembered frames are given, and so is where a plain stretch begins.
    weight = (index >= remembered) & ((index > 0) | from_start)
    far = random.random(len(clips)) < 0.5
    near = random.integers(3, frames, len(clips))
    window = np.where(far, frames, near)
    if alone:
        lonely = (random.random(len(clips)) < ALONE) & (remembered[:, 0] > 0)
        window = np.where(lonely, random.integers(0, 3, len(clips)), window)
    final = random.random((len(clips), frames)) < FINAL
    final[:, -1] = True  # so that every clip has a frame for the critic
    back = index[:, None] - index[None, :]
    seen = (back > 0) & ((back <= window[:, None, None]) | (index < remembered)[:, None, :])
    return {
        "weight": torch.from_numpy(weight).float(),
        "given": torch.from_numpy(index <= remembered),
        "final": torch.from_numpy(final),
        "seen": torch.from_numpy(seen),
    }


def _wear(recipe: Recipe, shape: tuple[int, ...], random: np.random.Generator) -> dict[str, Tensor]:
    """Noise levels of the frames, and how worn each context is."""
    clips, channels, frames = shape[:3]
    sigma = shifted(random.random((clips, frames)), recipe.shift)
    used = random.random((clips, 1)) >= CLEAN_CONTEXT
    noise = used * recipe.context_noise * random.random((clips, 1)) * random.random((clips, frames))
    blur = used * random.random((clips, 1)) * random.random((clips, frames))
    blur *= random.random((clips, 1)) < 0.5
    wear = {
        "sigma": np.maximum(sigma, 0.02),
        "context_sigma": noise,
        "context_told": noise * (random.random((clips, 1)) >= 0.5),
        "blur": blur,
        "gain": 1 + used * 0.1 * random.standard_normal((clips, channels)),
        "offset": used * 0.07 * random.standard_normal((clips, channels)),
    }
    return {key: torch.from_numpy(value).float() for key, value in wear.items()}
