"""A stage for TPP's rule: every step reads what earlier frames left behind at its own level.

Nobody reads a finished frame there, but for those that were given. So a clip goes through the
model once, all of its frames at one level and each seeing the earlier ones: that is what one rank
of a rollout computes, for all frames at once. Level by level it is a whole rollout, and half of the
clips learn on their own one, which in `worldsim.maze.own_stage` could only be approached. Their
last step is judged by a critic; the other half goes on from the truth at any level.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from worldsim.maze.dit_stage import Text, mixed
from worldsim.maze.fitting import Rank
from worldsim.maze.judged import Judged
from worldsim.maze.own_stage import own_batches
from worldsim.maze.recipe import Lesson, Recipe
from worldsim.models.attention import MATMUL
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.models.context import ClipContext
from worldsim.models.transformer import Conditioning
from worldsim.models.words import WordEncoder

RULE = "lag0"  # the one that this stage trains
UNLED = 0.4  # share of the clips from a walk's start of which no frame is given
MOST_GIVEN = 5  # frames, of clips that remember none


class SameLevel(Judged):
    """Flow matching on true and on own clips, all frames at one level, and a critic."""

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `rule_batches` for the batch; the second half of its clips are own ones."""
        clean, given = batch["latents"], batch["given"]
        half, frames = len(clean) // 2, clean.shape[2]
        text = self.dit.encode_prompt(self.words(batch["ids"]))
        level = batch["level"][half:]
        with torch.no_grad():
            own = slice(half, None)
            made = self.rollout(text, batch, batch["own_eps"][0, own], own)[:-1]
            inputs = torch.stack(made)[level, torch.arange(len(level), device=level.device)]
        taught_sigma = batch["sigma"][:half, :1]
        own_sigma = clean.new_tensor([sigma for sigma, _ in self.levels])[level, None]
        sigma = torch.cat((taught_sigma, own_sigma)).expand(-1, frames)
        taught = mixed(clean[:half], batch["eps"][:half], sigma[:half])
        x = _with_given(torch.cat((taught, inputs)), clean, given)

        predicted = self.flow(text, batch, x, sigma)
        judged = ~given
        judged[half:] &= (level == len(self.levels) - 1)[:, None]
        return self.figures(batch, x, sigma, predicted, (~given).float(), judged)

    def rollout(
        self, text: Text, batch: Mapping[str, Tensor], eps: Tensor, rows: slice = slice(None)
    ) -> list[Tensor]:
        """The frames of some ``rows`` of a batch as a rollout makes them out of ``eps``: the input
        of every level, and the finished clips, each ``[B, C, F, h, w]``."""
        clean, given = batch["latents"][rows], batch["given"][rows]
        x = [_with_given(eps, clean, given)]
        for sigma, following in self.levels:
            level = eps.new_full((eps.shape[0], eps.shape[2]), sigma)
            moved = x[-1] + (following - sigma) * self.flow(text, batch, x[-1], level, rows)
            x.append(_with_given(moved, clean, given))
        return x

    def flow(
        self,
        text: Text,
        batch: Mapping[str, Tensor],
        x: Tensor,
        sigma: Tensor,
        rows: slice = slice(None),
    ) -> Tensor:
        """Flow of clips ``x`` at ``sigma [B, F]``, float32; given frames are told as clean."""
        seen, given = batch["seen"][rows], batch["given"][rows]
        index = torch.arange(x.shape[2], device=x.device)
        config = self.dit.config
        context = ClipContext(
            seen | (index[:, None] == index),
            index,
            self.dit.grid(*x.shape[-2:]),
            config.attention_head_dim,
            backend=MATMUL,
        )
        conditioning = Conditioning(
            *text,
            prompt=batch["prompt"][rows],
            actions=batch["actions"][rows],
            rays=batch["rays"][rows],
        )
        timestep = 1000 * torch.where(given, torch.zeros_like(sigma), sigma)
        return self.dit(x, timestep, conditioning, context).float()


def _with_given(x: Tensor, clean: Tensor, given: Tensor) -> Tensor:
    return torch.where(given[:, None, :, None, None], clean, x)


def rule_batches(
    recipe: Recipe, lesson: Lesson, rank: Rank, autoencoder: CausalAutoencoder, words: WordEncoder
) -> Callable[[int], dict[str, Tensor]]:
    """Clips as `own_batches` draws them; which frames are given, and the level of each clip.

    Remembered frames are given; so are the first few of all others, or none where a walk begins.
    """
    drawn = own_batches(recipe, lesson, rank, autoencoder, words)

    def batch(step: int) -> dict[str, Tensor]:
        random = np.random.default_rng((recipe.seed, 8, rank.index, step))
        out = drawn(step)
        # What own contexts are given ends at the first frame that one has to make.
        remembered = out["given"].sum(1).cpu().numpy() - 1
        clips, frames = out["given"].shape
        first = random.integers(1, min(MOST_GIVEN, frames - 1) + 1, clips)
        led = (out["weight"][:, 0] == 0).cpu().numpy() | (random.random(clips) >= UNLED)
        count = np.where(remembered > 0, remembered, first * led)
        given = np.arange(frames) < count[:, None]
        level = random.integers(0, recipe.few_steps, clips)
        level[-1] = recipe.few_steps - 1  # so that there is something for the critic
        return {
            **out,
            "given": torch.from_numpy(given).to(rank.device),
            "level": torch.from_numpy(level).to(rank.device),
        }

    return batch
