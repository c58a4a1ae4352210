"""Worlds of random weights, to measure: their pictures mean nothing.

`medium` is for speed: the bundled maze is so small that a good part of its time is spent between
the matrix products; this one is of the size at which the products decide: 112 GFLOP a block (112
tokens a latent frame, 3 latent frames a block, 21 in the window, 4 steps and the context pass).
`tiny` is for time: it makes thousands of blocks in a minute. They are made in code, always with the
same weights; no file holds them.
"""

from dataclasses import dataclass

import torch

from worldsim.bundle import auto_dtype, check_device
from worldsim.config import WorldConfig
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.words import WordEncoder
from worldsim.world import World

SEED = 0
WORD = "noise"  # all that this world understands


@dataclass(frozen=True)
class Sizes:
    """What decides how much work a block is; pictures in pixels, the window in latent frames."""

    name: str = "medium"
    height: int = 128
    width: int = 224
    block_frames: int = 3
    window: int = 21
    steps: int = 4
    layers: int = 8
    heads: int = 6
    head_dim: int = 64
    ffn_dim: int = 1536
    text_dim: int = 64
    text_length: int = 512
    latent_channels: int = 16
    widths: tuple[int, int, int] = (112, 80, 48)


MEDIUM = Sizes()
TINY = Sizes(
    name="tiny", height=32, width=48, block_frames=1, window=12, steps=1, layers=2, heads=2,
    head_dim=16, ffn_dim=64, text_length=8, latent_channels=4, widths=(16, 16, 16),
)  # fmt: skip
MADE = {sizes.name: sizes for sizes in (MEDIUM, TINY)}


def random_world(sizes: Sizes, dtype: torch.dtype | str, device: str) -> World:
    """A world of these sizes with seeded random weights; ``dtype`` may be ``"auto"``.

    Raises:
        ValueError: for a device that is not there, or sizes that do not fit together.
    """
    place = check_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        autoencoder = CausalAutoencoder(sizes.latent_channels, sizes.widths)
        words = WordEncoder((WORD,), text_dim=sizes.text_dim, length=sizes.text_length)
        transformer = CausalWanTransformer3DModel(
            num_attention_heads=sizes.heads,
            attention_head_dim=sizes.head_dim,
            in_channels=sizes.latent_channels,
            out_channels=sizes.latent_channels,
            text_dim=sizes.text_dim,
            ffn_dim=sizes.ffn_dim,
            num_layers=sizes.layers,
        )
    models = (transformer, autoencoder, words)
    for model in models:
        model.eval().requires_grad_(False)
    config = WorldConfig(
        name=sizes.name,
        height=sizes.height,
        width=sizes.width,
        block_frames=sizes.block_frames,
        steps=sizes.steps,
        cache=f"window={sizes.window}",
        prompt=WORD,
    )
    return World(config, *models).to(place, auto_dtype(place) if isinstance(dtype, str) else dtype)
