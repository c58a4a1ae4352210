"""Overlapped stages: bounded hand-over between threads, in order, with back-pressure.

Two primitives. `prefetch` moves a source of items to a thread of its own; nested, each stage
overlaps the next: `prefetch(decoded(prefetch(denoised())))`. `Writer` moves a sink to a thread of
its own. Neither changes an item nor the order of items, so what they overlap stays deterministic.

Knows nothing of models or torch. For callers that compute with torch on both sides of a hand-over:
- `no_grad`, `inference_mode`, the current CUDA device and stream belong to one thread. Enter them
  inside the source, or around the code after the hand-over; they do not cross it.
- every thread that computes keeps an OpenMP pool of its own, and a new thread starts with the count
  last given to `torch.set_num_threads`. Set it once, before any stage starts, to the cores that one
  stage shall have.
- an item is handed over, not copied: never change it afterwards (clone what a CUDA graph reuses).

Threads are daemons: a stage that is abandoned, not closed, cannot keep the process alive.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

from worldsim.streaming.sinks import Frames, Sink

Item = TypeVar("Item")


class _End:
    """Marks the end of a queue."""


def prefetch(source: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Yields the items of `source`, which runs on a thread of its own, at most `depth` ahead.

    `depth` counts the items made or being made beyond the one in the caller's hands; the source
    rests when they wait. The thread starts with the first `next` and is gone when the generator is
    exhausted or closed; closing waits for the item being made, drops those that wait, and closes
    the source. An error of the source comes out here, after the items made before it.
    Raises ValueError for a depth below 1.
    """
    _check(depth)
    return _prefetched(iter(source), depth)


def _prefetched(source: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    made: SimpleQueue[Item | _End] = SimpleQueue()
    room = Semaphore(depth)
    stopped = Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            try:
                while room.acquire() and not stopped.is_set():
                    made.put(next(source))
            except StopIteration:
                pass
            finally:
                if isinstance(source, Generator):
                    source.close()
        except BaseException as error:
            errors.append(error)
        made.put(_End())

    thread = Thread(target=run, name="worldsim-prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            room.release()
            yield item
            del item  # while the next is awaited, the last may be freed
    finally:
        stopped.set()
        room.release()
        if not sys.is_finalizing():  # at interpreter exit daemons are frozen: a join would hang
            thread.join()
        if errors:
            raise errors.pop()  # popped: no cycle error → traceback → this frame → error


class Writer:
    """A sink on a thread of its own; itself a sink, so that code reads alike with and without it.

    `write` returns once at most `depth` blocks wait for the sink, apart from the one being written.
    An error of the sink comes out of the next `write`, and of `close`; what follows it is dropped.
    `close` writes what waits, closes the sink and ends the thread, also after Ctrl-C.

    Attributes:
        seconds: wall time spent in the sink so far (write and close).
        pictures: frames that the sink has taken.
    """

    def __init__(self, sink: Sink, depth: int = 2) -> None:
        _check(depth)
        self.seconds = 0.0
        self.pictures = 0
        self._sink = sink
        self._waiting: SimpleQueue[Frames | None] = SimpleQueue()
        self._room = Semaphore(depth)
        self._errors: list[BaseException] = []
        self._closed = False
        self._thread = Thread(target=self._run, name="worldsim-writer", daemon=True)
        self._thread.start()

    def write(self, frames: Frames) -> None:
        """Hands over uint8 [n, height, width, 3]; waits while `depth` blocks are before it."""
        if self._closed:
            raise ValueError("this writer is closed")
        self._waiting.put(frames)  # before the wait: Ctrl-C during it loses no frames
        self._room.acquire()
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """Drains, closes the sink, ends the thread; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._waiting.put(None)
        self._thread.join()
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _run(self) -> None:
        while (frames := self._waiting.get()) is not None:
            self._room.release()
            if not self._errors:
                self._timed(self._sink.write, frames)
            if not self._errors:
                self.pictures += len(frames)
            del frames  # a written block is not kept while the next is awaited
        self._timed(self._sink.close)

    def _timed(self, act: Callable[..., None], *frames: Frames) -> None:
        started = time.perf_counter()
        try:
            act(*frames)
        except BaseException as error:
            self._errors.append(error)
        self.seconds += time.perf_counter() - started


def _check(depth: int) -> None:
    if depth < 1:
        raise ValueError(f"depth is {depth}: give 1 or more items of run-ahead")
