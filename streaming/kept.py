"""The state of a run over ranks, as a folder: a file for each rank and lane, one for the decoder.

Each rank writes its own after the same block, on its way past it: nothing waits, nothing is
drained, and all files together are what a serial session would be at that block.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from worldsim.plain import Pack, Unpack
from worldsim.saving import HEADER, load, save
from worldsim.session import Session
from worldsim.state import Decoding
from worldsim.streaming.batched import united
from worldsim.world import World

DECODER = "decoder.safetensors"


def file_of(folder: str | Path, rank: int, lane: int | None = None) -> Path:
    """A rank's file; ``lane``: where it has one for each."""
    return Path(folder, f"rank-{rank}" + ("" if lane is None else f"-{lane}") + ".safetensors")


def keep(session: Session, folder: str | Path, rank: int, lane: int | None = None) -> None:
    """Write a rank's state."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(session, file_of(folder, rank, lane))


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
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(folder).glob("block-*")
        if len(list(path.glob("[!.]*.safetensors"))) == files
    ]
    return sorted(found, reverse=True)


def gathered(world: World, folder: str | Path) -> Session:
    """A serial session that goes on where a run over ranks stood.

    Raises:
        ValueError: for a folder that is no such state, an incomplete one, or one of a ring.
    """
    files = sorted(Path(folder).glob("rank-*.safetensors"))
    if any(file.stem.count("-") > 1 for file in files):  # a file for each lane
        raise ValueError(
            f"{folder} is of a ring, whose ranks have some of the layers each: go on with it over "
            "as many ranks"
        )
    if not files or not Path(folder, DECODER).is_file():
        raise ValueError(f"{folder} holds no complete state of a run over ranks")
    parts: list[Session] = []
    try:
        for file in files:
            lanes = lanes_of(file)
            parts.append(load(
                world, file, lambda settings, asked, lanes=lanes: Session(  # type: ignore[misc]
                    world, settings, asked, lanes=lanes
                ), whole=False,
            ))  # fmt: skip
        taken = [part.snapshot() for part in parts]
        lanes_there = {lane for snapshot in taken for lane in snapshot.tables}
        if lanes_there != set(parts[0].settings.schedule.lanes):
            raise ValueError(f"{folder} lacks the state of some ranks")
        decoding = read_decoder(world, folder)
        whole = Session(world, parts[0].settings, parts[0].asked)
        try:
            whole.restore(united(taken, decoding))
        except BaseException:
            whole.close()
            raise
        return whole
    finally:
        for part in parts:
            part.close()


def lanes_of(file: Path) -> tuple[int, ...]:
    """The lanes that a saved part has."""
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()[HEADER])
    return tuple(int(lane) for lane in told["tables"])
