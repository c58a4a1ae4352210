"""One session's context: a page table with stage, commit, abort, plan and events.

A cell never changes committed state: it *stages* K/V under (block, level); `commit` publishes that
key, immutably; `abort` takes back everything staged or published from a block on. `foresee` says
what a commit will make of the table before there are keys and values to stage.
"""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import zip_longest

from torch import Tensor

from worldsim.cache.camera import Camera
from worldsim.cache.config import CacheConfig
from worldsim.cache.mid import ASKING, Form, make_form
from worldsim.cache.policy import (
    Entries,
    Entry,
    Pose,
    ReadPlan,
    Table,
    admit,
    flushed,
    plan,
    reopened,
)
from worldsim.cache.pool import PageKind, PagePool

FLUSH_KEEPS = 1  # latent frames beside the sink


class Event(Enum):
    """What can happen to a context between two blocks."""

    FLUSH = "flush"  # only the sink and the newest frame stay
    CUT = "cut"  # the next block begins a new scene: for it, everything is far away
    RECACHE = "recache"  # recent frames are committed anew, which is the session's work
    REOPEN = "reopen"  # and before that they go
    RESET = "reset"  # everything goes


@dataclass(frozen=True)
class _Published:
    """The newest commit, kept so that aborting that block restores the table before it."""

    block: int
    before: Table
    previous: int | None


@dataclass(frozen=True)
class _Staged:
    """A block under one level: its entries, what they ask for, and the table with them in it, where
    that was foreseen."""

    entries: Entries
    asked: Tensor | None = None
    after: Table | None = None


class Context:
    """The page table of one session over a shared `PagePool`.

    Raises:
        ValueError: for a mid form that needs a ``camera`` where there is none.
    """

    def __init__(self, pool: PagePool, config: CacheConfig, camera: Camera | None = None) -> None:
        self.pool = pool
        self.config = config
        self.camera = camera
        self.form: Form = make_form(pool, config, camera)
        self.table = Table()
        self.newest: int | None = None  # newest committed block
        self._staged: dict[tuple[int, int], _Staged] = {}
        self._last: _Published | None = None

    def needs(self, block_frames: int) -> Counter[PageKind]:
        """Pages that a session ever holds: its capacity, one block staged, one to take back."""
        sink, _, recent = self.config.formats
        tokens = self.pool.shape.tokens
        needs = Counter(self.form.needs(block_frames))
        needs[PageKind(tokens, sink)] += self.config.sink
        needs[PageKind(tokens, recent)] += (self.config.recent or 0) + 2 * block_frames
        return needs

    def plan(
        self, start: int, frames: int, pose: Pose | None = None, table: Table | None = None
    ) -> ReadPlan:
        """What a block of ``frames`` frames from absolute index ``start`` on reads.

        Args:
            pose: where the player will be in it, for retrieval by pose.
            table: a foreseen one, in place of this context's.
        """
        table = self.table if table is None else table
        return plan(table, self.form.choose(table.mid, pose), start, frames, self.config)

    def stage(
        self,
        block: int,
        level: int,
        frames: Sequence[int],
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None = None,
        *,
        poses: Sequence[Pose] = (),
    ) -> None:
        """Write a block's K/V into fresh pages under (block, level); nothing committed changes.

        Args:
            frames: absolute latent frame indices of the block.
            keys, values: ``[layers, heads, len(frames) * tokens, head_dim]``, keys un-rotated.
            queries: of the same tokens; their mean says what a mid form is asked for.
            poses: at the end of each frame, in worlds that have poses.
        """
        ready = self._staged.get((block, level))
        if ready is None or ready.after is None:
            self._drop_staged(block, level)
            ready = _Staged(self._acquired(level, frames, poses))
            self._staged[block, level] = ready
        per_frame = self.pool.shape.tokens
        try:
            for i, entry in enumerate(ready.entries):
                rows = slice(i * per_frame, (i + 1) * per_frame)
                self.pool.write(entry.page, keys[:, :, rows], values[:, :, rows])
        except BaseException:
            self._drop_staged(block, level)  # no memory for the rest: none of it is kept
            raise
        if queries is not None:
            parts = queries.float().unflatten(2, (len(ready.entries), -1))
            asked = parts.mean(3)  # [L, H, frames, D]
            self._staged[block, level] = replace(ready, asked=asked)

    def can_foresee(self, frames: int) -> bool:
        """Whether a commit of so many frames makes a table that does not depend on what they hold:
        no form asks their queries or takes them up at once, and pages give back what they got."""
        config = self.config
        at_once = bool(config.form) and config.recent is not None and config.recent < frames
        return not (config.asks or config.quantised or at_once)

    def foresee(
        self, block: int, level: int, frames: Sequence[int], poses: Sequence[Pose] = ()
    ) -> Table:
        """The table as it will be once the block is committed: `stage` then fills the pages that it
        names, and `commit` publishes it; nothing committed changes before. The commit before it
        can no longer be aborted. Arguments as in `stage`.
        """
        assert self.can_foresee(len(frames)), "can_foresee() comes before foresee()"
        self._drop_staged(block, level)
        new = self._acquired(level, frames, poses)
        try:
            self._forget_last()
            after = self._admitted(new)
        except BaseException:
            self._release(set(new))
            raise
        self._staged[block, level] = _Staged(new, after=after)
        return after

    def commit(self, block: int, level: int, only: Container[int] | None = None) -> None:
        """Publish what was staged under (block, level) and drop the block's other levels.

        ``only``: of its frames, these.

        Raises:
            KeyError: if nothing was staged under that key.
        """
        staged = self._staged.pop((block, level))
        for other in [key for key in self._staged if key[0] == block]:
            self._drop_staged(*other)
        self._forget_last()
        after = staged.after
        if after is None:
            after = self._admitted(staged.entries, staged.asked, only)
        self._release(set(staged.entries) - set(after))  # frames that the policy did not take
        self._last = _Published(block, self.table, self.newest)
        self.table, self.newest = after, block

    def on_event(self, event: Event) -> None:
        """Change what is kept, between two blocks; no commit before it can be aborted."""
        before = self.table
        if event is Event.FLUSH:
            after = flushed(before, FLUSH_KEEPS)
        elif event is Event.CUT:
            after = replace(before, cut=True)
        elif event is Event.REOPEN:
            after = reopened(before)
        else:
            after = Table()
        gone = set(before) | (set(self._last.before) if self._last else set())
        self.table, self._last = after, None
        self._release(gone - set(after))

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

    def restore(self, table: Table, newest: int | None) -> None:
        """Go on from a table over pages of the same pool; they are shared, and later commits are
        this context's own. What was staged is dropped; no commit before it can be aborted."""
        for entry in table:
            self.pool.retain(entry.page)
        for key in list(self._staged):
            self._drop_staged(*key)
        gone = set(self.table) | (set(self._last.before) if self._last else set())
        self.table, self.newest, self._last = table, newest, None
        # One reference to each page is this context's, also where it was held before.
        self._release(gone)

    def fork(self) -> "Context":
        """A second table over the same pages; each side's later commits are its own."""
        twin = Context(self.pool, self.config, self.camera)
        twin.restore(self.table, self.newest)
        return twin

    def close(self) -> None:
        """Give every page back to the pool."""
        for key in list(self._staged):
            self._drop_staged(*key)
        self.on_event(Event.RESET)
        self.newest = None

    def _acquired(self, level: int, frames: Sequence[int], poses: Sequence[Pose]) -> Entries:
        """Fresh pages for a block's frames."""
        entries: list[Entry] = []
        tokens, room = self.pool.shape.tokens, self.config.sink - len(self.table.sink)
        try:
            for i, (frame, pose) in enumerate(zip_longest(frames, poses)):
                format_ = self.config.formats[0 if i < room else 2]
                page = self.pool.acquire(PageKind(tokens, format_))
                entries.append(Entry(frame, page, pose=pose, level=level))
        except BaseException:
            self._release(set(entries))
            raise
        return tuple(entries)

    def _admitted(
        self, new: Entries, asked: Tensor | None = None, only: Container[int] | None = None
    ) -> Table:
        """The table with a block's frames in it; ``only``: these of them."""
        kept = new
        if only is not None:
            kept = tuple(entry for entry in new if entry.frame in only)
        after, left = admit(self.table, kept, self.config)
        if asked is not None:
            mean = zip(new, asked.unbind(2), strict=True)
            queries = (*after.queries, *((entry.frame, q) for entry, q in mean if entry in kept))
            after = replace(after, queries=queries[-ASKING:])
        asking = tuple(query for _, query in after.queries)
        return replace(after, mid=self.form.take(after.mid, left, asking))

    def _forget_last(self) -> None:
        """Give back the pages that only the newest commit's being taken back would need."""
        if self._last is not None:
            self._release(set(self._last.before) - set(self.table))
        self._last = None

    def _drop_staged(self, block: int, level: int) -> None:
        staged = self._staged.pop((block, level), _Staged(()))
        made = set(staged.after or ()) - set(self.table)  # by its mid form
        self._release(made | set(staged.entries))

    def _release(self, entries: set[Entry]) -> None:
        for entry in sorted(entries, key=lambda entry: (entry.frame, entry.page)):
            self.pool.release(entry.page)
