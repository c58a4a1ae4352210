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

from worldsim.apps.opening import open_world
from worldsim.apps.report import machine, print_table, write_json
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
TABLE = (  # README's
    Setting(),
    *(Setting(steps=steps) for steps in (1, 4, 8)),
    Setting(cache="recent=11"),
    Setting(cache="sink=3,recent=4,positions=packed"),
    Setting(dtype="float32"),
)
IN_MARKDOWN = (
    "second 1", "forks", "return", "return, swapped", "change shown", "sharpness", "motion",
    "late forks", "fps", "ms", "bytes",
)  # fmt: skip


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


@dataclass(frozen=True)
class Column:
    """One score of the table: what it is called, in which unit, and what stands beside it."""

    score: str
    title: str
    unit: str
    scale: float = 1.0
    against: tuple[str, str] = ("", "")  # another score, and what it is called here
    note: str = ""


def columns(given: Material) -> list[Column]:
    """The table, in order; scores that were not taken are left out."""
    looks, inverse = given.readers.looks, given.readers.inverse
    turn, advance = (f"truth {100 * right:.1f}" for right in inverse.accuracy)
    themes = f"{100 * looks.attributes:.0f} % of true ones can be read"
    return [
        Column("autoencoder", "autoencoder", "dB"),
        *(
            Column(f"second {s}", f"rollout, second {s}", "dB", against=(f"frozen {s}", "frozen"))
            for s in (1, 2, 4)
        ),
        Column("forks", "forks", "%", 100, note="chance 20"),
        Column("turn seen", "turn in the pictures", "%", 100, ("turn none", "still"), turn),
        Column(
            "advance seen", "advance in the pictures", "%", 100, ("advance none", "still"), advance
        ),
        Column("return", "return", "dB", against=("return, away", "view while away")),
        Column(
            "return, swapped", "return, pages swapped", "dB",
            against=("return, other map", "other map"),
        ),
        Column("prompt", "prompt, attributes", "%", 100, note=themes),
        Column("one word", "prompt of one word", "%", 100, note="chance 25"),
        Column("change", "prompt changed, attributes", "%", 100, note=themes),
        Column("change shown", "prompt changed, theme", "%", 100, note="all four, where readable"),
        Column("sharpness, first", "sharpness, first 10 s", "× true"),
        Column("sharpness", "sharpness, last 10 of 60 s", "× true"),
        Column("motion, first", "motion, first 10 s", "× true"),
        Column("motion", "motion, last 10 of 60 s", "× true"),
        Column("colour, first", "colour off, first 10 s", "levels"),
        Column("colour", "colour off, last 10 of 60 s", "levels"),
        Column("theme", "theme kept, last 10 of 60 s", "%", 100, note=themes),
        Column("drift error", "drift error (VDE)", ""),
        Column("late forks", "forks, last 10 of 60 s", "%", 100, note="deaf 20"),
        Column("fps", "speed, one process", "fps"),
        Column("ms", "a block", "ms"),
        Column("bytes", "a session", "KiB", 1 / 1024),
    ]  # fmt: skip


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
            options.markdown.write_text(_markdown(found, shown))
    if len(found) == 1:
        _print_one(next(iter(found.items())), shown)
    else:
        _print_rows(found, shown)


def _check(options: EvaluateOptions) -> tuple[int, int]:
    """Open every setting once, so that a bad one is told before any work."""
    sizes = set()
    for setting in options.settings:
        world = open_world(setting.world, setting.dtype, options.device, 1)
        if world.config.actions is None or world.config.fps != 16 or world.config.block_frames != 1:
            raise ValueError(
                f"only a maze (blocks of one latent frame, 16 fps) has a simulator to score "
                f"against, not {setting.world!r}"
            )
        setting.session(world).close()
        sizes.add((world.config.height, world.config.width))
    if len(sizes) > 1:
        raise ValueError(f"worlds of one size can be set side by side, not {sorted(sizes)}")
    return sizes.pop()


Row = Mapping[str, np.ndarray]


def evaluate(
    options: EvaluateOptions, given: Material, processes: int
) -> Iterator[tuple[str, Row]]:
    """Every score of every setting, ``(setting, {score: one value for each walk})``."""
    with _progress() as progress:
        for setting in options.settings:
            task = progress.add_task(str(setting), total=given.total)
            note: Callable[[], None] = partial(progress.advance, task)
            world = open_world(setting.world, setting.dtype, options.device, 1)
            alone = {**_speed(world, setting), **_ceiling(world, given)}
            scores = score(partial(_open, setting, options.device), given, processes, note)
            if options.sheet is not None:
                _sheet(options.sheet, _subject(world, setting), given)
            yield str(setting), {**scores, **alone}


def _open(setting: Setting, device: str) -> Subject:
    return _subject(open_world(setting.world, setting.dtype, device, 1), setting)


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


def mean(values: np.ndarray) -> tuple[float, float, int]:
    """Mean, half of its 95 % interval (Student's), and how many values count: NaN does not."""
    x = values[~np.isnan(values)]
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), 0.0, len(x)
    return float(x.mean()), _student(len(x) - 1) * float(x.std(ddof=1)) / len(x) ** 0.5, len(x)


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher; off by less than 1 % from 4 up)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96)
    return sum(term / freedom**power for power, term in enumerate(terms))


def _print_one(found: tuple[str, Row], shown: Sequence[Column]) -> None:
    name, row = found
    lines = []
    for column in shown:
        other, called = column.against
        beside = [column.note] if column.note else []
        if other in row:
            beside.insert(0, f"{called} {_number(column.scale * mean(row[other])[0], column)}")
        walks = mean(row[column.score])[2]
        words = "; ".join(beside)
        lines.append([column.title, _cell(row, column), column.unit, str(walks), words])
    heads = ("score", "mean ± 95 %", "unit", "walks", "beside it")
    print_table(f"{name}, on held-out maps", heads, lines)


def _print_rows(found: Mapping[str, Row], shown: Sequence[Column]) -> None:
    """Settings as rows, a few scores in each table, so that it fits a terminal."""
    for first in range(0, len(shown), PER_TABLE):
        part = shown[first : first + PER_TABLE]
        heads = [f"{column.title} {column.unit}".strip() for column in part]
        lines = [[name, *(_cell(row, column) for column in part)] for name, row in found.items()]
        print_table("" if first else "on held-out maps", ("setting", *heads), lines)


PER_TABLE = 4


def _cell(row: Row, column: Column) -> str:
    if column.score not in row:
        return ""
    value, half, walks = mean(row[column.score])
    spread = f" ± {_number(column.scale * half, column)}" if walks > 1 else ""
    return f"{_number(column.scale * value, column)}{spread}"


def _number(value: float, column: Column) -> str:
    digits = 1 if column.unit in ("%", "fps") else 0 if column.unit == "KiB" else 2
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _markdown(found: Mapping[str, Row], shown: Sequence[Column]) -> str:
    kept = [column for column in shown if column.score in IN_MARKDOWN]
    heads = ["setting", *(f"{column.title} {column.unit}".strip() for column in kept)]
    lines = [heads, ["---"] + ["--:"] * len(kept)]
    lines += [
        [f"`{name}`", *(_cell(row, column) for column in kept)] for name, row in found.items()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
