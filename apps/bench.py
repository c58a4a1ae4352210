"""`worldsim bench`: where the time of a block goes, on this machine."""

import resource
import statistics
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from worldsim.apps.opening import open_world, shown_scale
from worldsim.apps.report import machine, print_table, write_json
from worldsim.streaming.pipeline import Writer, prefetch
from worldsim.streaming.sinks import check_writable, open_sink
from worldsim.world import World

WARM_UP = 24  # blocks: the context is full and every buffer is there
PARTS = ("denoise", "commit", "decode", "encode")


@dataclass(frozen=True)
class BenchOptions:
    """What the command line was given."""

    world: str
    blocks: int
    steps: int | None
    cache: str | None
    dtype: str
    device: str
    threads: int | None
    json: Path | None


def run(options: BenchOptions) -> None:
    """Measure and print; see `measure`.

    Raises:
        ValueError: for options that cannot be.
    """
    if options.blocks < 10:
        raise ValueError(f"--blocks must be 10 or more to mean anything, got {options.blocks}")
    if options.json is not None:
        check_writable(options.json)
    world = open_world(options.world, options.dtype, options.device, options.threads)
    figures = measure(world, options)
    rows = [
        [part, f"{figures['ms'][part]:.2f}", f"{figures['ms_p95'][part]:.2f}"] for part in PARTS
    ]
    print_table("ms per block, one part after the other", ("part", "median", "p95"), rows)
    print_table(
        "end to end",
        ("figure", "value"),
        [
            ["fps, parts in sequence", f"{figures['fps_serial']:.1f}"],
            ["fps, parts overlapped (as `worldsim stream`)", f"{figures['fps']:.1f}"],
            ["first picture after process start, s", f"{figures['first_picture_s']:.2f}"],
            ["peak memory, MiB", f"{figures['peak_mib']:.0f}"],
            ["page pool, MiB", f"{figures['pages_mib']:.2f}"],
        ],
    )
    write_json(options.json, figures)


def measure(world: World, options: BenchOptions) -> dict[str, Any]:
    """Times by part, throughput, first picture and memory, as one dictionary."""
    ms, pictures = _serial(world, options)
    total = sum(statistics.median(times) for times in ms.values())
    settings = {
        "steps": options.steps or world.config.steps,
        "cache": options.cache or world.config.cache,
    }
    return {
        "world": world.config.name,
        "size": [world.config.height, world.config.width],
        "dtype": str(world.dtype).removeprefix("torch."),
        "device": str(world.device),
        **settings,
        "blocks": options.blocks,
        "pictures_per_block": pictures,
        "ms": {part: statistics.median(times) for part, times in ms.items()},
        "ms_p95": {part: statistics.quantiles(times, n=20)[-1] for part, times in ms.items()},
        "fps_serial": 1e3 * pictures / total,
        "fps": _overlapped(world, options),
        "first_picture_s": _first_picture(options),
        "peak_mib": _peak_mib(world),
        "pages_mib": world.pool.nbytes / 2**20,
        "machine": machine(),
    }


def _serial(world: World, options: BenchOptions) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of each part, one after the other so that each is timed alone, for every block
    after the warm-up; and the pictures of a block.
    """
    count, pictures = WARM_UP + options.blocks, 0
    ms: dict[str, list[float]] = {part: [] for part in PARTS}
    stream = world.stream(blocks=count, steps=options.steps, cache=options.cache)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_sink(Path(folder, "bench.mp4"), world.config.fps, shown_scale(world)) as sink,
    ):
        for block in track(stream, "parts", total=count, console=Console(stderr=True)):
            began = time.perf_counter()
            sink.write(block.frames)
            block.timings["encode"] = time.perf_counter() - began
            pictures = len(block.frames)
            if block.index >= WARM_UP:
                for part in PARTS:
                    ms[part].append(1e3 * block.timings[part])
    return ms, pictures


def _overlapped(world: World, options: BenchOptions) -> float:
    """Pictures per second of the pipeline that `worldsim stream` runs, after the warm-up."""
    count = WARM_UP + options.blocks
    pictures, began = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        sink = open_sink(Path(folder, "bench.mp4"), world.config.fps, shown_scale(world))
        with Writer(sink) as writer:
            blocks = prefetch(
                world.stream(blocks=count, steps=options.steps, cache=options.cache, decoding=False)
            )
            for i, block in enumerate(world.decoded(blocks)):
                writer.write(block.frames)
                if i + 1 == WARM_UP:
                    began = time.perf_counter()
                elif i >= WARM_UP:
                    pictures += len(block.frames)
        return pictures / (time.perf_counter() - began)


def _first_picture(options: BenchOptions) -> float:
    """Seconds from starting a process to the first byte of its first picture; best of three."""
    script = Path(sysconfig.get_path("scripts"), "worldsim")
    command = [str(script), "stream", "-", "--seconds", "0.5"]
    command += ["--world", options.world, "--dtype", options.dtype, "--device", options.device]
    for name in ("steps", "cache", "threads"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
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


def _peak_mib(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
