"""The commands of the page: `play`, and `fuzz`, which attacks it."""

from typing import Annotated

import typer

from worldsim.apps.cli_options import (
    Cache,
    Device,
    Dtype,
    Preset,
    Schedule,
    Seed,
    Steps,
    Threads,
    WorldName,
)
from worldsim.apps.loading import loading

app = typer.Typer()


@app.command(
    "play",
    epilog="Examples:  worldsim play  ·  worldsim play --world ./sf --device cuda --idle-minutes 5"
    "  ·  worldsim play --host 0.0.0.0 --auth ada:secret --allow-origin https://play.example.org",
)
def play(
    world: WorldName = "maze",
    host: Annotated[
        str, typer.Option(help="Where to listen; any but loopback needs --auth or --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.")] = 7860,
    auth: Annotated[str | None, typer.Option(help="user:password that is asked for.")] = None,
    token: Annotated[
        str | None, typer.Option(help="What ?token= must be; 'new' makes and prints one.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Another address of the page, e.g. a proxy's; may be repeated."),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="The path below which a proxy serves it, e.g. /play.")
    ] = "",
    max_sessions: Annotated[
        int, typer.Option(help="Players at a time, if there is memory for so many.")
    ] = 8,
    idle_minutes: Annotated[
        float, typer.Option(help="A player who does nothing for so long makes room.")
    ] = 15.0,
    seed: Seed = 0,
    steps: Steps = None,
    cache: Cache = None,
    schedule: Schedule = None,
    preset: Preset = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    no_late_latching: Annotated[
        bool, typer.Option("--no-late-latching", help="Begin every block as soon as one may.")
    ] = False,
) -> None:
    """Walk around in a world, in the browser."""
    with loading():
        from worldsim.apps.play import PlayOptions, run
        from worldsim.apps.setting import Setting

    run(
        PlayOptions(
            Setting(world, steps, cache, schedule, dtype, preset), host, port, auth, token,
            tuple(allow_origin or ()), root_path, max_sessions, idle_minutes, device, threads, seed,
            not no_late_latching,
        )
    )  # fmt: skip


@app.command("fuzz", epilog="Example:  worldsim fuzz 100000")
def fuzz(
    messages: Annotated[int, typer.Argument(help="How many to send.")] = 100_000,
    world: WorldName = "maze",
    seed: Seed = 0,
) -> None:
    """Throw random and mutated messages at a server while somebody plays on it."""
    with loading():
        from worldsim.apps.fuzz import run
        from worldsim.apps.play import PlayOptions
        from worldsim.apps.setting import Setting

    run(messages, PlayOptions(Setting(world)), seed)
