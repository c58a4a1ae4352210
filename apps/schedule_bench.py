"""`worldsim schedule bench`: a schedule over ranks beside its serial form, on this machine."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from worldsim.apps.opening import open_share, open_world
from worldsim.apps.report import machine, print_table, write_json
from worldsim.config import Settings
from worldsim.fingerprint import digest_of
from worldsim.models.autoencoder import GROUP
from worldsim.share import shares
from worldsim.simulate import Costs, simulate
from worldsim.state import Block
from worldsim.streaming.launch import Ranks
from worldsim.streaming.leader import Run
from worldsim.streaming.sinks import check_writable
from worldsim.wavefront import spread
from worldsim.world import World

WARM_UP = 6  # blocks before any is timed
MESSAGE = 5e-4  # seconds of packing or unpacking a message, with its order


@dataclass(frozen=True)
class RanksBenchOptions:
    """What the command line was given."""

    name: str
    world: str
    ranks: int
    steps: int | None
    cache: str | None
    blocks: int
    dtype: str
    decoding: bool
    sleep_ms: float | None
    json: Path | None


@dataclass(frozen=True)
class Measured:
    """Of one run: seconds a block once it flows, until the first one, and in flight; seconds of
    the last rank's parts of a block, and how much its passes vary (see `Costs`); hashes of
    latents."""

    block: float
    first: float
    flight: float
    parts: dict[str, float]
    spread: float
    hashes: tuple[str, ...]


def run(options: RanksBenchOptions) -> None:
    """Measure and print; see `measure`.

    Raises:
        ValueError: for options that cannot be.
    """
    if options.blocks < 3 * WARM_UP:
        raise ValueError(f"--blocks must be {3 * WARM_UP} or more, got {options.blocks}")
    if options.json is not None:
        check_writable(options.json)
    figures = measure(options)
    title = f"{options.name}: {options.ranks} ranks of one thread each beside one"
    print_table(title, ("figure", "value"), [[k, str(v)] for k, v in _rows(figures)])
    write_json(options.json, figures)
    if not (figures["same"] and figures["complete"]):
        raise SystemExit("worldsim: the ranks did not do what the serial form does")


def measure(options: RanksBenchOptions) -> dict[str, Any]:
    """Seconds a block of both, whether they made the same, and what the simulation says of it."""
    world = open_world(options.world, options.dtype, "cpu", 1)
    told = {"seed": 0, "steps": options.steps, "cache": options.cache, "schedule": options.name}
    settings = world.settings(**told)  # type: ignore[arg-type]
    parts = shares(settings.schedule, world.transformer.config.num_layers, options.ranks)
    sleep = None if options.sleep_ms is None else options.sleep_ms / 1e3
    if sleep is not None and settings.schedule.order == "layers":
        raise ValueError("--sleep-ms is for steps on ranks: tpp and hiar")
    plain = Run(
        partial(open_share, options.world, options.dtype, "cpu", None), options.ranks, told,
        blocks=options.blocks, decoding=options.decoding and sleep is None, overlap=False,
        rehearse=sleep, log=True,
    )  # fmt: skip
    one = _run(replace(plain, ranks=1), shares(settings.schedule, 1, 1), world)[0]
    many, ranks = _run(plain, parts, world)
    grid = spread(settings.schedule, options.blocks, options.ranks)
    ran = [cell for rank in range(options.ranks) for cell in ranks.ran[rank]]
    declared = [
        (c.name.kind, c.name.block, c.name.level) for c in grid.cells if c.name.kind != "decode"
    ]
    figures: dict[str, Any] = {
        "name": options.name,
        "world": options.world,
        "ranks": options.ranks,
        "steps": len(settings.schedule.steps),
        "dtype": settings.dtype,
        "decoding": plain.decoding,
        "blocks": options.blocks,
        "block_ms": [1e3 * one.block, 1e3 * many.block],
        "first_ms": [1e3 * one.first, 1e3 * many.first],
        "flight_ms": [1e3 * one.flight, 1e3 * many.flight],
        "fps": [GROUP * world.config.block_frames / x.block for x in (one, many)],
        "speedup": one.block / many.block,
        "same": one.hashes == many.hashes,
        "complete": sorted(ran) == sorted(declared),
        "machine": machine(),
    }
    if sleep is not None:
        figures["ideal_share"] = grid.period * sleep / many.block
    if parts[-1].steps and settings.schedule.order != "layers":
        costs = _costs(many, settings, len(parts[-1].steps))
        late = many.first - simulate(grid, replace(costs, spread=0.0)).first
        said = simulate(grid, replace(costs, cold=max(0.0, late / options.ranks)))
        figures["simulated"] = {"block_ms": 1e3 / said.fps, "flight_ms": 1e3 * said.delay}
    return figures


def _costs(measured: Measured, settings: Settings, steps: int) -> Costs:
    """What the last rank's passes took in this very run, beside the others: cores that share a
    memory are slower together than one alone. It has so many steps, and decodes between them."""
    took = {name: measured.parts.get(name, 0.0) for name in ("denoise", "commit", "decode")}
    passes, denoise = len(settings.schedule.commit_cells(0)), took["denoise"] / steps
    if not passes:  # then it is no pass: what steps left behind is published
        denoise += took["commit"] / steps
    return Costs(
        denoise=denoise, commit=took["commit"] / steps if passes else 0.0, decode=took["decode"],
        own_thread=False, message=MESSAGE, spread=measured.spread,
    )  # fmt: skip


def _run(run: Run, parts: Any, world: World) -> tuple[Measured, Ranks]:
    with Ranks(run, parts, world) as ranks:
        return _timed(ranks.blocks()), ranks


def _timed(blocks: Iterable[Block]) -> Measured:
    came, flights, hashes, first = [], [], [], 0.0
    timings: dict[str, list[float]] = {}
    for block in blocks:
        came.append(time.perf_counter())
        first = first or block.timings["flight"]
        flights.append(block.timings["flight"])
        hashes.append(digest_of(block.latents))
        if len(came) > WARM_UP:
            for name, seconds in block.timings.items():
                timings.setdefault(name, []).append(seconds)
    gaps = [b - a for a, b in zip(came[WARM_UP:], came[WARM_UP + 1 :], strict=False)]
    parts = {name: statistics.fmean(seconds) for name, seconds in timings.items()}
    passes = timings.get("denoise", [])  # none, on a rank that only decodes
    spread = statistics.pstdev(passes) / statistics.fmean(passes) if passes else 0.0
    return Measured(
        statistics.fmean(gaps), first, statistics.fmean(flights[WARM_UP:]), parts, spread,
        tuple(hashes),
    )  # fmt: skip


def _rows(figures: dict[str, Any]) -> Iterable[tuple[str, object]]:
    for name, unit in (
        ("block", "ms a block"),
        ("first", "ms to the first"),
        ("flight", "ms in flight"),
    ):
        one, many = figures[f"{name}_ms"]
        yield f"{unit}: one rank → all", f"{one:.1f} → {many:.1f}"
    yield "pictures a second", " → ".join(f"{fps:.1f}" for fps in figures["fps"])
    yield "times as fast", f"{figures['speedup']:.2f}"
    yield "the same latents", "yes" if figures["same"] else "NO"
    yield "every cell on one rank, once", "yes" if figures["complete"] else "NO"
    if "ideal_share" in figures:
        yield "of the ideal", f"{figures['ideal_share']:.1%}"
    if "simulated" in figures:
        said = figures["simulated"]
        yield "simulated: ms a block", f"{said['block_ms']:.1f}"
        yield "simulated: ms in flight", f"{said['flight_ms']:.1f}"
