"""A schedule's grid as a picture."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from worldsim.apps.schedule_show import COLOURS, label, lines_of
from worldsim.wavefront import Grid, Name

INK, FAINT, PAPER = "#22252b", "#9aa1ad", "#ffffff"
BOX, GAP = 0.86, 0.07  # of a tick


def draw(grid: Grid, title: str, notes: Sequence[str], out: Path) -> None:
    """Write a PNG: a row for each rank (and each row of its batch), a column for each tick.

    Filled boxes denoise, hollow ones commit or decode; thin lines lead to what a cell takes or
    reads, the thick one is a longest chain; hatched is a bubble.
    """
    rows = lines_of(grid)
    width = min(40.0, max(7.0, 1.6 + 0.56 * grid.ticks))
    height = 1.9 + 0.56 * len(rows)
    figure, axes = pyplot.subplots(figsize=(width, height), facecolor=PAPER)
    places = {
        name: (tick, row) for row, (_, cells) in enumerate(rows) for tick, name in cells.items()
    }
    _bubbles(axes, grid, rows)
    _lines(axes, grid, places)
    for name, (tick, row) in places.items():
        _box(axes, name, tick, row)
    axes.set_xlim(-0.1, grid.ticks + 0.1)
    axes.set_ylim(len(rows) + 0.05, -0.05)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], [name for name, _ in rows])
    every = max(1, grid.ticks // 24)
    ticks = range(0, grid.ticks, every)
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("tick", color=FAINT, loc="right")
    axes.tick_params(length=0, colors=INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=10, fontweight="bold")
    figure.tight_layout(rect=(0, 0.62 / height, 1, 1))
    figure.text(0.015, 0.16 / height, "\n".join(notes), fontsize=8.5, color="#555b66", va="bottom")
    figure.savefig(out, dpi=160, facecolor=PAPER)
    pyplot.close(figure)


def _bubbles(axes: Axes, grid: Grid, rows: Sequence[tuple[str, dict[int, Name]]]) -> None:
    for row, (_, cells) in enumerate(rows):
        for tick in set(range(grid.ticks)) - set(cells):
            axes.add_patch(Rectangle(
                (tick + GAP, row + GAP), BOX, BOX, facecolor="#f6f7f9", edgecolor="#e3e6eb",
                hatch="////", linewidth=0,
            ))  # fmt: skip


def _box(axes: Axes, name: Name, tick: int, row: int) -> None:
    colour = COLOURS[name.block % len(COLOURS)]
    filled = name.kind == "denoise"
    axes.add_patch(FancyBboxPatch(
        (tick + GAP + 0.06, row + GAP + 0.06), BOX - 0.12, BOX - 0.12,
        boxstyle="round,pad=0.06,rounding_size=0.16", linewidth=1.6, edgecolor=colour,
        facecolor=colour if filled else PAPER, zorder=3,
    ))  # fmt: skip
    axes.text(
        tick + 0.5, row + 0.51, label(name), ha="center", va="center", fontsize=8.5, zorder=4,
        color=PAPER if filled else colour, fontweight="bold",
    )  # fmt: skip


def _lines(axes: Axes, grid: Grid, places: dict[Name, tuple[int, int]]) -> None:
    chain = set(pairwise(grid.critical))
    for cell in grid.cells:
        read = (grid.writers[key, cell.name.part] for key in cell.reads)
        # Of all that a cell reads only the newest: the others were there even earlier.
        newest = max(read, key=lambda name: (grid.at[name].tick, name.block), default=None)
        for name in dict.fromkeys((*cell.after, *((newest,) if newest else ()))):
            long = (name, cell.name) in chain
            _line(axes, places[name], places[cell.name], long)


def _line(axes: Axes, start: tuple[int, int], end: tuple[int, int], long: bool) -> None:
    (x0, y0), (x1, y1) = start, end
    same_row, next_to = y0 == y1, x1 - x0 == 1
    bend = 0.0 if not same_row or next_to else -0.32
    axes.add_patch(FancyArrowPatch(
        (x0 + 0.5 + (0.4 if same_row and next_to else 0), y0 + 0.5),
        (x1 + (0.1 if x1 > x0 else 0.5), y1 + 0.5),
        arrowstyle="-|>" if long else "-", mutation_scale=7, shrinkA=0, shrinkB=0,
        connectionstyle=f"arc3,rad={bend}", linewidth=2.0 if long else 0.8,
        color=INK if long else FAINT, alpha=1.0 if long else 0.7, zorder=2 if long else 1,
    ))  # fmt: skip
