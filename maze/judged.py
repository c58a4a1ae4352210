"""What the stages of few steps share: a flow that is learned, and a critic of what comes out."""

from collections.abc import Mapping

from torch import Tensor, nn

from worldsim.maze.critic import Critic, losses
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.words import WordEncoder
from worldsim.schedule import Schedule


class Judged(nn.Module):
    """A DiT with its words and its critic.

    Args:
        schedule: the levels of the rollouts that it trains.
    """

    def __init__(
        self, dit: CausalWanTransformer3DModel, words: WordEncoder, schedule: Schedule
    ) -> None:
        super().__init__()
        self.dit = dit
        self.words = words
        self.critic = Critic(dit.config.in_channels)
        self.criticism = 0.0  # set by each lesson
        self.levels = [(cell.sigma, cell.next_sigma) for cell in schedule.cells(0)]

    def figures(
        self,
        batch: Mapping[str, Tensor],
        x: Tensor,
        sigma: Tensor,
        predicted: Tensor,
        weight: Tensor,
        judged: Tensor,
    ) -> dict[str, Tensor]:
        """The loss and what it is made of; the second half of a batch's clips are own ones.

        Args:
            batch: its ``latents`` are the truth, ``themes`` and ``context_eps`` the critic's.
            x: what the DiT was shown at ``sigma [B, F]``, ``[B, C, F, h, w]``.
            predicted: the flow that it answers.
            weight: of each frame ``[B, F]`` in the flow's loss.
            judged: frames ``[B, F]`` that the critic sees; of the own clips only.
        """
        clean, half = batch["latents"], len(x) // 2
        spread = sigma[:, None, :, None, None]
        error = (predicted - (x - clean) / spread).square().mean(dim=(1, 3, 4)) * weight
        judged = judged.clone()
        judged[:half] = False
        x0 = (x - spread * predicted).transpose(1, 2)
        true, shown = clean.transpose(1, 2)[judged], x0[judged]
        noise = batch["context_eps"].transpose(1, 2)[judged]
        maker, critic = losses(self.critic, true, shown, batch["themes"][judged], noise)
        return {
            "loss": error.sum() / weight.sum() + self.criticism * maker + critic,
            "taught": error[:half].sum() / weight[:half].sum(),
            "own": error[half:].sum() / weight[half:].sum(),
            "maker": maker,
            "critic": critic,
            "detail": detail(shown) / detail(true),
        }


def detail(frames: Tensor) -> Tensor:
    """Spread of the differences of neighbouring latent pixels: what a blur loses."""
    x = frames.detach()
    return (x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean()).sqrt()
