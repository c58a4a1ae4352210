"""`worldsim schedule show`: which cell runs when and where, on the terminal and as a picture."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from worldsim.apps.report import counted
from worldsim.lines import NAMES, is_name, named, read
from worldsim.schedule import CLEAN, Schedule
from worldsim.streaming.sinks import check_writable
from worldsim.wavefront import Grid, Name, spread

SHIFT = 5.0  # of no weight here: it moves levels, not cells
COLOURS = ("#4c9be8", "#f2a541", "#63b179", "#d9669b", "#8b7bd8", "#3fb8af", "#e2725b", "#a3a847")

LEGEND = (
    "b·s denoises step s of block b · bC commits it clean, bCs at level s · bV decodes · "
    "underlined: a longest chain · '·' a bubble"
)


@dataclass(frozen=True)
class ShowOptions:
    """What the command line was given."""

    name: str
    blocks: int
    steps: int
    ranks: int | None
    out: Path | None


def run(options: ShowOptions) -> None:
    """Print a schedule's grid and figures; draw it where there is ``out``.

    Raises:
        ValueError, OSError: one clear line, before anything is printed.
    """
    if not 1 <= options.blocks <= 200:
        raise ValueError(f"--blocks must be in 1…200, got {options.blocks}")
    if options.out is not None:
        if options.out.suffix != ".png":
            raise ValueError(f"--out is a .png file, got {str(options.out)!r}")
        check_writable(options.out)
    schedule = schedule_of(options.name, options.steps)
    ranks = ranks_of(schedule, options.ranks)
    grid = spread(schedule, options.blocks, ranks)
    title = f"{options.name}: {describe(options.name)}"
    console = Console(highlight=False)
    console.print(title, style="bold")
    print_grid(grid, console)
    for line in figures(grid):
        console.print(line)
    if options.out is not None:
        from worldsim.apps.grid_picture import draw

        draw(grid, title, figures(grid), options.out)
        Console(stderr=True, highlight=False).print(f"drawn: {options.out}")


def schedule_of(line: str, steps: int) -> Schedule:
    """A schedule by its name or line, of so many equal steps (where it has none of its own).

    Raises:
        ValueError: for a name, a line or a number that cannot be.
    """
    return read(line, Schedule.uniform(steps, SHIFT), "renoise", numbered=False)[0]


def ranks_of(schedule: Schedule, asked: int | None) -> int:
    """How many ranks to show: those asked for, or one for each step or a pair for a ring."""
    if asked is not None:
        return asked
    return {"steps": len(schedule.steps), "layers": 2}.get(schedule.order, 1)


def describe(line: str) -> str:
    """What the name in a line stands for, in words."""
    words = line.partition(":")[0].split("+")
    return named(next(filter(is_name, words), "serial")).says


def names() -> str:
    """All names, for help."""
    return ", ".join((*NAMES, "lag1", "lag2", "…"))


def print_grid(grid: Grid, console: Console) -> None:
    """A row for each rank and row of its batch, a column for each tick; wide ones are folded."""
    rows = lines_of(grid)
    width = max(len(label(name)) for name in grid.at) + 1
    room = max(1, (console.width - 9) // width)
    critical = set(grid.critical)
    for first in range(0, grid.ticks, room):
        columns = range(first, min(first + room, grid.ticks))
        console.print(
            Text(f"{'tick':>8} " + "".join(f"{tick:<{width}}" for tick in columns), style="dim"),
            soft_wrap=True,
        )
        for rank, cells in rows:
            line = Text(f"{rank:>8} ", style="dim")
            for tick in columns:
                name = cells.get(tick)
                if name is None:
                    line.append(f"{'·':<{width}}", style="dim")
                    continue
                style = COLOURS[name.block % len(COLOURS)]
                style += " bold underline" if name in critical else ""
                line.append(label(name), style=style)
                line.append(" " * (width - len(label(name))))
            console.print(line, soft_wrap=True)
    console.print(Text(LEGEND, style="dim"))


def lines_of(grid: Grid) -> list[tuple[str, dict[int, Name]]]:
    """Rows to draw: the name of each, and its cell at each tick."""
    rows: list[tuple[str, dict[int, Name]]] = []
    for rank in range(grid.ranks):
        mine = [cell for cell in grid.cells if cell.rank == rank]
        levels = sorted({cell.name.level for cell in mine} - {CLEAN})
        if grid.together == "alone":
            rows.append((f"rank {rank}", {cell.tick: cell.name for cell in mine}))
            continue
        for level in levels:  # rows of one batch
            row = {c.tick: c.name for c in mine if c.name.level == level}
            rows.append((f"rank {rank}" if level == levels[0] else "", row))
        commits = {cell.tick: cell.name for cell in mine if cell.name.level == CLEAN}
        if commits:
            rows.append(("", commits))
    return rows


def label(name: Name) -> str:
    """A cell in a few letters."""
    if name.kind == "decode":
        return f"{name.block}V"
    if name.kind == "commit":
        return f"{name.block}C" + ("" if name.level == CLEAN else str(name.level))
    return f"{name.block}·{name.level}"


def figures(grid: Grid) -> list[str]:
    """What a grid comes to, in lines."""
    idle = [grid.bubbles(rank) for rank in range(grid.ranks)]
    share = sum(idle) / (grid.ranks * grid.ticks)
    return [
        f"{grid.blocks} blocks in {grid.ticks} ticks · first block after {grid.done(0) + 1}, "
        f"then one every {counted(grid.period, 'tick')}",
        f"longest chain {len(grid.critical)} cells · bubbles {share:.0%} "
        f"({', '.join(map(str, idle))} ticks by rank)",
        f"control to photon: {counted(grid.delay, 'block')} from the step that takes it up to "
        "its own finished block",
    ]
