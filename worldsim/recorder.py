"""Writing a run as a file (.wsrun), block by block; `worldsim.replay` reads it.

JSON, a line for each thing: first the world, its settings and the prompt; then each block with what
was changed before it, its controls and a hash of its latents; rewinds, forks and pauses where they
happened. A line is written when its block is made, so what a killed process leaves behind is good
up to its last complete block.
"""

import base64
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from worldsim.config import Settings
from worldsim.fingerprint import digest_of
from worldsim.plain import Pack
from worldsim.state import Asked, Block, Change, Played

if TYPE_CHECKING:
    from worldsim.session import Session
    from worldsim.world import World

FORMAT = 1


class RunFile:
    """The file itself, which knows no session: blocks may come from anywhere.

    Attributes:
        path: the file.
        error: why nothing is written any more, where that is so.
    """

    def __init__(
        self, path: str | Path, world: "World", settings: Settings, prompt: str, fingerprint: str
    ) -> None:
        """``world``: may be a part of one; ``fingerprint``: of the whole one.

        Raises:
            OSError: where it cannot be written.
        """
        self.path = Path(path)
        self.error: str | None = None
        self._file = self.path.open("wb", buffering=0)  # what a full disk refused is not kept
        self.write({
            "wsrun": FORMAT,
            "world": world.config.name,
            "source": world.source,
            "fingerprint": fingerprint,
            "torch": torch.__version__,
            "settings": Pack().plain(settings),
            "prompt": prompt,
        })  # fmt: skip

    def made(self, played: Played, block: Block, branch: int = 0) -> None:
        """A block has been made."""
        if self.error is not None:
            return
        if played.known is not None or any(_embeds(change) for change in played.changes):
            self._stop("known frames and prompt_embeds cannot be recorded")
            return
        told: dict[str, Any] = {"block": block.index, "hash": digest_of(block.latents)}
        if played.changes:
            told["changes"] = list(map(_told, played.changes))
        told["controls"] = [state.as_dict() for state in played.applied.controls]
        if played.given is not None:
            told["given"] = _text(played.given)
        self.write(told, branch)

    def write(self, told: Mapping[str, Any], branch: int = 0) -> None:
        """Add a line."""
        if self.error is not None or self._file.closed:
            return
        try:
            line = json.dumps({**told, "branch": branch} if branch else told).encode() + b"\n"
            if self._file.write(line) != len(line):
                self._stop("No space left on device")
        except OSError as error:
            self._stop(f"{error.strerror or error}")

    def close(self) -> None:
        self._file.close()

    def _stop(self, why: str) -> None:
        """Whoever makes blocks goes on; the file is good up to here."""
        self.error = f"recording to {self.path} has ended: {why}"
        warnings.warn(self.error, stacklevel=2)


class Recorder:
    """Writes the runs of a session and of its forks; made by `Session.record`."""

    def __init__(self, path: str | Path, session: "Session") -> None:
        if session.has_own_noise:
            raise ValueError("a session with noise= of its own cannot be recorded: it is no data")
        if session.asked.embeds is not None or session.asked.negative is not None:
            raise ValueError("prompt_embeds cannot be recorded: give the prompt in words")
        begun = [played for played in session.now.past if played.given is None]
        if begun or session.now.reach or session.now.changes:
            raise ValueError("a recording begins with its session: record before the first block")
        world = session.world
        self._file = RunFile(path, world, session.settings, session.prompt, world.fingerprint)
        self._branches: WeakKeyDictionary[Session, int] = WeakKeyDictionary({session: 0})
        self._forks = 0
        for played, block in zip(session.now.past, session.given, strict=True):
            self.made(session, played, block)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def error(self) -> str | None:
        """Why nothing is written any more, where that is so."""
        return self._file.error

    def made(self, session: "Session", played: Played, block: Block) -> None:
        """A block has been made."""
        self._file.made(played, block, self._branches[session])

    def rewound(self, session: "Session", to_block: int) -> None:
        self._of(session, {"rewind": to_block})

    def paused(self, session: "Session", paused: bool) -> None:
        self._of(session, {"pause": session.block} if paused else {"resume": session.block})

    def forked(self, session: "Session", twin: "Session") -> None:
        self._forks += 1
        self._branches[twin] = self._forks
        self._of(session, {"fork": self._branches[twin], "at": session.block})

    def close(self) -> None:
        self._file.close()

    def _of(self, session: "Session", told: Mapping[str, Any]) -> None:
        self._file.write(told, self._branches[session])


def _embeds(change: Change) -> bool:
    return isinstance(change, Asked) and change.embeds is not None


def _told(change: Change) -> dict[str, str]:
    return {"prompt": change.prompt} if isinstance(change, Asked) else {"event": change.value}


def _text(latents: Tensor) -> str:
    return base64.b64encode(latents.cpu().contiguous().numpy().tobytes()).decode()
