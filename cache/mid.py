"""The mid partition: what becomes of frames that leave the recent ones, and what is read of them.

A form is two functions. `take` is called once a commit, with the frames that left; it may write new
pages and never touches a committed one. `choose` says what the next block reads. Whatever a later
form does (a learned compressor, a re-encoding, retrieval by meaning), it does here.

Scores are products of un-rotated queries and keys: this package knows no positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from worldsim.cache.camera import Camera
from worldsim.cache.config import POOLED, CacheConfig
from worldsim.cache.policy import Entries, Entry, Mid, Pose, newest
from worldsim.cache.pool import PageKind, PagePool, PageShape

ASKING = 4  # newest frames whose queries say what is asked for (Deep Forcing's R)


class Form(Protocol):
    """How a mid partition works; without state."""

    def needs(self, block_frames: int) -> dict[PageKind, int]:
        """Pages it ever holds beside those of recent frames."""
        ...

    def take(self, mid: Mid, left: Entries, queries: Sequence[Tensor]) -> Mid:
        """The partition after these frames have left the recent ones."""
        ...

    def choose(self, mid: Mid, pose: Pose | None) -> Entries:
        """What the next block reads, given the pose at which it will end."""
        ...

    @property
    def rows(self) -> int:
        """Most tokens that a block reads of it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it ever keeps beside its pages."""
        ...


@dataclass(frozen=True)
class Nothing:
    """Without a mid partition whatever leaves is gone."""

    def needs(self, block_frames: int) -> dict[PageKind, int]:
        return {}

    def take(self, mid: Mid, left: Entries, queries: Sequence[Tensor]) -> Mid:
        return mid

    def choose(self, mid: Mid, pose: Pose | None) -> Entries:
        return ()

    rows = nbytes = 0


@dataclass(frozen=True)
class Pooled:
    """Means of keys and of values over patches of two frames by 2×2 tokens. A frame that waits for
    its second one is not read."""

    pool: PagePool
    config: CacheConfig

    @property
    def kind(self) -> PageKind:
        height, width = pooled_grid(self.pool.shape)
        return PageKind(height * width, self.config.formats[1])

    def needs(self, block_frames: int) -> dict[PageKind, int]:
        recent = PageKind(self.pool.shape.tokens, self.config.formats[2])
        pages = self.config.mid // POOLED + ceil((block_frames + POOLED - 1) / POOLED)
        return {self.kind: pages, recent: POOLED - 1}

    def take(self, mid: Mid, left: Entries, queries: Sequence[Tensor]) -> Mid:
        frames, most = mid.waiting + left, self.config.mid // POOLED
        whole = len(frames) - len(frames) % POOLED
        groups = [frames[first : first + POOLED] for first in range(0, whole, POOLED)]
        made = tuple(self._pooled(group) for group in groups[max(0, len(groups) - most) :])
        return Mid(newest(mid.bank + made, most), waiting=frames[whole:])

    def choose(self, mid: Mid, pose: Pose | None) -> Entries:
        return mid.bank

    @property
    def rows(self) -> int:
        return self.config.mid // POOLED * self.kind.tokens

    nbytes = 0

    def _pooled(self, group: Entries) -> Entry:
        page = self.pool.acquire(self.kind)
        frames = self.pool.read([entry.page for entry in group])
        self.pool.write(page, *(self._mean(x) for x in frames))
        return Entry(group[0].frame, page, span=POOLED)

    def _mean(self, x: Tensor) -> Tensor:
        """``[L, H, frames · h · w, D] → [L, H, patches, D]``."""
        layers, heads = x.shape[:2]
        y = x.float().unflatten(2, (-1, *self.pool.shape.grid)).mean(2)  # over frames
        y = y.permute(0, 1, 4, 2, 3).flatten(0, 1)
        # Patches at an odd edge are smaller: padding does not count.
        y = F.avg_pool2d(y, POOLED, ceil_mode=True, count_include_pad=False)
        return y.flatten(2).transpose(1, 2).unflatten(0, (layers, heads)).to(x.dtype)


@dataclass(frozen=True)
class Participative:
    """The tokens that the newest frames ask for most (Deep Forcing): as many as ``mid`` frames
    have, chosen for each layer, the same for all heads, in the order of time."""

    pool: PagePool
    config: CacheConfig

    @property
    def kind(self) -> PageKind:
        return PageKind(self.config.mid * self.pool.shape.tokens, placed=True)

    def needs(self, block_frames: int) -> dict[PageKind, int]:
        return {self.kind: 2}  # the new one is made while the old one can still be taken back

    def take(self, mid: Mid, left: Entries, queries: Sequence[Tensor]) -> Mid:
        if not left:
            return mid
        source = (*mid.bank, *left)
        asked = torch.stack(list(queries)).float().sum(0)  # the sum over queries of q·k is (Σq)·k
        # Layer by layer: what is compared in float32 is many times what is kept.
        layers = [
            self._best(source, layer, asked[layer]) for layer in range(self.pool.shape.layers)
        ]
        keys, values, places = (torch.stack(part) for part in zip(*layers, strict=True))
        page = self.pool.acquire(self.kind)
        self.pool.write(page, keys, values, places)
        first, tokens = min(entry.frame for entry in source), keys.shape[-2]
        return Mid((Entry(first, page, ceil(tokens / self.pool.shape.tokens), tokens),))

    def choose(self, mid: Mid, pose: Pose | None) -> Entries:
        return mid.bank

    @property
    def rows(self) -> int:
        return self.kind.tokens

    @property
    def nbytes(self) -> int:
        return _query_bytes(self.pool.shape)

    def _best(self, source: Entries, layer: int, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values ``[H, n, D]`` and places ``[n]`` of a layer's tokens that stay."""
        parts = [self._tokens(entry, layer) for entry in source]
        keys, values = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
        places = torch.cat([part[2] for part in parts])
        score = torch.einsum("hd,hnd->n", asked, keys.float())
        # Of equals the older: a sort that is stable gives the same ones everywhere.
        order = score.argsort(descending=True, stable=True)[: self.kind.tokens].sort().values
        return keys[:, order], values[:, order], places[order]

    def _tokens(self, entry: Entry, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values ``[H, n, D]`` and places ``[n]`` of a page's valid tokens."""
        one = slice(layer, layer + 1)
        keys, values = (x[0] for x in self.pool.read((entry.page,), one, entry.tokens))
        if entry.tokens is not None:
            return keys, values, self.pool.places(entry.page)[layer, : entry.tokens]
        per_frame = self.pool.shape.tokens
        places = entry.frame * per_frame + torch.arange(per_frame, device=keys.device)
        return keys, values, places


@dataclass(frozen=True)
class Banked:
    """What forms share that choose ``mid`` frames out of a bank of the newest ones."""

    pool: PagePool
    config: CacheConfig

    def needs(self, block_frames: int) -> dict[PageKind, int]:
        _, mid, recent = self.config.formats
        spare = 0 if mid == recent else block_frames
        return {PageKind(self.pool.shape.tokens, mid): self.config.bank + spare}

    @property
    def rows(self) -> int:
        return self.config.mid * self.pool.shape.tokens

    def _banked(self, mid: Mid, left: Entries) -> Entries:
        """The bank with the frames that left, in its format: quantised now if they were not."""
        kept = newest(left, self.config.bank)
        return newest(mid.bank + tuple(map(self._restored, kept)), self.config.bank)

    def _restored(self, entry: Entry) -> Entry:
        kind = PageKind(self.pool.shape.tokens, self.config.formats[1])
        if self.pool.kind(entry.page) == kind:
            return entry
        page = self.pool.acquire(kind)
        self.pool.write(page, *self.pool.read((entry.page,)))
        return replace(entry, page=page)


@dataclass(frozen=True)
class TopK(Banked):
    """The frames of a bank whose keys the newest frames' queries like best (PackForcing).

    Its score is a mean of q·k over queries, keys and heads, and so the product of the means: all
    of them count here, where PackForcing samples some. Layers are averaged, so that all of them
    read the same frames. It changes only at a commit, so it is the same for a whole block.
    """

    def take(self, mid: Mid, left: Entries, queries: Sequence[Tensor]) -> Mid:
        summed = tuple(replace(entry, summary=self._mean_key(entry)) for entry in left)
        bank = self._banked(mid, summed)
        if not queries or not bank:
            return Mid(bank)
        asked = torch.stack(list(queries)).float().mean(0)
        keys = torch.stack([entry.summary for entry in bank if entry.summary is not None])
        score = torch.einsum("lhd,nlhd->n", asked, keys).tolist()
        return Mid(bank, chosen=_best(bank, score, self.config.mid))

    def choose(self, mid: Mid, pose: Pose | None) -> Entries:
        return mid.chosen

    @property
    def nbytes(self) -> int:
        # A mean key for each page of the bank, those of a block that can be taken back included.
        return _query_bytes(self.pool.shape, ASKING + self.config.bank + self.config.mid)

    def _mean_key(self, entry: Entry) -> Tensor:
        return self.pool.keys(entry.page).float().mean(-2)


@dataclass(frozen=True)
class Posed(Banked):
    """The frames of a bank that share most of what a camera at the coming pose sees."""

    camera: Camera

    def take(self, mid: Mid, left: Entries, queries: Sequence[Tensor]) -> Mid:
        return Mid(self._banked(mid, left))

    def choose(self, mid: Mid, pose: Pose | None) -> Entries:
        known = tuple(entry for entry in mid.bank if entry.pose is not None)
        if pose is None or not known:
            return ()
        score = self.camera.overlap(pose, [entry.pose for entry in known if entry.pose is not None])
        return _best(known, score.tolist(), self.config.mid)

    nbytes = 0


def make_form(pool: PagePool, config: CacheConfig, camera: Camera | None) -> Form:
    """The form that a configuration asks for; see `check_form` for what is refused."""
    check_form(config, camera)
    if camera is not None and config.form == "pose":
        return Posed(pool, config, camera)
    made: dict[str, Callable[[PagePool, CacheConfig], Form]] = {
        "pool": Pooled, "participative": Participative, "topk": TopK,
    }  # fmt: skip
    return made[config.form](pool, config) if config.form else Nothing()


def check_form(config: CacheConfig, camera: Camera | None) -> None:
    """Refuse what a world with this camera cannot do.

    Raises:
        ValueError: for retrieval by pose without poses.
    """
    if config.form == "pose" and camera is None:
        raise ValueError(
            "cache: mid=…:pose needs a world whose controls give a pose and a field of view"
        )


def pooled_grid(shape: PageShape) -> tuple[int, int]:
    """Patches of two pooled frames, (height, width)."""
    height, width = shape.grid
    return ceil(height / POOLED), ceil(width / POOLED)


def _query_bytes(shape: PageShape, count: int = ASKING) -> int:
    """Of so many float32 means over the tokens of a frame."""
    return 4 * count * shape.layers * shape.heads * shape.head_dim


def _best(entries: Entries, score: list[float], most: int) -> Entries:
    """The best ones in the order of time; of equals the newer."""
    order = sorted(range(len(entries)), key=lambda i: (-score[i], -entries[i].frame))
    return tuple(sorted((entries[i] for i in order[:most]), key=lambda entry: entry.frame))
