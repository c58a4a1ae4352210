"""The state of a run over ranks, as a folder: a file for each rank and lane, one for the decoder.

Each rank writes its own after the same block, on its way past it: nothing waits, nothing is
drained, and all files together are what a serial session would be at that block.
"""

import json
import shutil
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
ON_THE_WAY = 32  # blocks between ranks, decoder, encoder and film, and more


def file_of(folder: str | Path, rank: int, lane: int | None = None) -> Path:
    """A rank's file; ``lane``: where it has one for each."""
    return Path(folder, f"rank-{rank}" + ("" if lane is None else f"-{lane}") + ".safetensors")


def keep(session: Session, folder: str | Path, rank: int, lane: int | None = None) -> None:
    """Write a rank's state."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(session, file_of(folder, rank, lane))


def forget(saves: str | None, back: int, rank: int, lane: int | None = None) -> None:
    """Drop what a rank has written of later blocks than ``back``: they are made anew."""
    for folder in later(saves, back):
        file_of(folder, rank, lane).unlink(missing_ok=True)


def forget_decoder(saves: str | None, back: int) -> None:
    """The same of the decoder."""
    for folder in later(saves, back):
        Path(folder, DECODER).unlink(missing_ok=True)


def later(saves: str | Path | None, block: int) -> list[Path]:
    """Folders of states of later blocks than that."""
    return [folder for number, folder in _of_run(saves) if number > block]


def thin(saves: str | None, block: int) -> None:
    """Drop old states: all that are further back than what may be on its way to the film, but the
    newest two. For the rank that finishes blocks: whoever writes a state has done so by then."""
    for number, folder in _of_run(saves)[:-2]:
        if number < block - ON_THE_WAY:
            shutil.rmtree(folder, ignore_errors=True)


def _of_run(saves: str | Path | None) -> list[tuple[int, Path]]:
    """States of a run by the block that comes next, the oldest first."""
    folders = [] if saves is None else Path(saves).glob("block-*")
    return sorted((int(folder.name.rpartition("-")[2]), folder) for folder in folders)


def keep_decoder(folder: str | Path, decoding: Decoding) -> None:
    """Write what the decoder goes on from."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    pack, target = Pack(), Path(folder, DECODER)
    header = {HEADER: json.dumps(pack.plain(decoding))}
    part = target.with_name(f".{target.name}.part")
    save_file(pack.tensors or {"none": torch.zeros(0)}, part, header)
    part.replace(target)


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
    found = _of_run(folder)[::-1]
    return [x for x in found if len(list(x[1].glob("[!.]*.safetensors"))) == files]


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
