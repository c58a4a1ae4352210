"""The state of a run over ranks, as a folder: a file for each rank and lane, one for the decoder.

Each rank writes its own after the same block, on its way past it: nothing waits, nothing is
drained, and all files together are what a serial session would be at that block.
"""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from worldsim.plain import Pack, Unpack
from worldsim.saving import HEADER, Saved, opened, read, save
from worldsim.session import Session
from worldsim.state import Decoding
from worldsim.streaming.split import merged, stacked
from worldsim.world import World

DECODER = "decoder.safetensors"
KEPT = 8  # states: pictures come some blocks after the states of their blocks


def file_of(folder: str | Path, rank: int, lane: int | None = None) -> Path:
    """A rank's file; ``lane``: where it has one for each."""
    return Path(folder, f"rank-{rank}" + ("" if lane is None else f"-{lane}") + ".safetensors")


def keep(
    session: Session, folder: str | Path, saves: str | None, rank: int, lane: int | None = None
) -> None:
    """Write a rank's state; of those in the run's own folder (``saves``) the newest few stay."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(session, file_of(folder, rank, lane))
    _drop(_of_run(saves)[:-KEPT], file_of("", rank, lane).name)


def forget(saves: str | None, back: int, rank: int, lane: int | None = None) -> None:
    """Drop what a rank has written of later blocks than ``back``: they are made anew."""
    _drop(_later(saves, back), file_of("", rank, lane).name)


def forget_decoder(saves: str | None, back: int) -> None:
    """The same of the decoder."""
    _drop(_later(saves, back), DECODER)


def _of_run(saves: str | None) -> list[Path]:
    """Its states, the oldest first."""
    return [] if saves is None else sorted(Path(saves).glob("block-*"))


def _later(saves: str | None, back: int) -> list[Path]:
    return [f for f in _of_run(saves) if int(f.name.rpartition("-")[2]) > back]


def _drop(folders: list[Path], name: str) -> None:
    """Every process drops its own file; the last one also the folder."""
    for folder in folders:
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # others are in it, or it is gone
            folder.rmdir()


def keep_decoder(folder: str | Path, saves: str | None, decoding: Decoding) -> None:
    """Write what the decoder goes on from; see `keep`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    pack, target = Pack(), Path(folder, DECODER)
    header = {HEADER: json.dumps(pack.plain(decoding))}
    part = target.with_name(f".{target.name}.part")
    save_file(pack.tensors or {"none": torch.zeros(0)}, part, header)
    part.replace(target)
    _drop(_of_run(saves)[:-KEPT], DECODER)


def read_decoder(world: World, folder: str | Path) -> Decoding:
    """The inverse of `keep_decoder`."""
    with safe_open(Path(folder, DECODER), "pt") as file:
        told = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name).to(world.device) for name in file.keys()}  # noqa: SIM118
    decoding: Decoding = Unpack(world, tensors).read(told)
    return decoding


def states(folder: str | Path, files: int) -> list[tuple[int, Path]]:
    """Complete states of a run, newest first: the block that comes next, and the state's folder.

    ``files``: how many a complete one has.
    """
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(folder).glob("block-*")
        if len(list(path.glob("[!.]*.safetensors"))) == files
    ]
    return sorted(found, reverse=True)


def gathered(world: World, folder: str | Path) -> Session:
    """A serial session that goes on where a run over ranks stood.

    Raises:
        ValueError: for a folder that is no such state, or an incomplete one.
    """
    saved = _joined(world, folder)
    return opened(saved, lambda settings, asked: Session(world, settings, asked), folder)


def _joined(world: World, folder: str | Path) -> Saved:
    """What all ranks have written, as a serial session would have."""
    files: dict[int | None, list[tuple[int, Path]]] = {}
    for file in Path(folder).glob("rank-*.safetensors"):
        _, rank, *lane = file.stem.split("-")
        files.setdefault(int(lane[0]) if lane else None, []).append((int(rank), file))
    if not files or not Path(folder, DECODER).is_file():
        raise ValueError(f"{folder} holds no complete state of a run over ranks")
    by_lane = {lane: [read(world, file) for _, file in sorted(files[lane])] for lane in files}
    if None in by_lane:  # steps on ranks: a file for each rank, with all layers
        saved = merged(by_lane[None])
    else:  # a ring: a file for each rank and lane
        saved = merged([stacked(by_lane[lane]) for lane in sorted(by_lane, key=lambda n: n or 0)])
    layers = world.transformer.config.num_layers
    have = {tensors[0].shape[1] for _, tensors in saved.pages}
    if set(saved.tables) != set(saved.settings.schedule.lanes) or have - {layers}:
        raise ValueError(f"{folder} lacks the state of some ranks")
    return replace(saved, decoding=read_decoder(world, folder))
