"""`worldsim bench`: where the time of a block goes, on this machine."""

import statistics
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from worldsim.apps.cache_times import cache_times
from worldsim.apps.compiling import compile_world
from worldsim.apps.dtype_times import DTYPES, dtype_times
from worldsim.apps.opening import MADE, shown_scale
from worldsim.apps.part_times import PartTimes, time_parts
from worldsim.apps.report import machine, print_table, write_json
from worldsim.apps.resident import peak_mib
from worldsim.apps.setting import Setting
from worldsim.parts import COMPUTED, PARTS
from worldsim.streaming.overlap import overlapped
from worldsim.streaming.pipeline import Writer
from worldsim.streaming.sinks import check_writable, open_sink
from worldsim.world import World

DIT = ("denoise", "commit")  # the transformer's own parts


@dataclass(frozen=True)
class BenchOptions:
    """What the command line was given."""

    setting: Setting
    blocks: int
    device: str
    threads: int | None
    json: Path | None
    compile: bool = False


def run(options: BenchOptions) -> None:
    """Measure and print; see `measure`.

    Raises:
        ValueError: for options that cannot be.
    """
    if options.blocks < 10:
        raise ValueError(f"--blocks must be 10 or more to mean anything, got {options.blocks}")
    if options.json is not None:
        check_writable(options.json)
    setting = options.setting
    world = setting.open(options.device, options.threads)
    figures = measure(world, options)
    print_table(
        "ms per block; roofline: its products and attention alone",
        ("part", "median", "p95", "roofline", "ratio", "GFLOP", "GFLOP/s alone"),
        [_row(part, figures) for part in PARTS],
    )
    session = figures["memory"]["session"] / 2**20
    context = " + ".join(f"{figures['context_ms'][name]:.2f}" for name in ("gather", "publish"))
    context += f" ({figures['context_share']:.1%} of denoise and commit)"
    print_table(
        "end to end",
        ("figure", "value"),
        [
            *_rates(figures),
            ["fps, parts in sequence", f"{figures['fps_serial']:.1f}"],
            ["fps, parts overlapped (as `worldsim stream`)", f"{figures['fps']:.1f}"],
            ["first picture after process start, s", f"{figures['first_picture_s']:.2f}"],
            ["peak memory, MiB", f"{figures['peak_mib']:.0f}"],
            ["a session: pages, copies, carry, latents, MiB", f"{session:.2f}"],
            ["context on the host, a block: gather + publish, ms", context],
        ],
    )
    write_json(options.json, figures)


def measure(world: World, options: BenchOptions) -> dict[str, Any]:
    """Times by part, throughput, first picture and memory, as one dictionary.

    Raises:
        ValueError: for a context that keeps everything: no two of its blocks are the same work.
    """
    setting = options.setting
    settings = world.settings(0, setting.steps, setting.cache, setting.schedule)
    warm_up = setting.warm_up(world)
    if warm_up is None:
        raise ValueError(
            "a context that keeps everything makes every block longer than the one before; "
            "give it an end, as in --cache recent=21"
        )
    if options.compile:
        compile_world(world, partial(setting.session, world), Console(stderr=True, highlight=False))
    fps = _overlapped(world, setting, warm_up, options.blocks)
    peak = peak_mib(world.device)  # a stream's: the roofline comes after it
    times = time_parts(world, setting, warm_up, options.blocks)
    ms = {part: statistics.median(times.ms[part]) for part in PARTS}
    context = cache_times(world, setting, warm_up, options.blocks)
    cores = torch.get_num_threads()
    work = sum(times.flops[part] for part in DIT)
    return {
        "world": world.config.name,
        "size": [world.config.height, world.config.width],
        "dtype": settings.dtype,
        "device": str(world.device),
        "compiled": options.compile,
        "steps": len(settings.schedule.step_list(warm_up)),
        "sampler": settings.sampler,
        "cache": settings.cache.line(),
        "warm_up": warm_up,
        "blocks": options.blocks,
        "pictures_per_block": times.pictures,
        "ms": ms,
        "ms_p95": {part: statistics.quantiles(times.ms[part], n=20)[-1] for part in PARTS},
        "roofline": _roofline(times),
        "dit_ratio": sum(ms[part] for part in DIT)
        / sum(statistics.median(times.roofline_ms[part]) for part in DIT),
        "gflops_per_core": work / sum(ms[part] for part in DIT) / 1e6 / cores,
        "gemm_gflops_per_core": times.gemm / 1e9 / cores,
        "dtype_ms": _dtypes(world, setting, warm_up, options),
        "fps_serial": 1e3 * times.pictures / sum(ms.values()),
        "fps": fps,
        "first_picture_s": _first_picture(options),
        "peak_mib": peak,
        "context_ms": context,
        "context_share": sum(context.values()) / (ms["denoise"] + ms["commit"]),
        "memory": world.memory_report(setting.cache).figures(),
        "machine": machine(),
    }


def _roofline(times: PartTimes) -> dict[str, dict[str, float]]:
    """For each computed part: the kernels alone, what a block takes as often as them, its work."""
    figures = {}
    for part in COMPUTED:
        alone = statistics.median(times.roofline_ms[part])
        figures[part] = {
            "ms": alone,
            "ratio": statistics.median(times.ms[part]) / alone,
            "gflop": times.flops[part] / 1e9,
        }
    return figures


def _dtypes(
    world: World, setting: Setting, warm_up: int, options: BenchOptions
) -> dict[str, float]:
    """Of worlds that are made here, on a CPU: what each dtype takes."""
    if setting.world not in MADE or world.device.type != "cpu" or options.compile:
        return {}
    return dtype_times(setting, warm_up, min(options.blocks, 12))


def _rates(figures: dict[str, Any]) -> list[list[str]]:
    rates = f"{figures['gflops_per_core']:.0f}"
    if figures["gemm_gflops_per_core"]:
        rates += f"; its fastest product alone: {figures['gemm_gflops_per_core']:.0f}"
    rows = [
        ["denoise and commit, times their roofline", f"{figures['dit_ratio']:.2f}"],
        ["denoise and commit, GFLOP/s per thread", rates],
    ]
    if figures["dtype_ms"]:
        single, half = (figures["dtype_ms"][dtype] for dtype in DTYPES)
        told = f"{single:.1f} : {half:.1f} ms = {single / half:.2f}"
        rows.append(["denoise and commit, float32 : bfloat16", told])
    return rows


def _row(part: str, figures: dict[str, Any]) -> list[str]:
    row = [part, f"{figures['ms'][part]:.2f}", f"{figures['ms_p95'][part]:.2f}"]
    if part not in figures["roofline"]:
        return [*row, "", "", "", ""]
    alone = figures["roofline"][part]
    return [
        *row, f"{alone['ms']:.2f}", f"{alone['ratio']:.2f}", f"{alone['gflop']:.2f}",
        f"{1e3 * alone['gflop'] / alone['ms']:.0f}",
    ]  # fmt: skip


def _overlapped(world: World, setting: Setting, warm_up: int, blocks: int) -> float:
    """Pictures per second of the pipeline that `worldsim stream` runs, after the warm-up."""
    stream = world.stream(
        blocks=warm_up + blocks, steps=setting.steps, cache=setting.cache,
        schedule=setting.schedule, decoding=False,
    )  # fmt: skip
    pictures, began = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        sink = open_sink(Path(folder, "bench.mp4"), world.config.fps, shown_scale(world))
        with Writer(sink) as writer:
            made = overlapped(world, stream, writer)
            console = Console(stderr=True)
            for block in track(made, "overlapped", warm_up + blocks, console=console):
                if block.index == warm_up - 1:
                    began = time.perf_counter()
                elif block.index >= warm_up:
                    pictures += len(block.frames)
        return pictures / (time.perf_counter() - began)


def _first_picture(options: BenchOptions) -> float:
    """Seconds from starting a process to the first byte of its first picture; best of three."""
    script, setting = Path(sysconfig.get_path("scripts"), "worldsim"), options.setting
    given = {
        "world": setting.world,
        "steps": setting.steps,
        "cache": setting.cache,
        "schedule": setting.schedule,
        "dtype": setting.dtype,
        "device": options.device,
        "threads": options.threads,
    }
    command = [str(script), "stream", "-", "--seconds", "0.5"]
    for name, value in given.items():
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--compile"] if options.compile else []
    return min(_until_first_byte(command) for _ in range(3))


def _until_first_byte(command: list[str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with code {process.returncode}")
    return seconds
