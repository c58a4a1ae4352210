"""Prompts over ranks: the first one has the text encoder and reads for all."""

import io
from base64 import b64decode, b64encode
from collections.abc import Iterable

import torch
from torch import Tensor

from worldsim.models.words import TextEncoder, WordEncoder
from worldsim.share import Share
from worldsim.streaming.faults import Store
from worldsim.world import World

LONGEST = 4096  # bytes of a prompt; a header has room for three, beside all else
KEPT = 8  # prompts that stay in the store, beside those that a rank may still ask for


class Telling:
    """A text encoder that tells all other ranks what it reads, through their store.

    Prompts are let go of: the newest ones stay, and those that an order told of which some rank has
    not dealt with yet. So an order `hold`s all that ranks may ask for because of it.
    """

    def __init__(self, encoder: TextEncoder, store: Store, ranks: int) -> None:
        self.length, self.text_dim = encoder.length, encoder.text_dim
        self._encoder, self._store, self._ranks = encoder, store, ranks
        self._there: dict[str, int] = {}  # by prompt the epoch that told of it, the oldest first

    def encode(self, prompt: str) -> Tensor:
        rows, data = self._encoder.encode(prompt), io.BytesIO()
        torch.save(rows.cpu(), data)
        self._store.set(_key(prompt), b64encode(data.getvalue()).decode())
        self._there.setdefault(prompt, 0)
        return rows

    def hold(self, prompts: Iterable[str], epoch: int) -> None:
        """See to it that these can be asked for until every rank has dealt with that epoch."""
        for prompt in prompts:
            if prompt not in self._there:
                self.encode(prompt)
            del self._there[prompt]
            self._there[prompt] = epoch
        if len(self._there) <= KEPT:
            return
        heard = min(heard_of(self._store, rank) for rank in range(1, self._ranks))
        for prompt in list(self._there)[:-KEPT]:
            if self._there[prompt] > heard:
                break
            del self._there[prompt]
            self._store.delete_key(_key(prompt))


def hear(store: Store, rank: int, epoch: int) -> None:
    """A rank has dealt with all that was told up to an epoch."""
    store.set(f"heard/{rank}", str(epoch))


def heard_of(store: Store, rank: int) -> int:
    """The epoch up to which it has; -1: it is not at work yet."""
    key = f"heard/{rank}"
    return int(store.get(key)) if store.check([key]) else -1


def _key(prompt: str) -> str:
    return f"words/{prompt}"


class Told:
    """Stands where a text encoder stands, on ranks that have none."""

    def __init__(self, world: World, store: Store) -> None:
        self.length, self.text_dim = world.config.text_length, world.transformer.config.text_dim
        self._world, self._store = world, store

    def encode(self, prompt: str) -> Tensor:
        data = self._store.get(_key(prompt))  # waits until the first rank has read it
        rows: Tensor = torch.load(io.BytesIO(b64decode(data)), weights_only=True)
        return rows.to(self._world.device)


def check_words(world: World, prompt: str) -> None:
    """Whether a world can read a prompt, and ranks can tell it; its weights need not be there.

    Raises:
        ValueError: as `World.text`; for a prompt that fits no header.
    """
    if len(prompt.encode()) > LONGEST:
        raise ValueError(f"between ranks a prompt has at most {LONGEST} bytes")
    if world.text_encoder is None:
        world.text(prompt)
    elif isinstance(world.text_encoder, WordEncoder):
        world.text_encoder.read(prompt)


def share_words(world: World, store: Store, share: Share) -> Telling | None:
    """Have the first rank's text encoder read for all; there it is returned."""
    if share.ranks > 1 and not share.reads:
        world.text_encoder = Told(world, store)
    elif share.ranks > 1 and world.text_encoder is not None:
        world.text_encoder = telling = Telling(world.text_encoder, store, share.ranks)
        return telling
    return None
