"""The commands of `worldsim schedule`."""

from pathlib import Path
from typing import Annotated

import typer

from worldsim.apps.cli_options import Cache, Dtype, Json, Steps, WorldName
from worldsim.apps.loading import loading

app = typer.Typer(no_args_is_help=True, help="Look at schedules before they run.")


@app.command(
    epilog="Examples:  worldsim schedule show tpp --ranks 4  ·  worldsim schedule show hiar "
    "--blocks 8 --steps 4 --out grid.png"
)
def show(
    name: Annotated[
        str,
        typer.Argument(
            help="serial, fused, reuse, diagonal, disa, tpp, batch, ring, hiar, rolling, lag1, …"
        ),
    ],
    blocks: Annotated[int, typer.Option(help="Blocks to show.")] = 8,
    steps: Annotated[int, typer.Option(help="Denoising steps of a block.")] = 4,
    ranks: Annotated[int | None, typer.Option(help="Default: one for each step.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also draw it as this .png.")] = None,
) -> None:
    """Which cell runs when and on which rank; bubbles, the longest chain, delay of a control."""
    with loading():
        from worldsim.apps.schedule_show import ShowOptions, run

    run(ShowOptions(name, blocks, steps, ranks, out))


@app.command(
    epilog="Example:  worldsim schedule simulate tpp --ranks 5 --stage-ms 40 --decode-ms 30 "
    "--link-gbps 100 --latency-us 20"
)
def simulate(
    name: Annotated[str, typer.Argument(help="As for 'worldsim schedule show'.")],
    stage_ms: Annotated[float, typer.Option(help="One pass of one block through all layers.")],
    commit_ms: Annotated[float | None, typer.Option(help="A context pass; default: alike.")] = None,
    decode_ms: Annotated[float, typer.Option(help="Decoding a block.")] = 0.0,
    world: WorldName = "maze",
    steps: Steps = None,
    cache: Cache = None,
    ranks: Annotated[int | None, typer.Option(help="Default: one for each step.")] = None,
    link_gbps: Annotated[float, typer.Option(help="Of a link, Gbit a second.")] = 100.0,
    latency_us: Annotated[float, typer.Option(help="Of a link.")] = 20.0,
    message_us: Annotated[float, typer.Option(help="Packing a message, on each side.")] = 300.0,
    batch: Annotated[
        float, typer.Option(help="What a further row of a batch costs, of the first one's time.")
    ] = 1.0,
    spread: Annotated[
        float, typer.Option(help="How much passes vary, e.g. 0.05: a standard deviation's share.")
    ] = 0.0,
    cold_ms: Annotated[
        float, typer.Option(help="How much longer the first pass of a rank takes.")
    ] = 0.0,
) -> None:
    """Foretell speed, first frame, delay of a control and memory of each rank."""
    with loading():
        from worldsim.apps.schedule_simulate import SimulateOptions, run

    run(
        SimulateOptions(
            name, world, stage_ms, commit_ms, decode_ms, steps, ranks, link_gbps, latency_us,
            message_us, batch, cache, spread, cold_ms,
        )
    )  # fmt: skip


@app.command(
    "bench",
    epilog="Examples:  worldsim schedule bench tpp --ranks 2  ·  worldsim schedule bench hiar "
    "--ranks 4 --sleep-ms 50",
)
def bench_ranks(
    name: Annotated[str, typer.Argument(help="tpp, hiar or ring.")],
    world: WorldName = "maze",
    ranks: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 2,
    steps: Steps = 4,
    cache: Cache = None,
    blocks: Annotated[int, typer.Option(help="Blocks to make.")] = 60,
    dtype: Dtype = "float32",
    decoding: Annotated[bool, typer.Option(help="Make pictures, too.")] = True,
    sleep_ms: Annotated[
        float | None, typer.Option(help="Have each pass sleep so long instead of computing.")
    ] = None,
    json: Json = None,
) -> None:
    """Time a schedule over ranks beside the same on one, and compare what they make."""
    with loading(ranks):
        from worldsim.apps.schedule_bench import RanksBenchOptions, run

    run(
        RanksBenchOptions(name, world, ranks, steps, cache, blocks, dtype, decoding, sleep_ms, json)
    )
