"""`worldsim replay`: make a recorded run again, compare it, and show it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from worldsim.apps.opening import DTYPES, MADE, open_world, shown_scale
from worldsim.bundle import BUNDLED
from worldsim.replay import Differs, Replay, Run, read_run
from worldsim.streaming.sinks import open_sink


@dataclass(frozen=True)
class ReplayOptions:
    """What the command line was given."""

    run: Path
    verify: bool
    out: str | None
    branch: int
    world: str | None
    scale: int
    device: str
    threads: int | None
    preset: str | None = None


def run_again(options: ReplayOptions) -> None:
    """Follow a replay file to its end.

    Raises:
        ValueError, OSError: one clear line, before anything is made.
        SystemExit: with code 1 at the first block that differs.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    run = read_run(options.run)
    if run.dtype not in DTYPES:
        raise ValueError(f"{options.run} does not say in which dtype it was made: it is damaged")
    world = open_world(
        _source(run, options), run.dtype, options.device, options.threads, options.preset
    )
    replay = Replay(world, run, options.verify)
    for difference in replay.told:
        console.print(f"worldsim: {difference}")
    if run.cut:
        console.print(f"worldsim: {options.run} was cut off after block line {run.blocks}")
    shown = set(run.way(options.branch))
    with contextlib.ExitStack() as stack:
        sink = None
        if options.out is not None:
            scale = options.scale or (1 if options.out == "-" else shown_scale(world))
            sink = stack.enter_context(open_sink(options.out, world.config.fps, scale))
        if not run.blocks:
            raise ValueError(f"{options.run} holds no block")
        made = 0
        try:
            for _, block in track(replay, "blocks", run.blocks, console=console):
                if sink is not None and made in shown:
                    sink.write(block.frames)
                made += 1
        except Differs as difference:
            raise SystemExit(f"worldsim: {difference}") from None
    verdict = "all as recorded, bit for bit" if options.verify else "made again, not compared"
    console.print(f"{made} blocks of {options.run}: {verdict}")


def _source(run: Run, options: ReplayOptions) -> str:
    """Where the world is. A file from elsewhere may name a folder, but nothing is downloaded for
    it."""
    if options.world is not None:
        return options.world
    source = str(run.head.get("source", ""))
    if source in (*BUNDLED, *MADE) or Path(source).is_dir():
        return source
    raise ValueError(f"{options.run} was made on {source!r}, which is not here: name it by --world")
