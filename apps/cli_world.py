"""The commands about worlds themselves: `train`, `convert`, `doctor`, `sheet`."""

from pathlib import Path
from typing import Annotated

import typer

from worldsim.apps.cli_options import Cache, Device, Dtype, Json, Preset, Seed
from worldsim.apps.loading import loading

app = typer.Typer()


@app.command(
    "train", epilog="Examples:  worldsim train maze --ranks 2  ·  worldsim train maze --device cuda"
)
def train(
    what: Annotated[str, typer.Argument(help="The recipe: maze, maze-short or maze-tpp.")],
    out: Annotated[
        Path | None, typer.Option(help="Weights, curves, sheets; default: runs/RECIPE.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="cpu, gpu or tiny; default: by the device.")
    ] = None,
    device: Device = "cpu",
    ranks: Annotated[int, typer.Option(help="Processes of one thread each (CPU).")] = 1,
) -> None:
    """Train a world from nothing; run again to resume."""
    with loading():
        from worldsim.apps.train import run

    run(what, out, preset, device, ranks)


@app.command(
    "convert",
    epilog="Example:  worldsim convert self_forcing_dmd.pt sf --preset self-forcing "
    "--base Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
)
def convert(
    source: Annotated[Path, typer.Argument(help="A generator: .pt or .safetensors.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    preset: Annotated[
        str, typer.Option(help="How it is run: self-forcing, causvid, longlive, …")
    ] = "self-forcing",
    base: Annotated[
        str | None, typer.Option(help="Wan2.1 folder or hub id, for decoder and text encoder.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON of the model's sizes, where the file has none.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: as they are.")] = None,
    height: Annotated[int | None, typer.Option(help="Picture height; default: preset's.")] = None,
    width: Annotated[int | None, typer.Option(help="Picture width; default: preset's.")] = None,
) -> None:
    """Make a folder of a generator, which worldsim and diffusers read."""
    with loading():
        from worldsim.apps.convert import run

    run(source, out, preset, base, config, dtype, (height, width))


@app.command(
    "doctor",
    epilog="Examples:  worldsim doctor  ·  worldsim doctor --world self_forcing_dmd.pt "
    "--preset longlive --device cuda --memory 24GiB",
)
def doctor(
    world: Annotated[
        str,
        typer.Option(
            help="'maze', 'medium' or 'tiny', a world folder, a hub id, or a generator's file."
        ),
    ] = "maze",
    height: Annotated[int | None, typer.Option(help="Picture height; default: its own.")] = None,
    width: Annotated[int | None, typer.Option(help="Picture width; default: its own.")] = None,
    cache: Cache = None,
    dtype: Dtype = "auto",
    preset: Preset = None,
    base: Annotated[
        str | None,
        typer.Option(help="Of a generator's file: Wan2.1 folder or hub id, as in convert."),
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="A tiny decoder's file, in place of the world's own.")
    ] = None,
    device: Device = "cpu",
    memory: Annotated[
        str | None, typer.Option(help="That there is, e.g. 24GiB; default: what is free here.")
    ] = None,
    json: Json = None,
) -> None:
    """Foretell what a world will take, before it is loaded; exit code 1 where it does not fit."""
    with loading():
        from worldsim.apps.doctor import DoctorOptions, run

    run(
        DoctorOptions(
            world, cache, (height, width), dtype, preset, device, memory, json, base, decoder
        )
    )


@app.command("sheet", epilog="Example:  worldsim sheet maze.png --seed 3")
def sheet(
    out: Annotated[Path, typer.Argument(help="PNG file.")],
    seed: Seed = 0,
    rows: Annotated[int, typer.Option(help="Walks to show.")] = 12,
    seconds: Annotated[float, typer.Option(help="Length of each walk.")] = 12.0,
    height: Annotated[int, typer.Option(help="Picture height.")] = 64,
    width: Annotated[int, typer.Option(help="Picture width.")] = 64,
) -> None:
    """Look at the maze simulator itself: one walk a row, one theme each."""
    with loading():
        from worldsim.apps.sheet import run

    run(out, seed, rows, seconds, height, width)
