"""`worldsim stream`: denoise, decode and encode, each on its own thread, into a file or a pipe."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from worldsim.apps import stream_ranks
from worldsim.apps.length import latents_asked, length
from worldsim.apps.opening import shown_scale
from worldsim.apps.setting import Setting
from worldsim.state import Block
from worldsim.streaming.faults import RankFailed
from worldsim.streaming.overlap import overlapped
from worldsim.streaming.pipeline import Writer
from worldsim.streaming.sinks import Sink, SinkClosed, check_writable, open_sink
from worldsim.world import World

if TYPE_CHECKING:
    from worldsim.apps.profiling import Profile

Made = Callable[[Writer], Generator[Block, None, None]]  # hands its blocks on as they are made


@dataclass(frozen=True)
class StreamOptions:
    """What the command line was given; None and 0 mean the world's own."""

    out: str
    setting: Setting
    prompt: str | None
    controls: str | None
    seconds: float | None
    seed: int
    fps: float | None
    scale: int
    device: str
    threads: int | None
    profile: Path | None
    image: Path | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    compile: bool = False
    ranks: int | None = None
    save_every: int = 0
    resume: bool = False
    record: Path | None = None


@dataclass
class Tally:
    """Figures of a run, for the bar and the summary."""

    began: float
    blocks: int = 0
    pictures: int = 0
    first: float = 0.0
    interrupted: bool = False
    failed: RankFailed | None = None

    def add(self, pictures: int) -> None:
        self.blocks += 1
        self.pictures += pictures
        if self.blocks == 1:
            self.first = time.perf_counter() - self.began

    @property
    def fps(self) -> float:
        return self.pictures / max(1e-9, time.perf_counter() - self.began)


def run(options: StreamOptions) -> None:
    """Stream to ``options.out``; Ctrl-C ends it with a file that plays.

    Raises:
        ValueError, OSError: one clear line, before anything is written.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    ranks = _checked(options)
    world = _opened(options, ranks)
    fps = world.config.fps if options.fps is None else options.fps
    latents = latents_asked(world, options.prompt, options.controls)
    pictures = length(options.seconds, latents, fps)
    count = world.blocks_for(pictures, None if options.image is None else True)
    kept = 0  # pictures that the file has already
    made: Made
    if ranks == 1:
        made = partial(overlapped, world, _blocks(world, options, count), pictures=pictures)
    else:
        shared, parts = stream_ranks.planned(options, world, ranks, count)
        if not stream_ranks.delivers(ranks):
            return stream_ranks.pass_on(shared, parts)
        if options.resume:
            shared, kept = stream_ranks.resumed(shared, parts, world, options.out, pictures)
            if kept == pictures:
                console.print(f"worldsim: {options.out} has all its {pictures} pictures already")
                return None
        made = partial(
            stream_ranks.over_ranks, shared, parts, world,
            pictures=pictures - kept, threads=options.threads,
        )  # fmt: skip
    # A pipe gets the world's own pixels, a file what people can see.
    scale = options.scale or (1 if options.out == "-" else shown_scale(world))
    sink = open_sink(options.out, fps, scale, kept)
    if not kept:  # also on one rank: they would be taken for the new film's
        stream_ranks.forget_states(options.out)
    if options.compile:
        _compile(world, options, console)
    profile = _profile(world, options, count)
    tally = _write(made, sink, pictures - kept, profile, console)
    _summary(console, world, options, fps, tally)
    if profile is not None:
        profile.report(console)
    if tally.failed is not None:
        raise tally.failed


def _checked(options: StreamOptions) -> int:
    """The number of ranks, once all that can be said without a world is said.

    Raises:
        ValueError, OSError: for what cannot be.
    """
    for name, value in (("seconds", options.seconds), ("fps", options.fps)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be above 0, got {value:g}")
    if options.profile is not None:
        if options.profile.suffix != ".json":
            raise ValueError(f"--profile is a .json file, got {str(options.profile)!r}")
        check_writable(options.profile)
    if options.record is not None:
        check_writable(options.record)
    written = [Path(p).resolve() for p in (options.out, options.record, options.profile) if p]
    if len(set(written)) < len(written):
        raise ValueError("the pictures, --record and --profile each want a file of their own")
    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks must be 1 or more, got {options.ranks}")
    ranks = stream_ranks.under_torchrun() or options.ranks or 1
    if ranks > 1 and ":" in options.device:
        raise ValueError(
            f"--device {options.device} is a single one, and each rank wants its own: give "
            f"--device {options.device.partition(':')[0]}"
        )
    if options.save_every < 0:
        raise ValueError(f"--save-every must be 1 or more, got {options.save_every}")
    if ranks == 1 and (options.resume or options.save_every):
        raise ValueError("--save-every and --resume go with --ranks 2 or more")
    return ranks


def _opened(options: StreamOptions, ranks: int) -> World:
    """The world; where ranks have its weights, without them."""
    setting = options.setting
    if ranks == 1:
        world = setting.open(options.device, options.threads)
    else:
        world = stream_ranks.outline(options)
    if world.autoencoder is None:
        raise ValueError(
            f"{setting.world} has no decoder, so there is nothing to see: convert it with --base"
        )
    return world


def _blocks(world: World, options: StreamOptions, count: int) -> Iterator[Block]:
    """A stream's blocks on this one device; they are not decoded."""
    setting = options.setting
    order = world.config.sampling(setting.steps, setting.schedule)[0].order
    alone = options.image is None and options.record is None
    if order == "batch" and alone:
        from worldsim.streaming.batched import stream

        script = world.script(options.prompt, options.controls)
        return stream(
            world, script, count, options.seed, setting.steps, setting.cache, setting.schedule,
            options.guidance, options.negative_prompt,
        )  # fmt: skip
    return world.stream(
        options.prompt, options.controls, options.seed, count, setting.steps, setting.cache,
        decoding=False, schedule=setting.schedule, guidance=options.guidance,
        negative_prompt=options.negative_prompt, pictures=options.image, record=options.record,
    )  # fmt: skip


def _compile(world: World, options: StreamOptions, console: Console) -> None:
    from worldsim.apps.compiling import compile_world

    opened = partial(
        options.setting.session, world, guidance=options.guidance,
        negative_prompt=options.negative_prompt,
        independent_first_frame=None if options.image is None else True,
    )  # fmt: skip
    compile_world(world, opened, console)


def _profile(world: World, options: StreamOptions, count: int) -> "Profile | None":
    if options.profile is None:
        return None
    from worldsim.apps.profiling import Profile

    return Profile(options.profile, world.device, options.setting.warm_up(world) or 0, count)


def _write(
    made: Made, sink: Sink, pictures: int, profile: "Profile | None", console: Console
) -> Tally:
    """Make a stream and write it, until it ends or is broken off."""
    if profile is not None:
        sink = profile.named(sink)
    with profile or contextlib.nullcontext():
        tally, writer = Tally(time.perf_counter()), Writer(sink)
        try:
            with writer:
                try:
                    _follow(made(writer), pictures, tally, profile, console)
                except KeyboardInterrupt:
                    tally.interrupted = True
                except RankFailed as error:  # what it made is there, and is told first
                    tally.interrupted, tally.failed = True, error
        except SinkClosed:
            tally.interrupted = True
    tally.pictures = writer.pictures  # an interrupted hand-over is still written
    return tally


def _follow(
    made: Generator[Block, None, None],
    pictures: int,
    tally: Tally,
    profile: "Profile | None",
    console: Console,
) -> None:
    """Show how a stream goes until it ends."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress, contextlib.closing(made):
        task = progress.add_task("pictures", total=pictures, figures="")
        for block in made:
            tally.add(len(block.frames))
            figures = f"{tally.fps:.0f} fps"
            if block.latents.device.type == "cpu":  # elsewhere nobody waits for a part alone
                for part in ("denoise", "decode"):
                    if part in block.timings:  # a rank tells of its own
                        figures += f" · {part} {1e3 * block.timings[part]:.1f} ms"
            progress.update(task, advance=len(block.frames), figures=figures)
            if profile is not None:
                profile.after(block.index)


def _summary(
    console: Console, world: World, options: StreamOptions, fps: float, tally: Tally
) -> None:
    if not tally.pictures:
        console.print("worldsim: stopped before the first picture; nothing was written")
        return
    seconds = tally.pictures / fps
    dtype = str(world.dtype).removeprefix("torch.")
    where = f"pages {world.pool.nbytes / 2**20:.1f} MiB"
    if world.transformer.device.type == "meta":
        where = "over ranks"
    if tally.failed is not None and options.save_every and options.record is None:
        where += " · the same command with --resume goes on"
    console.print(
        f"{'stopped: ' if tally.interrupted else ''}{tally.pictures} pictures ({seconds:.1f} s) to "
        f"{options.out} · {tally.fps:.0f} fps · first picture {tally.first:.2f} s after loading · "
        f"seed {options.seed} · {dtype} · {where}",
        soft_wrap=True,
    )
