"""The commands that measure: `bench`, `evaluate`, `compare`, `soak`."""

from pathlib import Path
from typing import Annotated

import typer

from worldsim.apps.cli_options import (
    CACHE,
    DTYPE,
    SCHEDULE,
    STEPS,
    Cache,
    Compile,
    Controls,
    Device,
    Dtype,
    Json,
    Prompt,
    Scale,
    Schedule,
    Seconds,
    Seed,
    Steps,
    Threads,
)
from worldsim.apps.loading import loading

app = typer.Typer()


@app.command(
    "bench",
    epilog="Examples:  worldsim bench --json bench.json  ·  worldsim bench --model medium"
    "  ·  worldsim bench --play",
)
def bench(
    model: Annotated[
        str,
        typer.Option(
            help="'maze', 'medium' or 'tiny' (random weights), a world folder, or a hub id."
        ),
    ] = "maze",
    blocks: Annotated[int, typer.Option(help="Blocks to time, after the warm-up.")] = 60,
    steps: Steps = None,
    cache: Cache = None,
    schedule: Schedule = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    compile: Compile = False,
    threads: Threads = None,
    play: Annotated[
        bool,
        typer.Option(
            "--play",
            help="Measure `worldsim play` in headless Chromium instead: from a key to the picture "
            "that shows it, as many keys as --blocks.",
        ),
    ] = False,
    json: Json = None,
) -> None:
    """Time a world by part, beside its matrix products alone; speed, first frame, memory."""
    with loading():
        from worldsim.apps.setting import Setting

    setting = Setting(model, steps, cache, schedule, dtype)
    if play:
        from worldsim.apps.bench_play import BenchPlayOptions
        from worldsim.apps.bench_play import run as run_play
        from worldsim.apps.play import PlayOptions

        options = PlayOptions(setting, device=device, threads=threads)
        run_play(BenchPlayOptions(options, blocks, json))
        return
    from worldsim.apps.bench import BenchOptions, run

    run(BenchOptions(setting, blocks, device, threads, json, compile=compile))


@app.command(
    "evaluate",
    epilog="Examples:  worldsim evaluate --steps 1 --steps 2 --cache recent=11"
    "  ·  worldsim evaluate --table caches --markdown table.md  ·  worldsim evaluate --self-test",
)
def evaluate(
    world: Annotated[
        list[str] | None, typer.Option(help="'maze', 'maze-short' or a maze's folder.")
    ] = None,
    steps: Annotated[list[int] | None, STEPS] = None,
    cache: Annotated[list[str] | None, CACHE] = None,
    schedule: Annotated[list[str] | None, SCHEDULE] = None,
    dtype: Annotated[list[str] | None, DTYPE] = None,
    table: Annotated[
        str | None,
        typer.Option(help="A table's settings: settings, steps, caches, schedules."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Score the simulator, whole and with known faults.")
    ] = False,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="Of rollout, forks, returning, prompts, minute; default: all."),
    ] = None,
    states: Annotated[int, typer.Option(help="Held-out walks for each measure.")] = 100,
    processes: Annotated[
        int | None, typer.Option(help="Walks scored at a time; default: one a core.")
    ] = None,
    device: Device = "cpu",
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet, true above generated.")] = None,
    json: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a table for people.")] = None,
) -> None:
    """Score a maze world against its simulator, on maps that training never saw.

    --world, --steps, --cache, --schedule, --dtype may be given several times: one row for each
    combination.
    """
    with loading():
        from worldsim.apps.evaluate import EvaluateOptions, run
        from worldsim.apps.setting import every
        from worldsim.apps.tables import table as rows_of

    measures = tuple(name.strip() for said in measure or () for name in said.split(","))
    worlds = world or ["maze"]
    if table is None:
        settings = every(
            worlds, steps or [None], cache or [None], schedule or [None], dtype or ["auto"]
        )
    elif any((steps, cache, schedule, dtype)):
        raise ValueError("--table brings its own settings: leave out all others but --world")
    else:
        settings = [row for name in worlds for row in rows_of(table, name)]
    run(
        EvaluateOptions(
            tuple(settings), measures, states, device, processes, self_test, sheet,
            json, markdown,
        )
    )  # fmt: skip


@app.command(
    "compare",
    epilog="Example:  worldsim compare steps=2 'steps=6 cache=recent=11' --controls 'W*12 L*5'"
    " --seconds 20 --out side.mp4",
)
def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A setting: 'default', or any of world=, steps=, cache=, schedule=, dtype=.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The setting to hold against it.")],
    prompt: Prompt = None,
    controls: Controls = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    out: Annotated[str | None, typer.Option(help="Video of both, side by side.")] = None,
    scale: Scale = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Run two settings on one seed and one script: likeness by second, drift, speed, memory."""
    with loading():
        from worldsim.apps.compare import CompareOptions, run

    run(CompareOptions(a, b, prompt, controls, seconds, seed, out, scale, device, threads, json))


@app.command(
    "soak",
    epilog="Examples:  worldsim soak  ·  worldsim soak --cache 'sink=3,recent=9:int4' "
    "--blocks 3000",
)
def soak(
    blocks: Annotated[int, typer.Option(help="Blocks to stream.")] = 10_000,
    world: Annotated[
        str, typer.Option(help="'tiny' (random weights), 'maze', a world folder, or a hub id.")
    ] = "tiny",
    cache: Cache = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Stream for long, and fail if memory grows or pages move."""
    with loading():
        from worldsim.apps.setting import Setting
        from worldsim.apps.soak import SoakOptions, run

    run(SoakOptions(Setting(world, cache=cache, dtype=dtype), blocks, device, json))
