"""The cached path of self-attention: one session's pages, rotated for the current block.

Keys and values lie in a preallocated buffer, seen as ``[H, own + context, D]``: the block's own
rows first, then those of each page that the plan reads. So the own rows have a fixed address, and a
filling context only lengthens a slice. In memory rows come before heads, which makes every slice's
strides the same: a compiled pass fits all lengths and capacities. Where nothing is compiled, a CPU
has one head after the other, as its attention reads them: up to a sixth faster.

Two modes. With pages in full each layer has a buffer of its own, in which a page is written again
only when it, its position or its place in the buffer changes (fastest). With quantised pages all
layers share one buffer, which each layer fills for itself out of the codes (least memory: whole
copies of all layers would be larger than what quantising saves).

`Ahead` is the same view one block later, for a pass that commits a block and begins the next one.

Shapes: L layers, H heads, N tokens of the own frames, D head size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldsim.cache.context import Context
from worldsim.cache.policy import Pose, Read, ReadPlan, Table
from worldsim.models.attention import NATIVE, attention
from worldsim.models.placement import placed, placement
from worldsim.models.rope import rotate, rotation, token_positions

ROTATED = 1 << 22  # numbers at a time: more take no less time, and all of a large model's are many
DECODED = 4  # pages at a time: what they are decoded through is several times what they become


@dataclass(frozen=True)
class Run:
    """Pages of one kind that lie side by side in the buffer.

    Attributes:
        rows: of the buffer, counted from the first row after the own ones.
        rotation: their keys' cosine and sine, ``[tokens, D / 2]``; None where layers hold different
            tokens.
    """

    reads: tuple[Read, ...]
    rows: slice
    rotation: tuple[Tensor, Tensor] | None


Content = tuple[tuple[int, int], float, int]  # (page version, position, first row)


class ContextView:
    """What the passes of a session read and stage; see the module docstring."""

    def __init__(
        self, context: Context, block_frames: int, backend: str = NATIVE, by_head: bool = False
    ) -> None:
        self.context = context
        self.backend = backend
        self._by_head = by_head  # in memory; no result depends on it
        # See `worldsim.models.context.Attends`. A mere bool: compiled code looks no further.
        self.asks = context.config.asks
        shape = context.pool.shape
        self._own = block_frames * shape.tokens
        self._shared = context.config.quantised
        self._written: dict[int, Content] = {}  # by first row
        self._runs: tuple[Run, ...] = ()  # of the current block, where layers share a buffer
        self._allocate(self.rows_needed(context, block_frames))
        staging = (shape.heads, self._own, shape.head_dim)
        self.staging = [
            [self._zeros(staging) for _ in range(shape.layers)] for _ in range(2 + self.asks)
        ]
        self.own_rotation: tuple[Tensor, Tensor] | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @staticmethod
    def rows_needed(context: Context, block_frames: int) -> int:
        """Most tokens of the context that a block reads (at first, where there is no most)."""
        capacity = context.config.capacity
        kept = block_frames if capacity is None else capacity
        return kept * context.pool.shape.tokens + context.form.rows

    @staticmethod
    def bytes_needed(context: Context, block_frames: int) -> int:
        """What `nbytes` will be (at first, where nothing is ever evicted)."""
        pool = context.pool
        own = block_frames * pool.shape.tokens
        copies = 1 if context.config.quantised else pool.shape.layers
        rows = 2 * copies * (own + ContextView.rows_needed(context, block_frames))
        staged = (2 + context.config.asks) * pool.shape.layers * own
        numbers = (rows + staged) * pool.shape.heads * pool.shape.head_dim
        return numbers * pool.dtype.itemsize + ContextView._rotation_bytes(context, own)

    @staticmethod
    def _rotation_bytes(context: Context, own: int) -> int:
        """Of cosines and sines, in float32: own rows, and where they are kept, those of pages."""
        shape = context.pool.shape
        kept = ContextView.rows_needed(context, own // shape.tokens)
        rows = own + (kept if context.config.quantised else 0)
        return 4 * rows * shape.head_dim

    @staticmethod
    def bytes_per_frame(context: Context) -> int:
        """What each further frame of a context without bounds adds."""
        shape, itemsize = context.pool.shape, context.pool.dtype.itemsize
        copies = 1 if context.config.quantised else shape.layers
        return 2 * copies * shape.tokens * shape.heads * shape.head_dim * itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the rotated copies, of the staging rows, and of rotations at their most."""
        buffers = {id(x): x.nbytes for x in (*self._keys, *self._values)}
        staging = sum(x.nbytes for part in self.staging for x in part)
        return sum(buffers.values()) + staging + self._rotation_bytes(self.context, self._own)

    def addresses(self) -> tuple[int, ...]:
        """Where the rotated copies lie: constant while a stream runs."""
        return tuple(x.data_ptr() for x in (*self._keys, *self._values))

    def prepare(self, start: int, frames: int, pose: Pose | None = None) -> None:
        """Bring the buffers up to date for the block at absolute frame ``start``; once per block.

        Raises:
            ValueError: if the block has more frames than the view was made for.
        """
        own = frames * self.context.pool.shape.tokens
        if own > self._own:
            held = self._own // self.context.pool.shape.tokens
            raise ValueError(
                f"a block of {frames} latent frames does not fit this session, which was opened "
                f"for {held}"
            )
        plan = self.context.plan(start, frames, pose)
        layout, read = self._layout(plan)
        if read > self._capacity:
            self._allocate(2 * read)  # only where nothing is ever evicted
        if self._shared:
            self._runs = tuple(self._grouped(layout))
        else:
            wanted, stale = self._wanted(layout)
            self._written = {}  # until all are there: it may be broken off
            for run in self._grouped(stale):
                self._fill_all(run)
            self._written = wanted
        self.keys, self.values, self.own_rotation = self._seen(own, read, plan)

    def ahead(self, table: Table, committed: range, pose: Pose | None = None) -> "Ahead | None":
        """How the block after the one that this view is prepared for will see its context.

        Args:
            table: as it will be then, see `Context.foresee`.
            committed: the frames of this view's block; the next one has as many.
            pose: as in `prepare`.

        Returns:
            None where the buffers would have to grow.
        """
        assert not self._shared, "quantised pages are read back from their codes"
        plan = self.context.plan(committed.stop, len(committed), pose, table)
        if self._layout(plan)[1] > self._capacity:
            return None
        return Ahead(self, plan, committed)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `worldsim.models.context.Attends`; one row."""
        assert self.own_rotation is not None, "prepare() comes before attend()"
        for run in self._runs:
            self._fill(run, slice(layer, layer + 1))
        keys, values = self.keys[layer], self.values[layer]
        return _attended(q, k, v, keys, values, self.own_rotation, self.backend)

    def stage(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """See `worldsim.models.context.Attends`; one row."""
        own = k.shape[-2]
        left = (k, v) if q is None else (k, v, q)
        for staged, x in zip(self.staging, left, strict=True):
            staged[layer][:, :own] = x[0]

    def staged(self, frames: int) -> tuple[Tensor, ...]:
        """Keys, values and, where it `asks`, queries of the last commit pass, each
        ``[L, H, frames * tokens, D]``."""
        own = frames * self.context.pool.shape.tokens
        return tuple(torch.stack([staged[:, :own] for staged in part]) for part in self.staging)

    # --- what lies where --------------------------------------------------------------------------
    def _layout(self, plan: ReadPlan) -> tuple[list[tuple[int, Read]], int]:
        """First row of each page that is read, after the own rows, and the rows of all."""
        layout, row = [], 0
        for read in plan.reads:
            layout.append((row, read))
            row += self._tokens(read)
        return layout, row

    def _wanted(
        self, layout: Sequence[tuple[int, Read]]
    ) -> tuple[dict[int, Content], list[tuple[int, Read]]]:
        """What is to lie at each first row, and what of it does not lie there yet."""
        # What is written at a row stays there until something else is.
        wanted = {row: self._content(row, read) for row, read in layout}
        return wanted, [at for at in layout if self._written.get(at[0]) != wanted[at[0]]]

    def _seen(
        self, own: int, read: int, plan: ReadPlan
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
        """What passes read: so many rows of each layer's keys and values, and the rotation of the
        own ones. A block shorter than the buffer's own rows ends right before the first page.
        """
        rows = slice(self._own - own, self._own + read)
        keys, values = [x[:, rows] for x in self._keys], [x[:, rows] for x in self._values]
        for buffer in (*keys, *values):
            # Tells `torch.compile` beforehand that this one length grows: it compiles once.
            torch._dynamo.maybe_mark_dynamic(buffer, 1)
        positions = torch.tensor(plan.query_positions)
        grid = self.context.pool.shape.grid
        return keys, values, self._rotation(token_positions(positions, *grid))

    def _tokens(self, read: Read) -> int:
        return read.entry.tokens or self.context.pool.kind(read.entry.page).tokens

    def _content(self, row: int, read: Read) -> Content:
        return self.context.pool.version(read.entry.page), read.position, row

    def _grouped(self, layout: Sequence[tuple[int, Read]]) -> Iterator[Run]:
        """Neighbours of one kind as runs."""
        run: list[tuple[int, Read]] = []
        for row, read in layout:
            if run and not self._joins(run, row, read):
                yield self._run(run)
                run = []
            run.append((row, read))
        if run:
            yield self._run(run)

    def _joins(self, run: list[tuple[int, Read]], row: int, read: Read) -> bool:
        pool, (last_row, last) = self.context.pool, run[-1]
        kind = pool.kind(read.entry.page)
        alike = kind == pool.kind(last.entry.page) and not kind.placed
        short = not self._shared or len(run) < DECODED
        return alike and short and row == last_row + self._tokens(last)

    def _run(self, run: list[tuple[int, Read]]) -> Run:
        pool, reads = self.context.pool, tuple(read for _, read in run)
        rows = slice(run[0][0], run[-1][0] + self._tokens(reads[-1]))
        if pool.kind(reads[0].entry.page).placed:
            return Run(reads, rows, None)
        return Run(reads, rows, self._rotation(placement(reads, pool)))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, 3]`` → cosine and sine ``[n, D / 2]`` on the pool's device."""
        pool = self.context.pool
        cos, sin = rotation(positions, pool.shape.head_dim, pool.dtype)
        return cos.to(pool.device), sin.to(pool.device)

    # --- buffers ----------------------------------------------------------------------------------
    def _fill_all(self, run: Run) -> None:
        """Write the pages of a run for all layers."""
        shape = self.context.pool.shape
        numbers = (run.rows.stop - run.rows.start) * shape.heads * shape.head_dim
        each = 1 if run.rotation is None else layers_at_once(numbers)
        for layer in range(0, shape.layers, each):
            self._fill(run, slice(layer, min(layer + each, shape.layers)))

    def _fill(self, run: Run, layers: slice) -> None:
        """Write the pages of a run for some layers (one, where they hold different tokens)."""
        pool, first = self.context.pool, run.reads[0]
        pages = [read.entry.page for read in run.reads]
        keys, values = pool.read(pages, layers, first.entry.tokens)
        turn = run.rotation
        if turn is None:
            turn = self._rotation(placed(first, pool, layers.start))
        keys = rotate(keys, *turn)
        rows = slice(self._own + run.rows.start, self._own + run.rows.stop)
        for own_keys, own_values, k, v in zip(
            self._keys[layers], self._values[layers], keys, values, strict=True
        ):
            own_keys[:, rows] = k
            own_values[:, rows] = v

    def _allocate(self, capacity: int) -> None:
        """Buffers for so many rows of the context."""
        shape = self.context.pool.shape
        self._capacity = capacity
        made = 1 if self._shared else shape.layers
        each = shape.layers // made
        self._keys = [self._buffer(self._own + capacity) for _ in range(made)] * each
        self._values = [self._buffer(self._own + capacity) for _ in range(made)] * each
        self._written = {}

    def _buffer(self, rows: int) -> Tensor:
        """``[H, rows, D]``; see the module docstring."""
        shape = self.context.pool.shape
        if self._by_head:
            return self._zeros((shape.heads, rows, shape.head_dim))
        return self._zeros((rows, shape.heads, shape.head_dim)).transpose(0, 1)

    def _zeros(self, size: tuple[int, ...]) -> Tensor:
        # Always plain tensors: compiled code does not take an inference tensor for the same thing.
        pool = self.context.pool
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=pool.dtype, device=pool.device)


class Ahead:
    """A view as the next block sees it, in the pass that commits the block that it is prepared for:
    the two are rows of it, the view first, and in each layer the one comes right after the other.

    Of a layer's buffer only what changes is written, once the committed block has attended there:
    pages that move, and that block's own keys, turned to where they are read from now on. They come
    out of the view's staging rows, and are to the bit what its pages will hold.
    """

    asks = False

    def __init__(self, view: ContextView, plan: ReadPlan, committed: range) -> None:
        """See `ContextView.ahead`. Until `take_over` nothing that lies in the view's buffers counts
        any more: a pass that fails has changed some layers and not others."""
        shape = view.context.pool.shape
        layout, read = view._layout(plan)
        wanted, stale = view._wanted(layout)
        fresh = [(row, read) for row, read in layout if read.entry.frame in committed]
        at = [0.0] * len(committed)
        for _, own in fresh:
            at[own.entry.frame - committed.start] = own.position
        times = torch.tensor(at, dtype=torch.float64)
        self._view, self._wanted = view, wanted
        self._moved = tuple(view._grouped([place for place in stale if place not in fresh]))
        self._turn = view._rotation(token_positions(times, *shape.grid))
        self._own = len(committed) * shape.tokens
        self._taken = _joined(
            (view._own + row, (own.entry.frame - committed.start) * shape.tokens, shape.tokens)
            for row, own in fresh
        )
        self.keys, self.values, self.own_rotation = view._seen(self._own, read, plan)
        view._written = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `worldsim.models.context.Attends`; one row."""
        view = self._view
        for run in self._moved:
            view._fill(run, slice(layer, layer + 1))
        fresh_keys, fresh_values = (part[layer][:, : self._own] for part in view.staging[:2])
        fresh_keys = rotate(fresh_keys, *self._turn)
        for into, of in self._taken:
            view._keys[layer][:, into] = fresh_keys[:, of]
            view._values[layer][:, into] = fresh_values[:, of]
        keys, values = self.keys[layer], self.values[layer]
        return _attended(q, k, v, keys, values, self.own_rotation, view.backend)

    def stage(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """This row is committed by a later pass."""

    def take_over(self) -> None:
        """The pass has ended, and its block is committed: the view is prepared for the next one."""
        view = self._view
        view._written = self._wanted
        view.keys, view.values, view.own_rotation = self.keys, self.values, self.own_rotation


def _attended(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, turn: tuple[Tensor, Tensor],
    backend: str,
) -> Tensor:  # fmt: skip
    """Attention of one row over a layer's buffers ``[H, own + context, D]``, whose first rows
    become its own keys and values."""
    own = k.shape[-2]
    keys[:, :own] = rotate(k[0], *turn)
    values[:, :own] = v[0]
    return attention(rotate(q, *turn), keys[None], values[None], backend=backend)


def _joined(copies: Iterable[tuple[int, int, int]]) -> list[tuple[slice, slice]]:
    """Copies (to, from, rows) as slices, neighbours as one."""
    joined: list[tuple[slice, slice]] = []
    for to, of, rows in copies:
        if joined and (joined[-1][0].stop, joined[-1][1].stop) == (to, of):
            last_to, last_of = joined.pop()
            joined.append((slice(last_to.start, to + rows), slice(last_of.start, of + rows)))
        else:
            joined.append((slice(to, to + rows), slice(of, of + rows)))
    return joined


def layers_at_once(numbers: int) -> int:
    """Layers whose pages are rotated together, where each has so many ``numbers``."""
    return max(1, ROTATED // numbers)
