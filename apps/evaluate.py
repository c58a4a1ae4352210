"""`worldsim evaluate`: the scoreboard. Scores against the simulator, one row for each setting."""

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worldsim.apps.report import machine, write_json
from worldsim.apps.score_table import Column, Row, columns, markdown, mean, print_one, print_rows
from worldsim.apps.setting import Setting
from worldsim.maze.board import Material, material, score
from worldsim.maze.corruptions import FAULTS
from worldsim.maze.measures import MEASURES
from worldsim.maze.report import rollout_sheet
from worldsim.maze.streams import Played, Simulated, Subject, reconstructed
from worldsim.metrics import psnr
from worldsim.streaming.sinks import check_writable
from worldsim.world import World

SHEET_ROWS = 10
CODED = 60  # walks through the autoencoder
TIMED = 48  # blocks


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line was given."""

    settings: tuple[Setting, ...]
    measures: tuple[str, ...]  # none: all
    states: int
    device: str
    processes: int | None
    self_test: bool
    sheet: Path | None
    json: Path | None
    markdown: Path | None


def run(options: EvaluateOptions) -> None:
    """Score and print; see `evaluate`.

    Raises:
        ValueError: for options that cannot be, or a world that is no maze.
    """
    if options.states < 8:
        raise ValueError(f"--states must be 8 or more to mean anything, got {options.states}")
    if options.processes is not None and not 1 <= options.processes <= 1024:
        raise ValueError(f"--processes must be 1 or more, got {options.processes}")
    for path in (options.sheet, options.json, options.markdown):
        if path is not None:
            check_writable(path)
    if options.sheet is not None and options.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet is a PNG file, got {str(options.sheet)!r}")
    if options.sheet is not None and (options.self_test or len(options.settings) > 1):
        raise ValueError("--sheet shows one setting of a world: leave the other switches out")
    if len(set(options.settings)) < len(options.settings):
        raise ValueError("a setting is listed twice: name each value once")
    size = _check(options)
    with Console(stderr=True).status("reading what is true on held-out maps"):
        given = material(size, options.states, options.measures or tuple(MEASURES))
    processes = options.processes or (1 if options.device != "cpu" else os.cpu_count() or 1)
    rows = check_scores(given, processes) if options.self_test else evaluate(
        options, given, processes
    )  # fmt: skip
    found: dict[str, Row] = {}
    shown: list[Column] = []
    for name, row in rows:
        found[name] = row
        shown = [c for c in columns(given) if any(c.score in row for row in found.values())]
        # After each row: who stops a long list has what was scored until then.
        write_json(options.json, _figures(options, found, shown))
        if options.markdown is not None:
            options.markdown.write_text(markdown(found, shown))
    if len(found) == 1:
        print_one(next(iter(found.items())), shown)
    else:
        print_rows(found, shown)


def _check(options: EvaluateOptions) -> tuple[int, int]:
    """Open every setting once, so that a bad one is told before any work."""
    sizes = set()
    for setting in options.settings:
        world = setting.open(options.device, 1)
        if world.config.actions is None or world.config.fps != 16 or world.config.block_frames != 1:
            raise ValueError(
                f"only a maze (blocks of one latent frame, 16 fps) has a simulator to score "
                f"against, not {setting.world!r}"
            )
        setting.session(world).close()
        sizes.add(world.config.size)
    if len(sizes) > 1:
        raise ValueError(f"worlds of one size can be set side by side, not {sorted(sizes)}")
    return sizes.pop()


def evaluate(
    options: EvaluateOptions, given: Material, processes: int
) -> Iterator[tuple[str, Row]]:
    """Every score of every setting, ``(setting, {score: one value for each walk})``."""
    with _progress() as progress:
        for setting in options.settings:
            task = progress.add_task(str(setting), total=given.total)
            note: Callable[[], None] = partial(progress.advance, task)
            world = setting.open(options.device, 1)
            alone = {**_speed(world, setting), **_ceiling(world, given)}
            scores = score(partial(_open, setting, options.device), given, processes, note)
            if options.sheet is not None:
                _sheet(options.sheet, _subject(world, setting), given)
            yield str(setting), {**scores, **alone}


def _open(setting: Setting, device: str) -> Subject:
    return _subject(setting.open(device, 1), setting)


def _subject(world: World, setting: Setting) -> Played:
    return Played(lambda prompt, seed: setting.session(world, prompt, seed))


def _speed(world: World, setting: Setting) -> Row:
    """Pictures per second, parts in sequence on one thread, and bytes of the context."""
    warm_up = setting.warm_up(world)
    if warm_up is None:  # nothing is ever evicted: there is no steady state to time
        return {}
    with setting.session(world) as session:
        blocks = [session.step() for _ in range(warm_up + TIMED)][warm_up:]
        seconds = [sum(block.timings.values()) for block in blocks]
        pictures = len(blocks[-1].frames)
        held = session.memory_report().session
    return {
        "fps": np.array([pictures / statistics.median(seconds)]),
        "ms": np.array([1e3 * statistics.median(seconds)]),
        "bytes": np.array([float(held)]),
    }


def _ceiling(world: World, given: Material) -> Row:
    if "rollout" not in given.walks:
        return {}
    truth = given.walks["rollout"]
    rows = [truth.pictures(row) for row in given.rows["rollout"][:CODED]]
    return {"autoencoder": np.array([psnr(reconstructed(world, clip), clip) for clip in rows])}


def _sheet(path: Path, subject: Subject, given: Material) -> None:
    if "rollout" in given.walks:
        rollout_sheet(subject, given.walks["rollout"], SHEET_ROWS).save(path)


def _figures(
    options: EvaluateOptions, found: Mapping[str, Row], shown: Sequence[Column]
) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for name, row in found.items():
        rows[name] = {}
        for score_name, values in row.items():
            value, half, walks = mean(values)
            number = None if math.isnan(value) else value  # JSON knows no NaN
            rows[name][score_name] = {"mean": number, "ci95": half, "walks": walks}
    return {
        "measures": list(options.measures or MEASURES),
        "states": options.states,
        "units": {column.score: [column.unit, column.scale] for column in shown},
        "settings": rows,
        "machine": machine(),
    }


def check_scores(given: Material, processes: int) -> Iterator[tuple[str, Row]]:
    """Every score of the simulator itself, whole and with each known fault: does each score fall
    for what it is meant to see, and for that alone?"""
    with _progress() as progress:
        for name, fault in FAULTS.items():
            task = progress.add_task(name, total=given.total)
            note: Callable[[], None] = partial(progress.advance, task)
            yield name, score(partial(Simulated, fault), given, processes, note)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
