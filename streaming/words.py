"""Prompts over ranks: the first one has the text encoder and reads for all."""

import io
from base64 import b64decode, b64encode

import torch
from torch import Tensor

from worldsim.models.words import TextEncoder, WordEncoder
from worldsim.share import Share
from worldsim.streaming.faults import Store
from worldsim.world import World


class Telling:
    """A text encoder that tells all other ranks what it reads."""

    def __init__(self, encoder: TextEncoder, store: Store) -> None:
        self.length, self.text_dim = encoder.length, encoder.text_dim
        self._encoder, self._store = encoder, store

    def encode(self, prompt: str) -> Tensor:
        rows, data = self._encoder.encode(prompt), io.BytesIO()
        torch.save(rows.cpu(), data)
        self._store.set(f"words/{prompt}", b64encode(data.getvalue()).decode())
        return rows


class Told:
    """Stands where a text encoder stands, on ranks that have none."""

    def __init__(self, world: World, store: Store) -> None:
        self.length, self.text_dim = world.config.text_length, world.transformer.config.text_dim
        self._world, self._store = world, store

    def encode(self, prompt: str) -> Tensor:
        data = self._store.get(f"words/{prompt}")  # waits until the first rank has read it
        rows: Tensor = torch.load(io.BytesIO(b64decode(data)), weights_only=True)
        return rows.to(self._world.device)


def check_words(world: World, prompt: str) -> None:
    """Whether a world can read a prompt; its weights need not be there.

    Raises:
        ValueError: as `World.text`.
    """
    if world.text_encoder is None:
        world.text(prompt)
    elif isinstance(world.text_encoder, WordEncoder):
        world.text_encoder.read(prompt)


def share_words(world: World, store: Store, share: Share) -> None:
    """Have the first rank's text encoder read for all."""
    if share.ranks == 1:
        return
    if not share.reads:
        world.text_encoder = Told(world, store)
    elif world.text_encoder is not None:
        world.text_encoder = Telling(world.text_encoder, store)
