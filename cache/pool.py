"""The page pool: where the K/V of committed and staged latent frames lives.

A page is one latent frame of one level: keys *before* RoPE and values, of every layer. Pages are
allocated in slabs when a session opens and recycled for ever after, so a running stream allocates
nothing. Reference counts let several page tables share a page (copy-on-write).
"""

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageShape:
    """Geometry of one page; bytes per element follow from the pool's dtype."""

    layers: int
    heads: int
    tokens: int
    head_dim: int


class PagePool:
    """Reference-counted pages of ``[2, layers, heads, tokens, head_dim]`` (keys, values)."""

    def __init__(self, shape: PageShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self._slabs: list[Tensor] = []
        self._pages: list[Tensor] = []
        self._count: list[int] = []
        self._writes: list[int] = []
        self._free: list[int] = []
        self._promised = 0
        self._lock = Lock()  # streams of one world may run on threads of their own

    @property
    def nbytes(self) -> int:
        """Bytes really allocated."""
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        shape = self.shape
        numbers = 2 * shape.layers * shape.heads * shape.tokens * shape.head_dim
        return numbers * self.dtype.itemsize

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return len(self._pages) - len(self._free)

    def addresses(self) -> tuple[tuple[int, int], ...]:
        """(address, bytes) of every slab: constant while a stream runs."""
        return tuple((slab.data_ptr(), slab.nbytes) for slab in self._slabs)

    def reserve(self, pages: int) -> None:
        """Promise ``pages`` to a session, allocating one slab for what is missing.

        A session keeps to its promise, so that nothing is allocated while it runs.
        """
        with self._lock:
            self._promised += pages
            self._grow(self._promised - len(self._pages))

    def give_back(self, pages: int) -> None:
        """End a promise of `reserve`; the memory stays for the next session."""
        with self._lock:
            self._promised -= pages

    def _grow(self, missing: int) -> None:
        if missing <= 0:
            return
        s = self.shape
        # Zeros, not empty: the memory is touched now, so a stream's resident size is flat at once.
        slab = torch.zeros(
            (missing, 2, s.layers, s.heads, s.tokens, s.head_dim),
            dtype=self.dtype,
            device=self.device,
        )
        self._slabs.append(slab)
        for page in slab.unbind(0):
            self._free.append(len(self._pages))
            self._pages.append(page)
            self._count.append(0)
            self._writes.append(0)

    def acquire(self) -> int:
        """Take a free page (one reference). Grows the pool only where nobody reserved enough."""
        with self._lock:
            if not self._free:
                self._grow(1)
            page = self._free.pop()
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
                self._free.append(page)

    def keys(self, page: int) -> Tensor:
        """Un-rotated keys of a page, ``[layers, heads, tokens, head_dim]`` (a view)."""
        return self._pages[page][0]

    def values(self, page: int) -> Tensor:
        """Values of a page, ``[layers, heads, tokens, head_dim]`` (a view)."""
        return self._pages[page][1]
