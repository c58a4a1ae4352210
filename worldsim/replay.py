"""A recorded run (.wsrun, see `worldsim.recorder`): read, made once more, and compared."""

import base64
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from worldsim.cache.context import Event
from worldsim.config import Settings
from worldsim.controls import ControlState, Held
from worldsim.fingerprint import digest_of
from worldsim.plain import Unpack
from worldsim.recorder import FORMAT
from worldsim.state import Applied, Block, Change, Played

if TYPE_CHECKING:
    from worldsim.session import Session
    from worldsim.world import World

LONGEST = 4 * 2**20  # bytes of a line
LARGEST = 256 * 2**20  # bytes of a file
HISTORY = 2**26  # bytes of the snapshots that rewinds start from


@dataclass(frozen=True)
class Run:
    """A recording that has been read.

    Attributes:
        head: its first line.
        lines: the others, in order.
        cut: its last line was not complete, and was left out.
    """

    head: Mapping[str, Any]
    lines: tuple[Mapping[str, Any], ...]
    cut: bool = False

    @property
    def blocks(self) -> int:
        """Blocks that were made, over all branches."""
        return sum("block" in line for line in self.lines)

    def way(self, branch: int = 0) -> list[int]:
        """Which of the blocks that were made led to the end of a branch, by their number in the
        file: those of the branch it was forked from are among them, rewound ones are not.

        Raises:
            ValueError: for a branch that it does not have.
        """
        # Onwards only how long each way is after each line, then back along the one: a file may
        # have very many forks.
        lengths: dict[int, int] = {0: 0}
        after = []
        for line in self.lines:
            own = line.get("branch", 0)
            length = lengths.setdefault(own, 0)
            if "fork" in line:
                lengths[line["fork"]] = length
            elif "rewind" in line:
                lengths[own] = len(range(length)[: line["rewind"]])
            elif "block" in line:
                lengths[own] = length + 1
            after.append(lengths[own])
        if branch not in lengths:
            raise ValueError(f"there is no branch {branch}: this recording has {sorted(lengths)}")
        way: list[int] = []
        made, left = self.blocks, lengths[branch]  # of its blocks, how many are still to be found
        for line, length in zip(reversed(self.lines), reversed(after), strict=True):
            block = "block" in line and "fork" not in line and "rewind" not in line
            made -= "block" in line
            if "fork" in line:
                branch = line.get("branch", 0) if line["fork"] == branch else branch
            elif block and length == left and line.get("branch", 0) == branch:
                way.append(made)
                left -= 1
        return way[::-1]

    def straight(self, branch: int = 0) -> "Run":
        """Only the blocks that led to the end of a branch, without forks and rewinds.

        Raises:
            ValueError: for a branch that it does not have.
        """
        made = [line for line in self.lines if "block" in line]
        way = [
            {name: value for name, value in made[number].items() if name != "branch"}
            for number in self.way(branch)
        ]
        return Run(self.head, tuple(way))

    @property
    def newest(self) -> int:
        """The branch that the last block was made on."""
        made = [line.get("branch", 0) for line in self.lines if "block" in line]
        return made[-1] if made else 0

    @property
    def dtype(self) -> str:
        """In which it was made."""
        settings = self.head.get("settings")
        told = settings.get("fields") if isinstance(settings, dict) else None
        return str(told.get("dtype")) if isinstance(told, dict) else ""


def read_run(path: str | Path) -> Run:
    """Read a recording; a last line that is not complete is left out.

    Raises:
        ValueError: for a file that is none, or is too large.
    """
    try:
        size = Path(path).stat().st_size
        data = Path(path).read_bytes() if size <= LARGEST else b""
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if size > LARGEST:
        raise ValueError(f"{path} is larger than any recording ({LARGEST >> 20} MiB)")
    return parse_run(data, str(path))


def parse_run(data: bytes, name: str = "the recording") -> Run:
    """The same of bytes from anywhere."""
    lines = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            told = json.loads(line) if len(line) <= LONGEST else None
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise ValueError(f"{name}: line {number} is damaged")
        lines.append(told)
    if not lines or lines[0].get("wsrun") != FORMAT:
        raise ValueError(f"{name} is no recording (.wsrun) that this version reads")
    return Run(lines[0], tuple(lines[1:]), cut=not data.endswith(b"\n"))


class Differs(Exception):
    """A block that was made again is another one; the text says which and why that may be."""


@dataclass
class Replay:
    """Makes a recorded run once more.

    Attributes:
        world: on which.
        verify: compare every block's hash.
        told: ways in which this world is not the recorded one.
        sessions: that it is made on, by branch; closed when it ends.
    """

    world: "World"
    run: Run
    verify: bool = True
    told: list[str] = field(default_factory=list)
    sessions: dict[int, "Session"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        head, world = self.run.head, self.world
        dtype = str(world.dtype).removeprefix("torch.")
        self.settings = self._settings()
        if self.settings.dtype != dtype:
            self.told.append(f"it was made in {self.settings.dtype}, and this world is in {dtype}")
        elif head.get("fingerprint") != world.fingerprint:
            self.told.append(
                f"the world {head.get('world')!r} had other weights or another world.json"
            )
        if head.get("torch") != torch.__version__:
            self.told.append(f"it was made by torch {head.get('torch')}, not {torch.__version__}")

    def open(self, history: int = HISTORY) -> "Session":
        """A session as the recorded one was when it began; the replay goes on in it."""
        first = self.world.ask(self.settings, self.run.head["prompt"])
        self.sessions[0] = self.world.open(self.settings, first, history)
        return self.sessions[0]

    def __iter__(self) -> Generator[tuple[int, Block], None, None]:
        """Each block with its branch, decoded, in the order in which they were made.

        Raises:
            Differs: at the first block whose hash is another one.
            ValueError: for a line that cannot be followed.
        """
        branches = self.sessions
        if not branches:
            self.open()
        try:
            for number, line in enumerate(self.run.lines, 2):
                try:
                    branch = line.get("branch", 0)
                    block = self._follow(branches, branch, line)
                except (LookupError, TypeError, AttributeError) as error:
                    what = f"line {number} of the recording makes no sense: {error!r}"
                    raise ValueError(what) from None
                if block is not None:
                    yield branch, block
        finally:
            while branches:
                branches.popitem()[1].close()

    def _follow(
        self, branches: dict[int, "Session"], branch: int, line: Mapping[str, Any]
    ) -> Block | None:
        session = branches[branch]
        if "rewind" in line:
            session.rewind(line["rewind"])
        elif "fork" in line:
            if line["fork"] in branches:
                raise ValueError(f"there is a branch {line['fork']} already")
            branches[line["fork"]] = session.fork()
        elif "block" in line:
            if line["block"] != session.block:
                raise ValueError(f"block {line['block']} comes where {session.block} should")
            block = session.play(self._played(session, line))
            if self.verify and (made := digest_of(block.latents)) != line["hash"]:
                raise Differs(self._difference(line, made))
            return session.decode(block)
        return None

    def _played(self, session: "Session", line: Mapping[str, Any]) -> Played:
        changes = tuple(self._change(session, change) for change in line.get("changes", ()))
        controls = tuple(map(ControlState.from_dict, line["controls"]))
        given = line.get("given")
        latents = None if given is None else _latents(given, session.latent_shape)
        return Played(changes, Held(), Applied(controls, session.prompt), given=latents)

    def _change(self, session: "Session", told: Mapping[str, str]) -> Change:
        if "prompt" in told:
            return self.world.ask(session.settings, told["prompt"])
        return Event(told["event"])

    def _settings(self) -> Settings:
        try:
            settings = Unpack(self.world).read(self.run.head["settings"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the recording's settings make no sense: {error!r}") from None
        if not isinstance(settings, Settings) or not isinstance(self.run.head.get("prompt"), str):
            raise ValueError("the recording does not say under which settings and prompt it began")
        return settings

    def _difference(self, line: Mapping[str, Any], made: str) -> str:
        branch = f" of branch {line['branch']}" if line.get("branch") else ""
        why = "; ".join(self.told) or "the file, or how this machine computes, is another"
        return (
            f"block {line['block']}{branch} differs: {line['hash']} was recorded, {made} is made "
            f"here ({why})"
        )


def _latents(text: str, shape: tuple[int, ...]) -> Tensor:
    numbers = np.frombuffer(base64.b64decode(text), dtype=np.float32)
    if numbers.size != np.prod(shape):
        raise ValueError(f"given latents must be {shape}")
    return torch.from_numpy(numbers.copy()).reshape(shape)
