"""The page pool: where the K/V of committed and staged latent frames lives.

A page holds keys *before* RoPE and values, of every layer, for some tokens: those of one latent
frame, or what a mid form made of several. Pages are allocated in slabs when a session opens and
recycled for ever after, so a running stream allocates nothing. Reference counts let several page
tables share a page (copy-on-write).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from worldsim.cache.codec import CODECS, group_size
from worldsim.cache.config import FULL


@dataclass(frozen=True)
class PageShape:
    """Geometry of the model: ``grid`` is the tokens of a latent frame, (height, width)."""

    layers: int
    heads: int
    grid: tuple[int, int]
    head_dim: int

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class PageKind:
    """What a page can hold.

    Attributes:
        tokens: at most so many.
        format: ``full`` or the name of a codec.
        placed: each token of each layer says itself which one of the stream it is.
    """

    tokens: int
    format: str = FULL
    placed: bool = False


Needs = Mapping[PageKind, int]  # pages of each kind


def layer_axes(kind: PageKind) -> tuple[int, ...]:
    """Of each of a page's `PagePool.tensors`, the dimension that counts its layers."""
    return (1,) * (1 if kind.format == FULL else 2) + (0,) * kind.placed


class _Page(NamedTuple):
    """Tensors of one page, views of its slab. ``[2, layers, heads, …]`` holds keys, then values."""

    kind: PageKind
    codes: Tensor  # [2, layers, heads, tokens, head_dim], or packed
    scales: Tensor | None  # [2, layers, heads, groups, head_dim]
    places: Tensor | None  # [layers, tokens]


class PagePool:
    """Reference-counted pages of several kinds; a page's number is unique among all."""

    def __init__(self, shape: PageShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.frame = PageKind(shape.tokens)  # one latent frame as it is
        self._slabs: list[Tensor] = []
        self._pages: list[_Page] = []
        self._count: list[int] = []
        self._writes: list[int] = []
        self._free: dict[PageKind, list[int]] = defaultdict(list)
        self._made: dict[PageKind, int] = defaultdict(int)
        self._promised: dict[PageKind, int] = defaultdict(int)
        self._lock = Lock()  # streams of one world may run on threads of their own
        self._later: SimpleQueue[Callable[[PagePool], None]] = SimpleQueue()

    @property
    def nbytes(self) -> int:
        """Bytes really allocated."""
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def free_pages(self) -> int:
        self._collect()
        return sum(map(len, self._free.values()))

    @property
    def used_pages(self) -> int:
        return len(self._pages) - self.free_pages

    def page_nbytes(self, kind: PageKind) -> int:
        """Bytes of one page."""
        return sum(
            torch.Size(size).numel() * dtype.itemsize for size, dtype in self._tensors(kind, 1)
        )

    def addresses(self) -> tuple[tuple[int, int], ...]:
        """(address, bytes) of every slab: constant while a stream runs."""
        return tuple((slab.data_ptr(), slab.nbytes) for slab in self._slabs)

    def reserve(self, needs: Needs) -> None:
        """Promise pages to a session, allocating one slab for what is missing of each kind.

        A session keeps to its promise, so that nothing is allocated while it runs.

        Raises:
            ValueError: where there is no memory for them.
        """
        self._collect()
        with self._lock:
            for kind, pages in needs.items():
                self._grow(kind, self._promised[kind] + pages - self._made[kind])
            for kind, pages in needs.items():
                self._promised[kind] += pages

    def give_back(self, needs: Needs) -> None:
        """End a promise of `reserve`; the memory stays for the next session."""
        with self._lock:
            for kind, pages in needs.items():
                self._promised[kind] -= pages

    def acquire(self, kind: PageKind) -> int:
        """Take a free page (one reference). Grows the pool only where nobody reserved enough."""
        self._collect()
        with self._lock:
            if not self._free[kind]:
                self._grow(kind, 1)
            page = self._free[kind].pop()
            self._count[page] = 1
            self._writes[page] += 1
            return page

    def version(self, page: int) -> tuple[int, int]:
        """Names what a page holds: it changes when the page is recycled, so copies can tell."""
        return page, self._writes[page]

    def retain(self, page: int) -> None:
        """Add a reference to a page in use."""
        with self._lock:
            assert self._count[page] > 0, f"page {page} is not in use"
            self._count[page] += 1

    def release(self, page: int) -> None:
        """Drop a reference; the last one frees the page."""
        with self._lock:
            assert self._count[page] > 0, f"page {page} is not in use"
            self._count[page] -= 1
            if self._count[page] == 0:
                self._free[self._pages[page].kind].append(page)

    def later(self, give_back: Callable[["PagePool"], None]) -> None:
        """Have pages given back to this pool some time before one is next asked for.

        For finalizers: garbage is collected anywhere, also while this very thread holds the lock.
        """
        self._later.put(give_back)

    def _collect(self) -> None:
        while not self._later.empty():
            with suppress(Empty):  # another thread was faster
                self._later.get_nowait()(self)

    # --- what is in them --------------------------------------------------------------------------
    def kind(self, page: int) -> PageKind:
        return self._pages[page].kind

    def write(self, page: int, keys: Tensor, values: Tensor, places: Tensor | None = None) -> None:
        """Fill a page, once after each `acquire`; a codec rounds here and nowhere else.

        Args:
            keys, values: ``[layers, heads, n, head_dim]``, un-rotated, n ≤ the kind's tokens (a
                quantised page must be filled whole).
            places: for a placed page, ``frame · tokens of a frame + token``, int64 ``[layers, n]``.
        """
        held, n = self._pages[page], keys.shape[-2]
        both = torch.stack((keys, values))
        if held.scales is None:
            held.codes[..., :n, :] = both
        else:
            codes, scales = CODECS[held.kind.format].encode(both)
            held.codes.copy_(codes)
            held.scales.copy_(scales)
        if held.places is not None and places is not None:
            held.places[:, :n] = places

    def read(
        self, pages: Sequence[int], layers: slice = slice(None), tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of pages of one kind, side by side, ``[layers, heads, n · tokens, D]``.

        ``tokens``: of each page, only so many.
        """
        held = [self._pages[page] for page in pages]
        codes = _joined([page.codes[:, layers] for page in held])
        if held[0].scales is not None:
            scales = _joined([page.scales[:, layers] for page in held if page.scales is not None])
            codes = CODECS[held[0].kind.format].decode(codes, scales, self.dtype)
        keys, values = codes[..., :tokens, :].flatten(-3, -2)
        return keys, values

    def keys(self, page: int) -> Tensor:
        """Un-rotated keys of a page, ``[layers, heads, tokens, head_dim]``."""
        return self.read((page,))[0]

    def values(self, page: int) -> Tensor:
        """Values of a page, ``[layers, heads, tokens, head_dim]``."""
        return self.read((page,))[1]

    def places(self, page: int) -> Tensor:
        """Of a placed page, see `write`: ``[layers, tokens]``."""
        places = self._pages[page].places
        assert places is not None, f"page {page} has no places of its own"
        return places

    def tensors(self, page: int) -> tuple[Tensor, ...]:
        """All that a page holds, as it is stored; `adopt` takes them back."""
        held = self._pages[page]
        return tuple(x for x in (held.codes, held.scales, held.places) if x is not None)

    def adopt(self, page: int, tensors: Sequence[Tensor]) -> None:
        """Fill a page of the same kind with what `tensors` gave, to the bit.

        Raises:
            ValueError: where they do not fit.
        """
        own = self.tensors(page)
        if [(x.shape, x.dtype) for x in own] != [(x.shape, x.dtype) for x in tensors]:
            raise ValueError("a saved page does not fit this world")
        for mine, theirs in zip(own, tensors, strict=True):
            mine.copy_(theirs)

    # --- memory -----------------------------------------------------------------------------------
    def _tensors(self, kind: PageKind, pages: int) -> Iterable[tuple[tuple[int, ...], torch.dtype]]:
        s = self.shape
        lead = (pages, 2, s.layers, s.heads)
        if kind.format == FULL:
            yield (*lead, kind.tokens, s.head_dim), self.dtype
        else:
            codec = CODECS[kind.format]
            yield (*lead, kind.tokens, codec.width(s.head_dim)), torch.uint8
            yield (*lead, kind.tokens // group_size(kind.tokens), s.head_dim), torch.float16
        if kind.placed:
            yield (pages, s.layers, kind.tokens), torch.int64

    def _grow(self, kind: PageKind, missing: int) -> None:
        if missing <= 0:
            return
        # Zeros, not empty: the memory is touched now, so a stream's resident size is flat at once.
        try:
            slabs = [
                torch.zeros(size, dtype=dtype, device=self.device)
                for size, dtype in self._tensors(kind, missing)
            ]
        except RuntimeError:  # what torch raises where memory ends
            gib = missing * self.page_nbytes(kind) / 2**30
            raise ValueError(
                f"cache: no memory for {missing} pages ({gib:.1f} GiB): keep fewer latent frames"
            ) from None
        self._slabs += slabs
        self._made[kind] += missing
        places = slabs.pop() if kind.placed else None
        codes, *scales = slabs
        for index in range(missing):
            self._free[kind].append(len(self._pages))
            self._pages.append(_Page(
                kind,
                codes[index],
                scales[0][index] if scales else None,
                None if places is None else places[index],
            ))  # fmt: skip
            self._count.append(0)
            self._writes.append(0)


def _joined(parts: list[Tensor]) -> Tensor:
    """``n × [2, L, H, T, D] → [2, L, H, n, T, D]``."""
    return torch.stack(parts, dim=3) if len(parts) > 1 else parts[0].unsqueeze(3)
