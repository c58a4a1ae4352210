"""The critic of stage three: tells latent frames of the world from those that the DiT made."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from worldsim.maze.themes import ATTRIBUTES

PROBE = 0.05  # size of the noise by which the critic's slope is measured


class Critic(nn.Module):
    """A score for each latent frame ``[n, C, h, w]`` of a known theme ``[n, 4]``."""

    def __init__(self, channels: int, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
        )
        self.head = nn.Linear(2 * width, 1)
        self.theme_embeddings = nn.ModuleList(
            nn.Embedding(len(words), 2 * width) for words in ATTRIBUTES
        )

    def forward(self, frames: Tensor, themes: Tensor) -> Tensor:
        features = self.layers(frames).mean((-1, -2))
        theme = sum(
            embedding(index)
            for embedding, index in zip(self.theme_embeddings, themes.unbind(-1), strict=True)
        )
        return self.head(features)[:, 0] + (features * theme).mean(-1)


def losses(
    critic: Critic, true: Tensor, made: Tensor, themes: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The maker's loss and the critic's own, both to be minimised in one backward pass.

    ``true``, ``made`` and ``noise`` are ``[n, C, h, w]``; pairs share their theme ``[n, 4]``.

    A relativistic pair loss with a penalty on the critic's slope at both (R3GAN; the slope by
    finite differences, as in Seaweed-APT): without the penalty such a pair does not converge.
    """
    fixed = {name: value.detach() for name, value in critic.named_parameters()}
    judged = functional_call(critic, fixed, (torch.cat((made, true)), themes.repeat(2, 1)))
    made_score, true_score = judged.float().chunk(2)
    maker = F.softplus(true_score - made_score).mean()

    both = torch.cat((made.detach(), true))
    nudged = both + PROBE * noise.repeat(2, 1, 1, 1)
    score, near = critic(torch.cat((both, nudged)), themes.repeat(4, 1)).float().chunk(2)
    made_score, true_score = score.chunk(2)
    slope = ((score - near) / PROBE).square().mean()
    return maker, F.softplus(made_score - true_score).mean() + slope
