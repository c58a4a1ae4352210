"""Motion recovered from pictures alone, checked on true clips of other maps.

A generated clip has no poses; what it shows of its controls must be read off its pictures. Optical
flow is solved for in closed form on a coarse grid of cells, and a small network, learned here on
true clips in seconds, reads the motion of each latent frame off these flows. It learns from worn
copies of the clips, too, so that it judges motion, not sharpness. Pictures are shrunk to `LATTICE`
samples across first: flow holds for small shifts only, and turning shifts 64 pixels by three.

It does not know how fast something moves. Less than a third of what a held key moves counts as
none, more than two thirds as all; what lies between is neither learned nor counted. Steps to the
side are learned only to be told from turns, which they resemble: there it errs most.

Letters in shapes: B clips, P = 1 + 4·N pictures, N latent frames, S = B·N, F features.
A size is height and width.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from worldsim.maze.layout import short_way
from worldsim.maze.simulator import PICTURES_PER_LATENT, SPEED, TURN, maps, render, trajectory
from worldsim.maze.themes import ALL_THEMES
from worldsim.maze.truth import held_out
from worldsim.maze.walks import HELD_OUT

LATTICE = 32  # samples across a picture; the second scale has half as many
GRID = 4  # cells along a side
UNSURE = 1.0  # squared levels of grey per sample: a gradient below this shows no flow
MAPS = 4  # in every theme
LATENTS = 8
WIDTH = 128  # of the network
EPOCHS = 6
BATCH = 512
RATE = 6e-3
CHECKED = 96, 5  # held-out walks and their latent frames, for the accuracy
LEFT_OUT = -100  # a class that no loss counts


@dataclass(frozen=True)
class Inverse:
    """A network over the flows of one latent frame, scaled by their spread.

    Attributes:
        size: of the pictures that it reads.
        accuracy: shares of turns and of advances read right on other true clips.
    """

    network: nn.Module
    mean: Tensor
    spread: Tensor
    size: tuple[int, int]
    accuracy: tuple[float, float] = (math.nan, math.nan)

    @torch.inference_mode()
    def recover(self, clip: Tensor | NDArray[np.uint8]) -> NDArray[np.int64]:
        """Turn (-1 left, 1 right) and advance (-1 back, 1 forward) of each latent frame ``[N, 2]``
        after the first picture of a clip ``[P, H, W, 3]``.

        Raises:
            ValueError: if the clip has another shape.
        """
        shape = np.shape(clip)
        if shape[1:] != (*self.size, 3) or shape[0] < 2 or shape[0] % PICTURES_PER_LATENT != 1:
            height, width = self.size
            raise ValueError(
                f"motion is recovered from pictures [1 + 4·N, {height}, {width}, 3], "
                f"not from {list(shape)}"
            )
        seen = _flow(_products(_grey(torch.as_tensor(clip)[None]), _lattice(self.size)))
        scores: Tensor = self.network((seen - self.mean) / self.spread)
        return (scores.unflatten(1, (3, 2)).argmax(1) - 1).numpy()


# --- truth ---------------------------------------------------------------------------------------
def labels(poses: Tensor) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What poses ``[…, P, 3]`` did: turn and advance ``[…, N, 2]`` as `Inverse.recover` gives them,
    and which of them are clear enough to count.

    It is what happened, not what was held: walls stop a player."""
    step = poses.double().diff(dim=-2)
    x, y = (short_way(step[..., axis]) for axis in (0, 1))
    turn = (step[..., 2] + math.pi) % (2 * math.pi) - math.pi
    heading = poses[..., 1:, 2].double()  # a player turns first, then moves
    ahead = x * heading.cos() + y * heading.sin()
    moved = torch.stack((turn / TURN, ahead / SPEED), dim=-1)
    share = moved.unflatten(-2, (-1, PICTURES_PER_LATENT)).mean(-2).numpy()
    none, whole = np.abs(share) < 1 / 3, np.abs(share) > 2 / 3
    return np.where(none, 0, np.sign(share)).astype(np.int64), none | whole


# --- flow ----------------------------------------------------------------------------------------
def _lattice(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of samples for pictures of a size; even, as the renderer wants them."""
    return 2 * max(GRID, round(LATTICE * size[0] / size[1] / 2)), LATTICE


def _grey(clips: Tensor) -> Tensor:
    """``[B, P, H, W, 3] → [B, P, H, W]``, 0…255."""
    return clips.float().mean(-1)


def _products(grey: Tensor, samples: tuple[int, int]) -> Tensor:
    """Mean products of the differences along time, x and y in every cell at two scales,
    ``[B, P, H, W] → [S, scale, 6, GRID, GRID]``: all that least squares asks of a picture."""
    scales = []
    for part in (1, 2):
        y = F.adaptive_avg_pool2d(grey, (samples[0] // part, samples[1] // part))
        framed = F.pad((y[:, 1:] + y[:, :-1]) / 2, (1, 1, 1, 1), mode="replicate")
        dt = y.diff(dim=1)
        dx = (framed[..., 1:-1, 2:] - framed[..., 1:-1, :-2]) / 2
        dy = (framed[..., 2:, 1:-1] - framed[..., :-2, 1:-1]) / 2
        pairs = ((dt, dx), (dx, dy), (dt, dy), (dx, dx), (dy, dy), (dt, dt))
        products = torch.stack([a * b for a, b in pairs], dim=2)
        cells = F.adaptive_avg_pool2d(products.flatten(0, 1), GRID)
        scales.append(reduce(cells, "(s four) q i j -> s q i j", "mean", four=PICTURES_PER_LATENT))
    return torch.stack(scales, dim=1)


def _flow(products: Tensor) -> Tensor:
    """Flow along x and y where there are gradients, and shares that tell where: ``[S, F]``."""
    tx, xy, ty, xx, yy, tt = products.unbind(2)
    a, b = xx + UNSURE, yy + UNSURE
    area = a * b - xy.square()
    u, v = (xy * ty - b * tx) / area, (xy * tx - a * ty) / area
    total = xx + yy + UNSURE
    return torch.stack((u, v, xx / total, yy / total, xy / total, tt / (tt + total)), 1).flatten(1)


# --- learning ------------------------------------------------------------------------------------
def learn_inverse(size: tuple[int, int], count: int = MAPS) -> Inverse:
    """Learn from true clips on ``count`` maps in every theme, and check on true walks elsewhere."""
    samples, random = _lattice(size), torch.Generator().manual_seed(0)
    clips, poses = _random_clips(samples, count)
    parts = [_grey(part) for part in clips.split(24)]  # all products at once fill the memory
    true = [_products(part, samples) for part in parts]
    worn = [_products(_worn(part, random), samples) for part in parts]
    moved, clear = (torch.from_numpy(part).flatten(0, 1) for part in labels(poses))
    products, moved = _four_ways(torch.cat(true + worn), moved.repeat(2, 1))
    seen = _flow(products)
    spread, mean = torch.std_mean(seen, dim=0)
    spread += 1e-4
    classes = torch.where(clear.repeat(8, 1), moved + 1, LEFT_OUT)
    learned = Inverse(_fitted((seen - mean) / spread, classes), mean, spread, size)
    return replace(learned, accuracy=_accuracy(learned))


def _random_clips(size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Pictures ``[B, P, h, w, 3]`` and poses ``[B, P, 3]`` under random keys, few aside."""
    themes = torch.tensor([theme.indices() for theme in ALL_THEMES]).repeat(count, 1)
    seed = HELD_OUT + 3_000_000
    mazes = maps(range(seed, seed + len(themes)))
    random = np.random.default_rng(seed)
    shape = (len(themes), 1 + LATENTS)
    turn, ahead = random.integers(-1, 2, (2, *shape))
    aside = random.integers(-1, 2, shape) * (random.random(shape) < 0.45)
    keys = np.stack((ahead > 0, ahead < 0, aside < 0, aside > 0, turn < 0, turn > 0), -1)
    poses = trajectory(mazes, mazes.start, torch.from_numpy(keys))
    return render(mazes, poses, themes[:, None].expand(-1, poses.shape[1], -1), *size), poses


def _worn(grey: Tensor, random: torch.Generator) -> Tensor:
    """Grey clips ``[B, P, h, w]`` as a model may make them: blurred, lighter or darker, noisy."""
    blurred = F.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    light = 1 + 0.1 * torch.randn(len(grey), 1, 1, 1, generator=random)
    noise = 6 * torch.rand(len(grey), 1, 1, 1, generator=random)  # levels
    return blurred * light + noise * torch.randn(grey.shape, generator=random)


def _four_ways(products: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Products and motions of clips, of their mirror images, and of both run backwards."""
    mirrored = products.flip(-1)
    mirrored[:, :, :2] *= -1  # those with one difference along x
    both = torch.cat((products, mirrored))
    moved = torch.cat((moved, moved * torch.tensor([-1, 1])))
    backwards = both.clone()
    backwards[:, :, [0, 2]] *= -1  # those with one difference along t
    return torch.cat((both, backwards)), torch.cat((moved, -moved))


def _fitted(seen: Tensor, classes: Tensor) -> nn.Sequential:
    """The network that reads classes ``[S, 2]`` off scaled flows ``[S, F]``."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(seen.shape[1], WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, 3 * classes.shape[1]),
        )  # fmt: skip
        optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
        orders = [torch.randperm(len(seen)).split(BATCH) for _ in range(EPOCHS)]
    rows = [part for order in orders for part in order]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=len(rows))
    for part in rows:
        scores = network(seen[part]).unflatten(1, (3, -1))
        loss = F.cross_entropy(scores, classes[part], ignore_index=LEFT_OUT)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def _accuracy(learned: Inverse) -> tuple[float, float]:
    truth = held_out(*CHECKED, learned.size, first_seed=4_000_000)
    read = np.stack([learned.recover(truth.pictures(row)) for row in range(len(truth.poses))])
    moved, clear = labels(truth.poses)
    turn, advance = ((read == moved) & clear).sum((0, 1)) / clear.sum((0, 1))
    return float(turn), float(advance)
