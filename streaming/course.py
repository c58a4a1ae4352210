"""The way of one player through a world: the session it is in, and where else it may go on.

Anew under a seed or from a picture, back to an earlier block, off to a fork, along a recorded run.
Not for several threads: `player` calls it on the computing one only.
"""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldsim.replay import HISTORY, Replay
from worldsim.rollout import OnStep
from worldsim.session import Session
from worldsim.state import Block, Played

PATH_KEPT = 4096  # poses

Place = tuple[int, float, float, float]  # block, x, y, heading


@dataclass(frozen=True)
class Branch:
    """A moment to come back to."""

    number: int
    block: int
    prompt: str
    session: Session
    path: tuple[Place, ...]


class Course:
    """See the module docstring.

    Args:
        opened: opens a session under a seed and, where given, a first picture.
        branches: how many forks may be kept.
        run: where the replay file is written, or None.
        history: bytes of the snapshots that a recorded run may keep to rewind to.

    Attributes:
        run: as it was given.
        seed: of the session.
        path: where the player was after each block, where the world has poses.
        branches: the forks that are kept, by number.
        behind: blocks that are to be made once more, until it is where it was sent back to.
    """

    def __init__(
        self,
        opened: Callable[..., Session],
        branches: int = 8,
        run: Path | None = None,
        history: int = HISTORY,
    ) -> None:
        self.seed = 0
        self.path: deque[Place] = deque(maxlen=PATH_KEPT)
        self.branches: dict[int, Branch] = {}
        self.behind: deque[Played] = deque()
        self._opened = opened
        self._most = branches
        self._history = history
        self.run = run
        self._session: Session | None = None
        self._replay: Generator[tuple[int, Block], None, None] | None = None
        self._left = 0  # blocks of the replay

    @property
    def begun(self) -> bool:
        return self._session is not None

    @property
    def session(self) -> Session:
        assert self._session is not None
        return self._session

    @property
    def replaying(self) -> bool:
        return self._replay is not None

    @property
    def oldest(self) -> int:
        """The block to right before which one may go back: what was given is not made again."""
        now = self.session.now
        return max(now.reach, len(now.given))

    def begin(self, seed: int, *pictures: Any) -> None:
        """Go on in a new session.

        Raises:
            ValueError: if it cannot be opened; then the old one stays.
            OSError: if no replay file can be written; the new one goes on.
        """
        session = self._opened(seed, *pictures)
        try:
            self.close()
        finally:  # also where the old one's file could not be ended
            self._session, self.seed = session, seed
        self._record()

    def follow(self, replay: Replay) -> None:
        """Go on along a recorded run, without forks and rewinds: its blocks come from `step`.

        Raises:
            ValueError, OSError: as `begin`.
        """
        session = replay.open(self._history)
        try:
            self.close()
        finally:
            self._session, self.seed = session, session.settings.seed
            self._replay, self._left = replay.__iter__(), replay.run.blocks
        self._record()

    def step(self, on_step: OnStep | None = None) -> Block:
        """The next block, of the replay while there is one.

        Raises:
            Differs, ValueError: where a replay cannot go on; `begin` anew.
        """
        if self._replay is not None and not self._left:
            self.take_over()
        if self._replay is None:
            return self.session.step(on_step=on_step)
        self._left -= 1
        _, block = next(self._replay)
        return block

    def take_over(self) -> None:
        """From here on the player goes himself."""
        if self._replay is not None:
            replay, self._replay = self._replay, None
            old, self._session = self.session, self.session.fork()
            replay.close()
            old.close()  # which a replay does only where it has begun

    def rewind(self, block: int) -> None:
        """Go back to right before a block, or the first that was not given. It is there once
        nothing is ``behind`` any more: as `Session.rewind`, but a block at a time, since others
        play meanwhile.

        Raises:
            ValueError: for a block that it has not come to, or the way to which is forgotten.
        """
        self.take_over()
        block = max(block, len(self.session.now.given))
        self.behind.extend(self.session.go_back(block))
        self._walked_to(block)

    def catch_up(self) -> None:
        """Make one block of those behind."""
        session = self.session
        session.decode(session.play(self.behind.popleft()))

    def fork(self) -> None:
        """Keep this moment.

        Raises:
            ValueError: if too many are kept already.
        """
        if len(self.branches) >= self._most:
            raise ValueError(f"{self._most} forks are kept at a time: drop one first")
        session, number = self.session, max(self.branches, default=0) + 1
        self.branches[number] = Branch(
            number, session.block, session.prompt, session.fork(), tuple(self.path)
        )

    def switch(self, number: int) -> None:
        """Go on from a moment that was kept, which stays.

        Raises:
            ValueError: if there is none of that number.
        """
        if number not in self.branches:
            raise ValueError(f"there is no fork {number}")
        self.take_over()
        branch = self.branches[number]
        twin = branch.session.fork()
        self.session.close()
        self._session = twin
        self.path = deque(branch.path, maxlen=PATH_KEPT)

    def drop(self, number: int) -> None:
        """Keep a moment no longer."""
        if (branch := self.branches.pop(number, None)) is not None:
            branch.session.close()

    def walked(self, block: Block, pose: tuple[float, float, float] | None) -> None:
        """A block was shown."""
        if pose is not None:
            self.path.append((block.index, *pose))

    def close(self) -> None:
        """Give everything back; `begin` may follow."""
        session, self._session = self._session, None
        replay, self._replay = self._replay, None
        for number in list(self.branches):
            self.drop(number)
        self.behind.clear()
        self.path.clear()
        try:
            if self.run is not None:
                self.run.unlink(missing_ok=True)
            if session is not None and session.recorder is not None:
                session.recorder.close()
        finally:
            if session is not None:
                session.close()
            if replay is not None:
                replay.close()

    def _walked_to(self, block: int) -> None:
        while self.path and self.path[-1][0] >= block:
            self.path.pop()

    def _record(self) -> None:
        if self.run is not None:
            self.session.record(self.run)
