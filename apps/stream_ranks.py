"""`worldsim stream --ranks N`, and under torchrun: a stream whose work is shared out."""

import os
import shutil
from collections.abc import Generator, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from worldsim.apps.opening import DTYPES, MADE, open_share
from worldsim.blueprint import world_of_folder
from worldsim.bundle import auto_dtype, check_device, locate
from worldsim.config import Settings
from worldsim.models.autoencoder import GROUP
from worldsim.saving import settings_of
from worldsim.share import Share, shares
from worldsim.state import Block
from worldsim.streaming.kept import later, states
from worldsim.streaming.launch import Ranks
from worldsim.streaming.leader import Run
from worldsim.streaming.pipeline import Writer
from worldsim.streaming.video_sinks import kept_pictures
from worldsim.world import World

if TYPE_CHECKING:
    from worldsim.apps.stream import StreamOptions

GLOO, NCCL = "gloo", "nccl"


def under_torchrun() -> int | None:
    """How many ranks torchrun has started, of which this process is one; None without it."""
    size = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    return None if size is None else int(size)


def outline(options: "StreamOptions") -> World:
    """The world without its weights, to know its sizes and what it can do.

    Raises:
        ValueError: for a world that is not there.
    """
    setting = options.setting
    place = check_device(options.device)
    if setting.dtype != "auto" and setting.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {setting.dtype!r}: choose auto, {', '.join(DTYPES)}")
    dtype = DTYPES.get(setting.dtype) or auto_dtype(place)
    if setting.world in MADE:
        from worldsim.apps import medium

        return medium.random_world(medium.MADE[setting.world], dtype, "cpu")
    return world_of_folder(locate(setting.world), dtype, setting.preset)


def planned(
    options: "StreamOptions", world: World, ranks: int, blocks: int
) -> tuple[Run, list[Share]]:
    """The run that is asked for, and how it is shared out.

    Raises:
        ValueError: for what cannot be shared out.
    """
    for name in ("image", "profile"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} goes with one rank")
    if options.compile:
        raise ValueError("--compile goes with one rank")
    if options.record is not None and options.resume:
        raise ValueError("--record begins with its stream: leave --resume out")
    setting = options.setting
    told = {
        "seed": options.seed,
        "steps": setting.steps,
        "cache": setting.cache,
        "schedule": setting.schedule,
        "guidance": options.guidance,
        "negative_prompt": options.negative_prompt,
    }
    schedule = world.settings(**told).schedule  # type: ignore[arg-type]
    parts = shares(schedule, world.transformer.config.num_layers, ranks)
    there = ranks if options.device == "cpu" else torch.cuda.device_count()
    if ranks > there and under_torchrun() is None:
        raise ValueError(f"{ranks} ranks want as many GPUs, and there are {there}")
    run = Run(
        partial(open_share, setting.world, setting.dtype, options.device, setting.preset),
        ranks, told,
        options.prompt, options.controls, blocks=blocks,
        backend=GLOO if options.device == "cpu" else NCCL,
        saves=str(saves_of(options.out)) if options.save_every else None,
        every=options.save_every,
    )  # fmt: skip
    if options.record is not None and delivers(ranks):
        whole = fingerprint(options, world.dtype)
        run = replace(run, record=str(options.record.resolve()), fingerprint=whole)
    return run, parts


def fingerprint(options: "StreamOptions", dtype: torch.dtype) -> str:
    """Of the whole world, for its recording: it is read once into the computer's memory, and
    dropped."""
    kind = str(dtype).removeprefix("torch.")
    return replace(options.setting, dtype=kind).open("cpu", options.threads).fingerprint


def saves_of(out: str) -> Path:
    """Where the states of a stream to ``out`` are."""
    return Path(f"{out}.state")


def resumed(run: Run, parts: list[Share], world: World, out: str, wanted: int) -> tuple[Run, int]:
    """The run as it goes on, and how many pictures of ``out`` are kept: from the newest state whose
    pictures are all there, else from the beginning, which makes the very same again. ``wanted``:
    pictures in all.

    Raises:
        ValueError: for what cannot be continued.
    """
    if not out.endswith(".mp4"):
        raise ValueError("--resume goes on with an .mp4: make any other one again")
    settings = world.settings(**run.settings)
    lanes = len(settings.schedule.lanes) if settings.schedule.order == "layers" else 1
    files = 1 + lanes * sum(bool(part.steps) for part in parts)
    there, each = kept_pictures(Path(out)), world.config.block_frames
    if there > wanted:
        raise ValueError(f"{out} has {there} pictures already, and {wanted} are asked for")
    if there == wanted:
        return run, there
    for block, state in states(saves_of(out), files):
        first = 1 if settings.independent_first_frame else each
        pictures = 1 + GROUP * (first + (block - 1) * each - 1)
        if pictures <= there:
            _check_alike(settings, settings_of(world, next(state.glob("rank-*"))), out)
            for newer in later(saves_of(out), block):  # their blocks are made anew
                shutil.rmtree(newer, ignore_errors=True)
            return replace(run, resume=str(state)), pictures
    return run, 0


def _check_alike(asked: Settings, saved: Settings, out: str) -> None:
    """Refuse to go on under other settings than before."""
    differ = []
    for name in (field.name for field in fields(Settings)):
        mine, before = getattr(asked, name), getattr(saved, name)
        if mine != before:
            shown = isinstance(before, str | int | float)
            differ.append(f"{name} {before} (not {mine})" if shown else name)
    if differ:
        raise ValueError(
            f"{out} was made under other settings: {', '.join(differ)}; give the same, or begin it "
            "anew without --resume"
        )


def forget_states(out: str) -> None:
    """Drop the states of an older stream to ``out``, which begins anew."""
    shutil.rmtree(saves_of(out), ignore_errors=True)


def delivered(
    blocks: Iterator[Block], writer: Writer, pictures: int
) -> Generator[Block, None, None]:
    """Hand blocks that come with their frames to ``writer``, and yield them."""
    written = 0
    for block in blocks:
        block.frames = block.frames[: pictures - written]
        writer.write(block.frames)
        written += len(block.frames)
        yield block


def over_ranks(
    run: Run, parts: list[Share], world: World, writer: Writer, pictures: int, threads: int | None
) -> Generator[Block, None, None]:
    """A run over processes, block by block: those that torchrun started, or ones of our own.

    Raises:
        RankFailed: one line, where a rank fails; what was made is written.
    """
    if under_torchrun() is not None:
        from worldsim.streaming.torchrun import joined

        yield from delivered(joined(run, parts), writer, pictures)
        return
    with Ranks(run, parts, world, threads or 1) as ranks:
        yield from delivered(ranks.blocks(), writer, pictures)


def delivers(ranks: int) -> bool:
    """Whether this process is the one that writes pictures."""
    return under_torchrun() is None or int(os.environ["RANK"]) == ranks - 1


def pass_on(run: Run, parts: list[Share]) -> None:
    """Under torchrun, the part of a rank that writes nothing."""
    from worldsim.streaming.torchrun import joined

    for _ in joined(run, parts):
        pass
