"""One session's context: a page table with stage, commit, abort and plan.

A cell never changes committed state: it *stages* K/V under (block, level); `commit` publishes that
key, immutably; `abort` takes back everything staged or published from a block on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from worldsim.cache.config import CacheConfig
from worldsim.cache.policy import Entry, ReadPlan, Table, admit, plan
from worldsim.cache.pool import PagePool


@dataclass(frozen=True)
class _Published:
    """The newest commit, kept so that aborting that block restores the table before it."""

    block: int
    before: Table
    previous: int | None


class Context:
    """The page table of one session over a shared `PagePool`."""

    def __init__(self, pool: PagePool, config: CacheConfig) -> None:
        self.pool = pool
        self.config = config
        self.table: Table = ()
        self.newest: int | None = None  # newest committed block
        self._staged: dict[tuple[int, int], Table] = {}
        self._last: _Published | None = None

    @staticmethod
    def pages_needed(config: CacheConfig, block_frames: int) -> int:
        """Pages that a session ever holds: capacity, one staged block, one block to take back."""
        return (config.capacity or 0) + 2 * block_frames

    def plan(self, start: int, frames: int) -> ReadPlan:
        """What a block of ``frames`` frames from absolute index ``start`` on reads."""
        return plan(self.table, start, frames, self.config)

    def stage(
        self, block: int, level: int, frames: Sequence[int], keys: Tensor, values: Tensor
    ) -> None:
        """Write a block's K/V into fresh pages under (block, level); nothing committed changes.

        Args:
            frames: absolute latent frame indices of the block.
            keys, values: ``[layers, heads, len(frames) * tokens, head_dim]``, keys un-rotated.
        """
        self._drop_staged(block, level)
        entries = []
        per_frame = self.pool.shape.tokens
        for i, frame in enumerate(frames):
            page = self.pool.acquire()
            rows = slice(i * per_frame, (i + 1) * per_frame)
            self.pool.keys(page).copy_(keys[:, :, rows])
            self.pool.values(page).copy_(values[:, :, rows])
            entries.append(Entry(frame, page))
        self._staged[block, level] = tuple(entries)

    def commit(self, block: int, level: int) -> None:
        """Publish what was staged under (block, level) and drop the block's other levels.

        Raises:
            KeyError: if nothing was staged under that key.
        """
        new = self._staged.pop((block, level))
        for other in [key for key in self._staged if key[0] == block]:
            self._drop_staged(*other)
        if self._last is not None:
            self._release(set(self._last.before) - set(self.table))
        before = self.table
        self.table, evicted = admit(before, new, self.config)
        self._release(set(evicted) - set(before))  # frames that the policy did not take at all
        self._last = _Published(block, before, self.newest)
        self.newest = block

    def abort(self, block: int) -> None:
        """Drop everything staged or published for blocks from ``block`` on.

        Raises:
            ValueError: if that reaches back further than the newest commit.
        """
        committed = self.newest is not None and self.newest >= block
        if committed and (self._last is None or self._last.block > block):
            raise ValueError(
                f"cannot abort block {block}: block {self.newest} is committed, and only the "
                "newest commit of this very context can be taken back, once"
            )
        for key in [key for key in self._staged if key[0] >= block]:
            self._drop_staged(*key)
        if not committed or self._last is None:
            return
        self._release(set(self.table) - set(self._last.before))
        self.table, self.newest = self._last.before, self._last.previous
        self._last = None

    def fork(self) -> "Context":
        """A second table over the same pages; each side's later commits are its own."""
        twin = Context(self.pool, self.config)
        twin.table, twin.newest = self.table, self.newest
        for entry in self.table:
            self.pool.retain(entry.page)
        return twin

    def close(self) -> None:
        """Give every page back to the pool."""
        for key in list(self._staged):
            self._drop_staged(*key)
        held = set(self.table) | set(self._last.before if self._last else ())
        self._release(held)
        self.table, self.newest, self._last = (), None, None

    def _drop_staged(self, block: int, level: int) -> None:
        self._release(set(self._staged.pop((block, level), ())))

    def _release(self, entries: set[Entry]) -> None:
        for entry in sorted(entries, key=lambda entry: entry.frame):
            self.pool.release(entry.page)
