"""The scoreboard: every measure on every held-out walk, spread over processes.

A score is a pure function of (subject, walk), so how the work is spread changes nothing. Nothing
here knows how a table looks.
"""

import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from worldsim.maze import measures
from worldsim.maze.inverse import learn_inverse
from worldsim.maze.looks import learn_looks
from worldsim.maze.measures import MEASURES, MINUTE, ROLLOUT, Readers, Scores
from worldsim.maze.streams import Subject
from worldsim.maze.truth import GIVEN, SECOND, Truth, held_out

Note = Callable[[], None]  # called after each walk, for a progress bar


@dataclass(frozen=True)
class Material:
    """Held-out walks for each measure, the rows that count, and what reads pictures."""

    walks: Mapping[str, Truth]
    rows: Mapping[str, Sequence[int]]
    readers: Readers

    @property
    def total(self) -> int:
        return sum(len(rows) for rows in self.rows.values())


def material(size: tuple[int, int], states: int, chosen: Sequence[str]) -> Material:
    """``states`` walks for each of the ``chosen`` measures; a tenth of them last a minute.

    Raises:
        ValueError: for a measure that does not exist.
    """
    if unknown := sorted(set(chosen) - set(MEASURES)):
        raise ValueError(f"unknown measure {unknown[0]!r}: choose from {', '.join(MEASURES)}")
    make: dict[str, Callable[[], Truth]] = {
        "rollout": lambda: held_out(states, GIVEN + SECOND * ROLLOUT, size),
        "forks": lambda: held_out(8 * states, GIVEN, size, 10_000),
        "returning": lambda: held_out(states, GIVEN, size, 40_000, standing=True),
        "prompts": lambda: held_out(states, 1 + 5 * SECOND, size, 30_000),
        "minute": lambda: held_out(minutes(states), GIVEN + SECOND * MINUTE, size, 20_000),
    }
    walks = {name: make[name]() for name in chosen}
    rows = {name: list(range(len(truth.poses))) for name, truth in walks.items()}
    if "forks" in walks:
        rows["forks"] = measures.forkable(walks["forks"], states)
    return Material(walks, rows, Readers(learn_looks(size), learn_inverse(size)))


def minutes(states: int) -> int:
    """How many walks last a minute."""
    return max(8, states // 10)


def score(
    make: Callable[[], Subject], given: Material, processes: int, note: Note
) -> dict[str, np.ndarray]:
    """Every score of one subject, one value for each walk in the order of the rows.

    Args:
        make: opens the subject, once in each process; picklable where there are several.
        processes: 1 stays in this process. Each computes with one thread.
    """
    tasks = [(name, row) for name, rows in given.rows.items() for row in rows]
    # Long ones first, so that no process is left alone with one in the end.
    tasks.sort(key=lambda task: task[0] != "minute")
    found: dict[tuple[str, int], Scores] = {}
    for task, values in _results(make, given, processes, tasks):
        found[task] = values
        note()
    out: dict[str, list[float]] = defaultdict(list)
    for name, rows in given.rows.items():
        for row in rows:
            for key, value in found[name, row].items():
                out[key].append(value)
    return {key: np.array(values) for key, values in out.items()}


Task = tuple[str, int]


def _results(
    make: Callable[[], Subject], given: Material, processes: int, tasks: Sequence[Task]
) -> Iterator[tuple[Task, Scores]]:
    if processes == 1:
        subject = make()
        for name, row in tasks:
            yield (name, row), MEASURES[name](subject, given.walks[name], row, given.readers)
        return
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_open, initargs=(make, given)
    )
    try:
        futures = [pool.submit(_run, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise OSError(
            "a scoring process was killed (too little memory?): try --processes 1"
        ) from None
    except BaseException:
        # A task may last a minute: nobody who stops a run waits for it.
        running = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        raise


class _Here:
    """What a process of the pool holds."""

    subject: Subject
    given: Material


def _open(make: Callable[[], Subject], given: Material) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    torch.set_num_threads(1)
    _Here.subject, _Here.given = make(), given


def _run(task: Task) -> tuple[Task, Scores]:
    name, row = task
    given = _Here.given
    return task, MEASURES[name](_Here.subject, given.walks[name], row, given.readers)
