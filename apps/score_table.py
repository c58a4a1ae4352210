"""How the scoreboard looks: which scores there are, how they are averaged, printed and written."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from worldsim.apps.report import print_table
from worldsim.maze.board import Material

IN_MARKDOWN = (
    "second 1", "forks", "return", "return, swapped", "change shown", "sharpness", "motion",
    "late forks", "fps", "ms", "bytes",
)  # fmt: skip

Row = Mapping[str, np.ndarray]  # score -> one value for each walk


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


def print_one(found: tuple[str, Row], shown: Sequence[Column]) -> None:
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


def print_rows(found: Mapping[str, Row], shown: Sequence[Column]) -> None:
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


def markdown(found: Mapping[str, Row], shown: Sequence[Column]) -> str:
    kept = [column for column in shown if column.score in IN_MARKDOWN]
    heads = ["setting", *(f"{column.title} {column.unit}".strip() for column in kept)]
    lines = [heads, ["---"] + ["--:"] * len(kept)]
    lines += [
        [f"`{name}`", *(_cell(row, column) for column in kept)] for name, row in found.items()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
