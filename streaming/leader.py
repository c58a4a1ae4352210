"""What a run over ranks is asked for, and who decides what each of its blocks is made under.

The first rank does: it follows a script or hears the player, and goes back where it is sent back
to. Its orders go along with the blocks, so every rank does the same at the same block.
"""

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from worldsim.controls import Control
from worldsim.script import Script
from worldsim.session import Session
from worldsim.share import Share
from worldsim.state import Asked, Played
from worldsim.streaming.link import Order
from worldsim.streaming.words import LONGEST, Telling
from worldsim.world import World


@dataclass(frozen=True)
class Run:
    """Everything that ranks have to know; it goes to other processes.

    Attributes:
        opener: opens the world, or what a rank needs of it.
        ranks: how many.
        settings: arguments of `World.settings`.
        prompt, controls: of `World.script`; where it is not ``scripted``, the player decides.
        blocks: how many there will be in all; None: until it is stopped.
        backend: of torch.distributed.
        decoding: make pictures; else there are latents only.
        overlap: where the last rank has steps as well, it decodes on a thread of its own.
        rehearse: seconds that each pass sleeps instead of computing; None computes.
        log: note every cell that ran.
        saves: a folder for the ranks' states, one every so many blocks (``every``).
        resume: what to go on from: a folder of as many ranks' states, or what `Session.save` wrote.
        snapshots: how many states every rank keeps in memory, to go back from.
        record: a replay file (.wsrun) that the last rank writes.
        fingerprint: of the whole world, which no rank has: needed to record, and where it is given
            a serial session's file must be of that world.
    """

    opener: Callable[[Share], World]
    ranks: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    controls: str | None = None
    scripted: bool = True
    blocks: int | None = None
    backend: str = "gloo"
    decoding: bool = True
    overlap: bool = True
    rehearse: float | None = None
    log: bool = False
    saves: str | None = None
    every: int = 0
    resume: str | None = None
    snapshots: int = 0
    record: str | None = None
    fingerprint: str = ""

    @property
    def keeps(self) -> bool:
        """Whether states may be written: ranks then have to know their weights' fingerprints."""
        return self.saves is not None or self.resume is not None or not self.scripted


class Inbox(Protocol):
    """Where the first rank hears from outside; a `multiprocessing` connection, say."""

    def poll(self) -> bool: ...
    def recv(self) -> tuple[str, dict[str, Any]]: ...


class Leader:
    """Decides what each block is made under, on the first rank."""

    def __init__(
        self, run: Run, script: Script | None, inbox: Inbox | None, words: Telling | None
    ) -> None:
        self._run, self._script, self._inbox, self._words = run, script, inbox, words
        self._stopped, self._epoch = False, 0
        self._behind: deque[Played] = deque()  # blocks to be made again, to where it goes back to
        self._again = False
        self._back: int | None = None
        self._folders: list[str] = []
        self._prompts: list[str] = []

    def next(self, session: Session) -> tuple[bool, Sequence[Control] | None]:
        """Whether a block is to be made, and its controls (None: what is held)."""
        self._hear(session)
        self._again = bool(self._behind)
        if self._again:
            played = self._behind.popleft()
            session.heed(played)
            return True, played.applied.controls
        over = self._run.blocks is not None and session.block >= self._run.blocks
        if self._stopped or over:
            return False, None
        return True, None if self._script is None else session.follow(self._script)

    def _hear(self, session: Session) -> None:
        while self._inbox is not None and not self._behind and self._inbox.poll():
            if _told(session) > LONGEST:
                return  # the rest waits for the next block: a header holds no more
            name, arguments = self._inbox.recv()
            if name == "stop":
                self._stopped = True
            elif name == "snapshot":
                self._folders.append(arguments["folder"])
            elif name == "rewind":
                self._go_back(session, arguments["to_block"])
            else:
                getattr(session, name)(**arguments)

    def _go_back(self, session: Session, to_block: int) -> None:
        try:
            self._behind.extend(session.go_back(min(to_block, session.block)))
            self._back = session.block
            self._prompts.append(session.prompt)  # that the others may have forgotten
        except ValueError as error:  # forgotten: nobody's run ends for that
            warnings.warn(f"{error}; the run goes on", stacklevel=2)

    def order(self, session: Session, began: float) -> Order:
        """Of the block that a session has just made, and began at that time."""
        played, run, done = session.now.past[-1], self._run, session.block
        back, self._back = self._back, None
        self._epoch += len(played.changes) + (back is not None)
        self._hold(session, played)
        start = session.frame - len(played.applied.controls)
        folders, self._folders = self._folders, []
        if run.saves is not None and run.every and done % run.every == 0:
            folders.append(str(Path(run.saves, f"block-{done:06d}")))
        kept = session.history.blocks
        return Order(
            done - 1, start, self._epoch, played, tuple(folders), began, back, self._again, kept
        )

    def _hold(self, session: Session, played: Played) -> None:
        """Have the words at hand that others may ask for because of this block."""
        told = [change.prompt for change in played.changes if isinstance(change, Asked)]
        prompts, self._prompts = [*self._prompts, *told], []
        if self._words is not None and prompts:
            if session.settings.rows > 1:
                prompts.append(session.settings.negative_prompt)
            self._words.hold(prompts, self._epoch)


def _told(session: Session) -> int:
    """Bytes of what was changed since the newest block, or more."""
    changes = session.now.changes
    return sum(32 + len(c.prompt.encode()) if isinstance(c, Asked) else 32 for c in changes)
