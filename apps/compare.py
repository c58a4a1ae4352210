"""`worldsim compare`: two settings on one seed and one script, side by side and in figures."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from worldsim.apps.compare_tables import print_figures
from worldsim.apps.length import length
from worldsim.apps.likeness import Likeness
from worldsim.apps.opening import shown_scale
from worldsim.apps.report import machine, write_json
from worldsim.apps.setting import Setting
from worldsim.apps.side import Side
from worldsim.script import Script
from worldsim.streaming.sinks import Frames, Sink, check_writable, open_sink
from worldsim.world import World

GAP = 2  # columns of white between the two: an even number, which H.264 asks for
NAMES = ("A", "B")


@dataclass(frozen=True)
class CompareOptions:
    """What the command line was given; None and 0 mean the world's own."""

    a: str
    b: str
    prompt: str | None
    controls: str | None
    seconds: float | None
    seed: int
    out: str | None
    scale: int
    device: str
    threads: int | None
    json: Path | None


def run(options: CompareOptions) -> None:
    """Compare and print; Ctrl-C ends it with a video that plays and the figures until then.

    Raises:
        ValueError, OSError: one clear line, before anything is written.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    settings = [Setting.parse(options.a), Setting.parse(options.b)]
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        raise ValueError(f"--seconds must be above 0, got {options.seconds:g}")
    if options.out == "-":
        raise ValueError("--out is a file here, since the figures go to where '-' would write")
    if options.json is not None:
        check_writable(options.json)
    worlds = _open(settings, options)
    scripts = _scripts(worlds, options)
    fps = worlds[0].config.fps
    pictures = length(options.seconds, scripts[0].frames, fps)
    likeness = Likeness(fps)
    with ExitStack() as stack:
        sides = []
        for setting, world, script in zip(settings, worlds, scripts, strict=True):
            sides.append(Side(setting, world, script, options.seed))
            stack.enter_context(sides[-1].session)
        sink: Sink | None = None
        if options.out is not None:
            scale = options.scale or shown_scale(worlds[0])
            sink = stack.enter_context(open_sink(options.out, fps, scale))
        with _until_interrupted() as stop:
            _play(sides, likeness, pictures, sink, stop, console)
        likeness.finish()
        if not likeness.pictures:
            console.print("worldsim: stopped before the first picture; nothing was written")
            return
        figures = _figures(sides, likeness, options)
    print_figures(figures)
    write_json(options.json, figures)
    if stop.is_set():
        console.print(f"stopped after {likeness.pictures} of {pictures} pictures")


def _play(
    sides: Sequence[Side],
    likeness: Likeness,
    pictures: int,
    sink: Sink | None,
    stop: Event,
    console: Console,
) -> None:
    """Make both streams in turns, so that whatever else the machine does meets both of them.

    Nothing else runs meanwhile: frames are measured and encoded between two blocks.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    order = list(sides)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("pictures", total=pictures)
        while likeness.pictures < pictures and not stop.is_set():
            min(order, key=lambda side: side.made).step()
            common = min(pictures, *(side.made for side in sides)) - likeness.pictures
            if common > 0:
                left, right = (side.take(common) for side in sides)
                likeness.add(left, right)
                if sink is not None:
                    sink.write(beside(left, right))
                progress.advance(task, common)
                order.reverse()  # going second, on warm caches, is nobody's privilege


def beside(left: Frames, right: Frames) -> Frames:
    """Two clips as one, ``[n, H, 2·W + GAP, 3]``."""
    gap = np.full((*left.shape[:2], GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=2)


def _open(settings: Sequence[Setting], options: CompareOptions) -> list[World]:
    """The world of each setting, loaded once where it is the same in the same dtype.

    Raises:
        ValueError: for what cannot be loaded, and for two that cannot be laid side by side.
    """
    opened: dict[tuple[str, str, str | None], World] = {}
    threads = options.threads
    for setting in settings:
        key = (setting.world, setting.dtype, setting.preset)
        if key not in opened:
            opened[key] = setting.open(options.device, threads)
            threads = torch.get_num_threads()  # the second one computes with as many
    a, b = (opened[each.world, each.dtype, each.preset] for each in settings)
    for what, ours, theirs in (
        ("size", f"{a.config.width}×{a.config.height}", f"{b.config.width}×{b.config.height}"),
        ("speed", f"{a.config.fps:g} fps", f"{b.config.fps:g} fps"),
    ):
        if ours != theirs:
            raise ValueError(f"A shows {ours} and B {theirs}: only worlds of one {what} compare")
    return [a, b]


def _scripts(worlds: Sequence[World], options: CompareOptions) -> list[Script]:
    """What each world is asked for; the same for both."""
    a, b = (world.config for world in worlds)
    for name, given, ours, theirs in (
        ("prompt", options.prompt, a.prompt, b.prompt),
        ("controls", options.controls, a.controls, b.controls),
    ):
        if given is None and ours != theirs:
            raise ValueError(f"A and B have {name} of their own that differ: give --{name}")
    return [world.script(options.prompt, options.controls) for world in worlds]


@contextmanager
def _until_interrupted() -> Iterator[Event]:
    """Ctrl-C sets the event, so that no picture is cut in two; a second one breaks in."""
    stop = Event()

    def note(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _figures(sides: Sequence[Side], likeness: Likeness, options: CompareOptions) -> dict[str, Any]:
    """All that was measured, as one dictionary."""
    config = sides[0].world.config
    looks = zip(*(side.drift.by_second() for side in sides), strict=True)
    return {
        **{name: side.figures() for name, side in zip(NAMES, sides, strict=True)},
        "seconds": [
            second | dict(zip(NAMES, both, strict=True))
            for second, both in zip(likeness.seconds, looks, strict=True)
        ],
        "pictures": likeness.pictures,
        "first_difference": likeness.differs,
        "identical": likeness.differs is None,
        "size": [config.height, config.width],
        "fps": config.fps,
        "seed": options.seed,
        "prompt": config.prompt if options.prompt is None else options.prompt,
        "controls": config.controls if options.controls is None else options.controls,
        "device": str(sides[0].world.device),
        "machine": machine(),
    }
