"""Stages that overlap: blocks that are made ahead, and written behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from worldsim.streaming.pipeline import Writer, prefetch
from worldsim.streaming.sinks import Frames

WAIT = 5.0  # seconds; a limit for what must happen, never a pause


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("worldsim-")]


def run_python(code: str, *arguments: str | Path, **options: object) -> subprocess.Popen[bytes]:
    """Starts `code` in a fresh interpreter that finds the same packages."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, cwd="/", **options)  # type: ignore[call-overload]


class Recorder:
    """A sink that remembers the first number of every block; each write first passes the gate."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.closed = 0
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.fails_at: int | None = None

    def write(self, frames: Frames) -> None:
        self.entered.set()
        assert self.gate.wait(WAIT)
        if int(frames.flat[0]) == self.fails_at:
            raise OSError("the disk is full")
        self.seen.append(int(frames.flat[0]))

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def block(number: int) -> Frames:
    return np.full((1, 2, 2, 3), number, np.uint8)


# --- prefetch -------------------------------------------------------------------------------------


def test_prefetch_keeps_the_order_and_leaves_no_thread() -> None:
    nested = prefetch((2 * item for item in prefetch(range(50), depth=1)), depth=3)
    assert list(nested) == list(range(0, 100, 2))
    assert our_threads() == []


def test_prefetch_overlaps_the_source_with_the_caller() -> None:
    made = [threading.Event() for _ in range(3)]

    def source() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    ahead = prefetch(source(), depth=1)
    assert next(ahead) == 0
    assert made[1].wait(WAIT)  # made while the caller holds item 0
    assert not made[2].wait(0.05)  # one ahead, not two
    ahead.close()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_prefetch_runs_at_most_depth_ahead(depth: int) -> None:
    begun: list[int] = []
    full = threading.Event()

    def source() -> Iterator[int]:
        for number in range(100):
            begun.append(number)
            if len(begun) == 1 + depth:
                full.set()
            yield number

    ahead = prefetch(source(), depth)
    next(ahead)
    assert full.wait(WAIT)
    time.sleep(0.02)  # time to overrun, if it could
    assert len(begun) == 1 + depth
    ahead.close()
    assert our_threads() == []


def test_closing_prefetch_early_closes_the_source() -> None:
    ended: list[str] = []

    def source() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            ended.append(threading.current_thread().name)

    for _ in prefetch(prefetch(source())):  # dropped, not even closed
        break
    assert ended == ["worldsim-prefetch"]
    assert our_threads() == []


def test_an_error_of_the_source_comes_after_the_items_before_it() -> None:
    problem = RuntimeError("no more noise")

    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise problem

    ahead = prefetch(source(), depth=4)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(RuntimeError) as caught:
        next(ahead)
    assert caught.value is problem
    assert our_threads() == []


def test_an_error_of_the_caller_ends_the_source() -> None:
    with pytest.raises(KeyError):
        for item in prefetch(prefetch(range(100))):
            raise KeyError(item)
    gc.collect()  # the traceback held the generator
    assert our_threads() == []


def test_prefetch_keeps_no_item_that_the_caller_dropped() -> None:
    class Tensor:
        pass

    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def source() -> Iterator[Tensor]:
        for _ in range(50):
            item = Tensor()
            alive.add(item)
            yield item
            del item

    most = 0
    for item in prefetch(source(), depth=2):
        most = max(most, len(alive))
        del item
    assert most <= 4  # the caller's, two ahead, and the one that changes hands
    assert len(alive) == 0


def test_a_suspended_prefetch_does_not_hang_the_interpreter() -> None:
    code = (
        "from worldsim.streaming.pipeline import prefetch\n"
        "ahead = prefetch(iter(int, 1))\n"
        "assert next(ahead) == 0\n"
    )
    assert run_python(code).wait(WAIT) == 0


@pytest.mark.parametrize("depth", [0, -1])
def test_depth_must_be_positive(depth: int) -> None:
    with pytest.raises(ValueError, match="depth is"):
        prefetch([], depth)
    with pytest.raises(ValueError, match="depth is"):
        Writer(Recorder(), depth)
    assert our_threads() == []


# --- writer ---------------------------------------------------------------------------------------


def test_writer_writes_in_order_and_closes_once() -> None:
    sink = Recorder()
    with Writer(sink) as writer:
        for number in range(20):
            writer.write(block(number))
    writer.close()
    assert sink.seen == list(range(20))
    assert sink.closed == 1
    assert our_threads() == []
    with pytest.raises(ValueError, match="closed"):
        writer.write(block(0))


@pytest.mark.parametrize("depth", [1, 3])
def test_writer_holds_at_most_depth_blocks(depth: int) -> None:
    sink = Recorder()
    sink.gate.clear()
    writer = Writer(sink, depth)
    writer.write(block(0))
    assert sink.entered.wait(WAIT)  # block 0 is in the sink's hands: the queue is empty
    for number in range(1, 1 + depth):
        writer.write(block(number))
    blocked = threading.Thread(target=writer.write, args=(block(1 + depth),))
    blocked.start()
    blocked.join(0.05)
    assert blocked.is_alive()
    sink.gate.set()
    blocked.join(WAIT)
    writer.close()
    assert sink.seen == list(range(2 + depth))


def test_an_error_of_the_sink_comes_out_of_write_and_of_close() -> None:
    sink = Recorder()
    sink.fails_at = 3
    writer = Writer(sink, depth=2)
    with pytest.raises(OSError, match="disk is full") as at_write:
        for number in range(10):
            writer.write(block(number))
    with pytest.raises(OSError, match="disk is full") as again:
        for _ in range(10):  # never blocks, although nothing is written any more
            writer.write(block(9))
    with pytest.raises(OSError, match="disk is full") as at_close:
        writer.close()
    assert at_write.value is again.value is at_close.value
    assert sink.seen == [0, 1, 2]
    assert sink.closed == 1
    writer.close()
    assert our_threads() == []


def test_an_error_after_the_last_write_comes_out_of_the_with_block() -> None:
    sink = Recorder()
    sink.fails_at = 0
    sink.gate.clear()
    with pytest.raises(OSError, match="disk is full"), Writer(sink) as writer:
        writer.write(block(0))
        sink.gate.set()


def test_ctrl_c_while_write_waits_loses_nothing() -> None:
    sink = Recorder()
    sink.gate.clear()
    interrupt = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), Writer(sink, depth=1) as writer:
        interrupt.start()
        try:
            for number in range(4):  # the third or fourth waits
                handed = number
                writer.write(block(number))
        finally:
            sink.gate.set()
    assert sink.seen == list(range(handed + 1))
    assert sink.closed == 1
    assert our_threads() == []


def test_writer_measures_the_time_of_its_sink() -> None:
    class Slow(Recorder):
        def write(self, frames: Frames) -> None:
            time.sleep(0.01)
            super().write(frames)

    with Writer(Slow()) as writer:
        for number in range(3):
            writer.write(block(number))
    assert 0.03 <= writer.seconds < WAIT
