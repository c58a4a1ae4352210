"""What one session keeps of earlier blocks: for each lane of its schedule, a context for each row.

A row is that of the prompt or, where a negative one guides, of that. Contexts are page tables and
cost nothing; the pages that they may need are promised, and the buffers that attention reads are
made, when the lanes are first read: a fork that makes no block costs no more than its tables.
"""

import weakref
from collections import Counter
from collections.abc import Container, Mapping
from functools import partial

from worldsim.cache.camera import Camera
from worldsim.cache.context import Context, Event
from worldsim.cache.policy import Pose, Table
from worldsim.cache.pool import PageKind, PagePool
from worldsim.config import Settings
from worldsim.models.view import ContextView

Views = dict[int, list[ContextView]]


class Lanes:
    """Contexts of a session by lane and row.

    Attributes:
        pool: where their pages are.
        snapshots: how many the session keeps, each of which may hold as many pages.
    """

    def __init__(
        self,
        pool: PagePool,
        settings: Settings,
        block_frames: int,
        camera: Camera | None,
        only: Container[int] | None = None,
        by_head: bool = False,
    ) -> None:
        """``only``: of the schedule's lanes, these. ``by_head``: see `ContextView`."""
        self.pool = pool
        self.snapshots = 0
        self._frames = block_frames
        self._view = partial(
            ContextView, block_frames=block_frames, backend=settings.attention, by_head=by_head
        )
        self._contexts = {
            lane: [Context(pool, settings.cache, camera) for _ in range(settings.rows)]
            for lane in settings.schedule.lanes
            if only is None or lane in only
        }
        self._views: Views = {}
        self._promised: Counter[PageKind] = Counter()
        # Of a session that nobody closes, too, and that nobody has any more.
        give_back = partial(_give_back, self.contexts, self._promised)
        self._end = weakref.finalize(self, pool.later, give_back)
        self._end.atexit = False

    def __contains__(self, lane: object) -> bool:
        return lane in self._contexts

    @property
    def contexts(self) -> list[Context]:
        """All of them."""
        return [context for rows in self._contexts.values() for context in rows]

    @property
    def first(self) -> Context:
        """The first lane's, under the prompt."""
        return self.contexts[0]

    @property
    def views(self) -> Views:
        """What passes read and stage.

        Raises:
            ValueError: if they are closed.
        """
        if not self._end.alive:
            raise ValueError("this session is closed: open a new one")
        if not self._views:
            self.wake()
        return self._views

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of the pages that a snapshot may hold and nobody else does."""
        return sum(n * self.pool.page_nbytes(kind) for kind, n in self._needs(0).items())

    def wake(self) -> None:
        """Have pages promised and make the buffers that attention reads.

        Raises:
            ValueError: where there is no memory for them.
        """
        needs = self._needs(self._frames)
        for kind, pages in self._needs(0).items():
            needs[kind] += self.snapshots * pages
        self.pool.reserve(needs)
        try:
            self._views = {
                lane: [self._view(context) for context in rows]
                for lane, rows in self._contexts.items()
            }
        except BaseException:
            self.pool.give_back(needs)  # out of memory: nobody may keep a promise of pages
            raise
        self._promised.update(needs)

    def prepare(self, start: int, frames: int, pose: Pose | None) -> None:
        """Bring what the next passes read up to date."""
        for views in self.views.values():
            for view in views:
                view.prepare(start, frames, pose)

    def on_event(self, event: Event) -> None:
        for context in self.contexts:
            context.on_event(event)

    def tables(self) -> tuple[dict[int, tuple[Table, ...]], dict[int, tuple[int | None, ...]]]:
        """Page tables, and the newest committed block, by lane and row."""
        lanes = self._contexts.items()
        return (
            {lane: tuple(context.table for context in rows) for lane, rows in lanes},
            {lane: tuple(context.newest for context in rows) for lane, rows in lanes},
        )

    def restore(
        self,
        tables: Mapping[int, tuple[Table, ...]],
        newest: Mapping[int, tuple[int | None, ...]],
    ) -> None:
        """Go on from what `tables` gave."""
        for lane, rows in self._contexts.items():
            for context, table, block in zip(rows, tables[lane], newest[lane], strict=True):
                context.restore(table, block)

    def close(self) -> None:
        """Give the pages back."""
        self._views = {}
        _give_back(self.contexts, self._promised, self.pool)
        self._end.detach()

    def _needs(self, block_frames: int) -> Counter[PageKind]:
        """Pages that they ever hold, with blocks of so many frames in the making."""
        return sum((context.needs(block_frames) for context in self.contexts), Counter[PageKind]())


def _give_back(contexts: list[Context], promised: Counter[PageKind], pool: PagePool) -> None:
    for context in contexts:
        context.close()
    given_back = dict(promised)
    promised.clear()
    pool.give_back(given_back)
