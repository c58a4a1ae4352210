"""The commands that write what one sees: `stream`, `replay`; `controls` tells a world's keys."""

from pathlib import Path
from typing import Annotated

import typer

from worldsim.apps.cli_options import (
    Cache,
    Compile,
    Controls,
    Device,
    Dtype,
    Preset,
    Prompt,
    Scale,
    Schedule,
    Seconds,
    Seed,
    Steps,
    Threads,
    WorldName,
)
from worldsim.apps.loading import loading

app = typer.Typer()


@app.command(
    "stream",
    epilog="Examples:  worldsim stream maze.mp4 --controls 'W*12 L*5 W*20' --prompt 'green hedges'"
    "  ·  worldsim stream - | ffplay -f rawvideo -pixel_format rgb24 -video_size 64x64 -",
)
def stream(
    out: Annotated[
        str, typer.Argument(help=".mp4, .gif, .webp, frames/ (PNG), or - for raw RGB to a pipe.")
    ],
    world: WorldName = "maze",
    prompt: Prompt = None,
    controls: Controls = None,
    seconds: Seconds = None,
    image: Annotated[
        Path | None, typer.Option(help="First picture, of the world's own size.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    cache: Cache = None,
    schedule: Schedule = None,
    preset: Preset = None,
    fps: Annotated[
        float | None, typer.Option(help="Playing speed; default: the world's own.")
    ] = None,
    scale: Scale = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    compile: Compile = False,
    threads: Threads = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Chrome trace (.json) of eight blocks, once the context is full (or from the "
            "middle of a short stream), and a summary of where their time went."
        ),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Replay file (.wsrun) of the run, for 'worldsim replay'.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="Processes that share the work, under --schedule tpp, hiar or ring."),
    ] = None,
    save_every: Annotated[
        int, typer.Option(help="Blocks after which ranks save their state beside the file.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an .mp4 of ranks that was broken off.")
    ] = False,
) -> None:
    """Walk through a world and write what one sees, as it is made."""
    with loading(ranks):
        from worldsim.apps.setting import Setting
        from worldsim.apps.stream import StreamOptions, run

    run(
        StreamOptions(
            out, Setting(world, steps, cache, schedule, dtype, preset), prompt, controls, seconds,
            seed, fps, scale, device, threads, profile, image, guidance, negative_prompt,
            compile=compile, record=record, ranks=ranks,
            save_every=save_every, resume=resume,
        )
    )  # fmt: skip


@app.command(
    "replay",
    epilog="Examples:  worldsim stream maze.mp4 --record run.wsrun  ·  worldsim replay run.wsrun "
    "--verify  ·  worldsim replay run.wsrun --out again.mp4",
)
def replay(
    run: Annotated[Path, typer.Argument(help="Replay file: of 'stream --record' or of the page.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every block; exit code 1 where one differs.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Video of it; what was rewound is not in it.")
    ] = None,
    branch: Annotated[int, typer.Option(help="Whose video: 0, or the number of a fork.")] = 0,
    world: Annotated[
        str | None, typer.Option(help="Where the world is; default: as it was recorded.")
    ] = None,
    preset: Preset = None,
    scale: Scale = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Make a recorded run again, and compare it block by block."""
    with loading():
        from worldsim.apps.replay import ReplayOptions, run_again

    run_again(ReplayOptions(run, verify, out, branch, world, scale, device, threads, preset))


@app.command(
    "controls", epilog="Examples:  worldsim controls  ·  worldsim controls --world path/to/folder"
)
def controls(world: WorldName = "maze") -> None:
    """Tell what one can do in a world: its keys, their letters in scripts, an example."""
    with loading():
        from worldsim.apps.controls import run

    run(world)
