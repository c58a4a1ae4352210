"""One player: a session, what its player does, and the blocks that wait to be shown.

Three sides, each on a thread of its own:

- the player's (`control`, `ask`, `acknowledge`) only notes what was said and never waits;
- the computing one (`due`, `turn`) makes blocks and does what was asked for, see `turns`;
- the showing one (`waiting`, `take`) takes a finished block when it is due.

**Late latching.** A block is begun as late as the measured p99 of making one allows, so that it
heeds the newest controls. If a control changes before the block is shown, it is given up, also
half-made, and made anew, unless it would then come too late: cells have no side effects, so
restoring the snapshot taken before it is all there is to do.

**Run-ahead.** A block is begun only if the player has seen the one before it.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worldsim.controls import ControlState
from worldsim.schedule import Cell
from worldsim.session import Session
from worldsim.state import Block, Played, Snapshot
from worldsim.streaming.latency import Latency, quantile, trip
from worldsim.streaming.pacing import Pacer
from worldsim.streaming.pictures import Encode
from worldsim.streaming.recording import Recording

NEVER = float("inf")
TIMES_KEPT = 100  # of making a block: what p99 is taken from
HEARD_KEPT = 64  # controls since the last block; of more, the oldest are forgotten
UNANSWERED = 256  # blocks sent of which no picture was acknowledged yet
PATH_KEPT = 4096  # poses


class Superseded(Exception):
    """A block was given up: there is a newer control, and time to heed it."""


@dataclass
class Ready:
    """A finished block that waits to be shown, or has been.

    Attributes:
        run: grows with every reset, rewind and change of branch; pictures of another run are old.
        number: of its first picture, over all runs.
        pictures: encoded, in order.
        heeded: the controls that it is the first to heed.
        event: the newest control that it heeds.
        pose: at its end, or None.
        work: seconds of denoise, decode, encode.
        made, sent: when it was ready, and when its first picture left.
    """

    run: int
    block: Block
    number: int
    pictures: list[bytes]
    kind: int
    heeded: tuple[tuple[ControlState, float], ...]
    event: int
    pose: tuple[float, float, float] | None
    work: dict[str, float]
    made: float
    sent: float = 0.0


@dataclass(frozen=True)
class Branch:
    """A moment to come back to."""

    number: int
    block: int
    prompt: str
    snapshot: Snapshot
    path: tuple[tuple[int, float, float, float], ...] = ()


@dataclass
class Counts:
    """What happened so far, for the display and the tests."""

    made: int = 0
    shown: int = 0
    aborted: int = 0  # given up half-made
    redone: int = 0  # made, and given up before they were shown
    applied: int = 0  # controls that a shown block heeds


@dataclass
class Told:
    """Something that the player should hear of: ``kind`` names it, ``data`` is plain."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


class Player:
    """See the module docstring.

    Args:
        opened: opens the player's session under a seed and, where given, a first picture.
        encode: makes bytes of a picture.
        fps: the world's rate.
        late_latching: False begins every block as soon as it may be begun.
        wake: called whenever there may be something to compute.
        changed: called whenever there may be something to show or to tell.
        branches: how many may be kept.
        recording: where films of it are written.
    """

    def __init__(
        self,
        opened: Callable[..., Session],
        encode: Encode,
        fps: float,
        *,
        seed: int = 0,
        late_latching: bool = True,
        branches: int = 8,
        recording: Recording | None = None,
        wake: Callable[[], None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pacer = Pacer(fps)
        self.latency = Latency()
        self.counts = Counts()
        self.late_latching = late_latching
        self.wake, self.changed, self.clock = wake, changed, clock
        self.recording = recording
        self.seed = seed
        self.paused = False
        self.ended: str | None = None  # why
        self.active = clock()  # when the player last did something
        self.share = 1.0  # of the computing time, see `turns`
        self._opened = opened
        self._most_branches = branches
        self._encode = encode
        self._session: Session | None = None
        self._lock = Lock()
        # Said, and not yet heeded.
        self._commands: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=HEARD_KEPT)
        self._heard: list[tuple[ControlState, float]] = []
        self._urgent = False
        self._latest: ControlState | None = None
        # Made, and not yet shown for good.
        self._before: Snapshot | None = (
            None  # snapshot before the block that waits, or before the next
        )
        self._ready: Ready | None = None
        self._shown: deque[Ready] = deque()
        self._sent: deque[Ready] = deque(maxlen=UNANSWERED)  # no picture of it was acknowledged
        self._run = 0
        self._number = 0
        self._event = 0  # newest control that was heeded
        self._seen = -1  # newest block of this run of which a picture was painted
        self._allowed = clock()  # since when the next block may be made
        self._took: deque[float] = deque(maxlen=TIMES_KEPT)
        self._leaving = False
        self._told: deque[Told] = deque(maxlen=HEARD_KEPT)
        self._branches: dict[int, Branch] = {}
        self._way: deque[Played] = deque()  # blocks to be made once more, to where it was rewound
        self._path: deque[tuple[int, float, float, float]] = deque(maxlen=PATH_KEPT)

    # --- the player's side ----------------------------------------------------------------------
    def control(self, state: ControlState) -> int:
        """Note what the player does now; returns the block that will heed it at the earliest."""
        now = self.clock()
        with self._lock:
            before = self._latest
            if before is None or _differ(before, state):
                self._urgent = True
            self._latest = replace(state, look=(0.0, 0.0), scroll=0.0, prompt=None)
            self._heard.append((state, now))
            if len(self._heard) > HEARD_KEPT:
                del self._heard[0]
            self.active = now
            session = self._session
        self.wake()
        return 0 if session is None else int(session.block)

    def prompt(self, text: str, t_client: float = 0.0, event_id: int = 0) -> int:
        """Ask for something else in words; what is held stays held."""
        held = self._latest or ControlState()
        state = replace(
            held, look=(0.0, 0.0), scroll=0.0, prompt=text, t_client=t_client, event_id=event_id
        )
        return self.control(state)

    def ask(self, what: str, *values: Any) -> None:
        """Note a command; what it does is the method ``_do_…`` of its name."""
        with self._lock:
            self._commands.append((what, values))
            self.active = self.clock()
            if what == "pause":
                self.paused = True
        self.wake()

    def acknowledge(self, number: int, received: float, painted: float) -> None:
        """The player's browser has painted picture ``number``, by its own clock (seconds)."""
        with self._lock:
            ready = next((r for r in self._sent if 0 <= number - r.number < len(r.pictures)), None)
            if ready is None:
                return
            while self._sent.popleft() is not ready:
                pass
            if ready.block.index > self._seen:
                self._seen = ready.block.index
                self._allowed = self.clock()
            self.counts.applied += len(ready.heeded)
        for state, arrived in ready.heeded:
            if state.event_id and arrived < NEVER:
                key = state.t_client / 1e3
                self.latency.add(
                    trip(
                        state.event_id, ready.block.index, ready.work, arrived, ready.sent, key,
                        received, painted,
                    )
                )  # fmt: skip
        self.wake()

    def acknowledge_all(self) -> None:
        """Whatever was sent has been seen."""
        with self._lock:
            newest = max((ready.block.index for ready in self._sent), default=self._seen)
            self._sent.clear()
            self._seen, self._allowed = max(self._seen, newest), self.clock()
        self.wake()

    @property
    def asked(self) -> str:
        """What the world is asked to look like."""
        session = self._session
        return "" if session is None else str(session.prompt)

    def leave(self, why: str) -> None:
        """The player is gone: the session is closed at the next turn."""
        with self._lock:
            self.ended = self.ended or why
            self._leaving = True
        self.wake()
        self.changed()

    def told(self) -> list[Told]:
        """What there is to tell, once."""
        with self._lock:
            told = list(self._told)
            self._told.clear()
        return told

    # --- the showing side -----------------------------------------------------------------------
    def waiting(self) -> float | None:
        """When the block that is ready is due (at once: 0); None if there is none."""
        with self._lock:
            if self._ready is None or self.paused:
                return None
            return self.pacer.due or 0.0

    def take(self, now: float) -> tuple[Ready, float] | None:
        """The block that is ready, to be shown now, and when it was due; from here on it is not
        made anew. None if it was withdrawn."""
        with self._lock:
            ready = self._ready
            if ready is None or self.paused:
                return None
            self._ready = None
            due = self.pacer.begin(now, len(ready.pictures))
            ready.sent = now
            self._before = None
            self._shown.append(ready)
            self._sent.append(ready)
            self.counts.shown += 1
        self.wake()
        return ready, due

    # --- the computing side ---------------------------------------------------------------------
    def due(self) -> float:
        """When it wants the next turn: now or before, later, or never (until it is woken)."""
        with self._lock:
            if self._leaving or self._session is None or self._commands:
                return 0.0
            if self._shown or self._way:
                return 0.0
            if self._ready is not None:
                return 0.0 if self._to_be_redone() else NEVER
            if self._before is None:
                return 0.0
            return self._start()

    def turn(self) -> None:
        """Do the next thing that is to be done.

        Raises:
            Exception: whatever the model raises; the session cannot go on then.
        """
        if self._leaving:
            self.close()
            return
        if self._session is None:
            self._open(self.seed)
        if self._way:
            self._replay()
            return
        while self._commands:
            self._command(*self._commands.popleft())
        if self._shown:
            self._settle()
        with self._lock:
            redo = self._ready is not None and self._to_be_redone()
            start = NEVER if self._ready is not None else self._start()
        if redo:
            self._withdraw()
            self.counts.redone += 1
            self._allowed = self.clock()
        if redo or start <= self.clock():
            self._make()
        elif self._before is None and self._ready is None:
            self._before = self._live.snapshot()

    def close(self) -> None:
        """Give everything back. On the computing side."""
        with self._lock:
            session, self._session = self._session, None
            self._ready, self._leaving = None, True
            self.ended = self.ended or "closed"
            self._sent.clear()
            self._shown.clear()
        self._before = None
        self._branches.clear()
        if self.recording is not None:
            with suppress(OSError):
                self.recording.close()
        if session is not None:
            session.close()

    @property
    def closed(self) -> bool:
        return self._leaving and self._session is None

    @property
    def ahead(self) -> int:
        """Blocks that are made, and not yet acknowledged."""
        session = self._session
        return 0 if session is None else max(0, int(session.block) - 1 - self._seen)

    def expected(self, share: float) -> float:
        """Seconds in which that share of all blocks was ready, from when it was wanted."""
        return quantile(self._took, share)

    @property
    def _live(self) -> Session:
        assert self._session is not None
        return self._session

    def _start(self) -> float:
        """When to begin the next block. With the lock held."""
        if self.paused or self._live.block > self._seen + 1:
            return NEVER
        if not self.late_latching or self.pacer.due is None or not self._took:
            return 0.0
        return self.pacer.due - self.expected(0.99)

    def _to_be_redone(self) -> bool:
        """Whether there is a newer control than the block at hand heeds, and time for it. With the
        lock held."""
        if not (self.late_latching and self._urgent and self._heard and self._took):
            return False
        due = self.pacer.due
        return due is not None and self.clock() + self.expected(0.9) <= due

    def _open(self, seed: int, *pictures: Any) -> None:
        session = self._opened(seed, *pictures)
        with self._lock:
            old, self._session = self._session, session
            self.seed = seed
            self._branches.clear()
            self._way.clear()
        if old is not None:
            old.close()
        self._path.clear()
        self._anew(session.block)

    def _anew(self, block: int) -> None:
        """Go on from another place: what was ready, sent or seen counts no more."""
        with self._lock:
            self._ready, self._before = None, None
            self._sent.clear()
            self._shown.clear()
            self._run += 1
            self._seen = block - 1
            self._allowed = self.clock()
            self.pacer.stop()
            if self._latest is not None:  # keys stay held, whatever the world had been told
                self._heard = [(self._latest, NEVER)]
            self._told.append(Told("path", {"run": self._run, "points": list(self._path)}))
        self._tell_state()

    def _make(self) -> None:
        session = self._live
        if self._before is None:
            self._before = session.snapshot()
        with self._lock:
            heeded = tuple(self._heard)
            self._heard, self._urgent = [], False
            wanted = max(self._allowed, self._start())
        heeded = tuple(said for said in heeded if self._heeds(said[0]))
        try:
            block = session.step(on_step=self._look)
        except Superseded:
            assert self._before is not None
            session.restore(self._before)
            self.counts.aborted += 1
            with self._lock:
                self._heard = [*heeded, *self._heard]
                self._allowed = self.clock()
            return
        encoding = self.clock()
        pictures = [self._encode(picture) for picture in block.frames]
        done = self.clock()
        work = {"denoise": block.timings["denoise"], "decode": block.timings["decode"]}
        work["encode"] = done - encoding
        pose = None
        if session.world.actions.posed:
            x, y, heading = session.pose[:3]
            pose = (x, y, heading)
        for state, _ in heeded:
            self._event = state.event_id or self._event
        ready = Ready(
            self._run, block, self._number, pictures, self._encode.kind, heeded, self._event, pose,
            work, done,
        )  # fmt: skip
        self._number += len(pictures)
        self._took.append(done - wanted)
        with self._lock:
            self._ready = ready
        self.counts.made += 1
        self.changed()

    def _heeds(self, state: ControlState) -> bool:
        """Whether the session took a control; if not, the player is told why."""
        try:
            self._live.control(state=state)
        except ValueError as error:
            self.tell("notice", text=str(error))
            return False
        return True

    def _look(self, cell: Cell, x0: Tensor) -> None:
        """After each step: give the block up for a newer control, if there is time."""
        with self._lock:
            if self._to_be_redone() or self._commands or self._leaving:
                raise Superseded

    def _withdraw(self) -> None:
        """Take back the block that is ready and not shown."""
        with self._lock:
            ready, self._ready = self._ready, None
            if ready is None:
                return
            self._heard = [*ready.heeded, *self._heard]
        self._number = ready.number
        assert self._before is not None
        self._live.restore(self._before)

    def _settle(self) -> None:
        """After a block is shown: record it, and get ready for the next while nobody waits."""
        while self._shown:
            ready = self._shown.popleft()
            if ready.pose is not None:
                self._path.append((ready.block.index, *ready.pose))
            if self.recording is not None:
                try:
                    self.recording.write(ready.block.frames)
                except (OSError, ValueError) as error:
                    self.tell("notice", text=f"recording stopped: {error}")
                    self._tell_state()
        self._before = self._live.snapshot()

    # --- commands -------------------------------------------------------------------------------
    def _command(self, what: str, values: tuple[Any, ...]) -> None:
        try:
            getattr(self, f"_do_{what}")(*values)
        except (ValueError, OSError) as error:
            self.tell("notice", text=str(error))
        self._tell_state()

    def _do_pause(self) -> None:
        self._withdraw()
        with self._lock:
            self.paused = True
            self.pacer.stop()

    def _do_resume(self) -> None:
        with self._lock:
            self.paused = False
            self._allowed = self.clock()
        self.changed()

    def _do_reset(self, seed: int) -> None:
        self._open(seed)

    def _do_begin(self, picture: NDArray[np.uint8]) -> None:
        """Anew, from a picture uint8 ``[H, W, 3]``."""
        self._open(self.seed, picture)

    def _do_rewind(self, block: int) -> None:
        self._withdraw()
        self._settle()
        session = self._live
        now = session.now
        if not 0 <= block <= now.block:
            raise ValueError(f"cannot go back to block {block}: the next one is {now.block}")
        start = session.history.before(block, now)
        session.restore(start)
        # As `Session.rewind` does it, but a block a turn: others play meanwhile.
        self._way = deque(now.past[start.block - now.reach : block - now.reach])
        self._anew_at(block)

    def _replay(self) -> None:
        """Make one block of the way once more."""
        session = self._live
        session.decode(session.play(self._way.popleft()))
        if not self._way:
            self._tell_state()

    def _do_fork(self) -> None:
        """Remember this moment as a branch."""
        self._withdraw()
        self._settle()
        session = self._live
        if len(self._branches) >= self._most_branches:
            raise ValueError(f"{self._most_branches} branches are kept: drop one first")
        number = max(self._branches, default=0) + 1
        self._branches[number] = Branch(
            number, session.block, session.prompt, session.snapshot(), tuple(self._path)
        )

    def _do_switch(self, number: int) -> None:
        """Go on from a branch; it stays where it is."""
        if number not in self._branches:
            raise ValueError(f"there is no branch {number}")
        self._withdraw()
        branch = self._branches[number]
        self._way.clear()
        self._live.restore(branch.snapshot)
        self._path = deque(branch.path, maxlen=PATH_KEPT)
        self._anew_at(branch.block)

    def _do_drop(self, number: int) -> None:
        self._branches.pop(number, None)

    def _do_record(self, on: bool) -> None:
        if self.recording is None:
            raise ValueError("this player records nothing")
        if not on:
            self.recording.stop()
            self.tell("recorded")
        else:
            self.recording.start()

    def _anew_at(self, block: int) -> None:
        while self._path and self._path[-1][0] >= block:
            self._path.pop()
        self._anew(block)

    # --- telling --------------------------------------------------------------------------------
    def tell(self, kind: str, **data: Any) -> None:
        with self._lock:
            self._told.append(Told(kind, data))
        self.changed()

    def figures(self) -> dict[str, Any]:
        """How it goes, as plain numbers; times in milliseconds."""
        session, pacer = self._session, self.pacer
        return {
            "block": 0 if session is None else session.block,
            "oldest": 0 if session is None else session.now.reach,
            "paused": self.paused,
            "ahead": self.ahead,
            "share": self.share,
            "cache_bytes": 0 if session is None else cache_bytes(session),
            "pictures": pacer.pictures,
            "late": pacer.late,
            "dropped": pacer.dropped,
            "p99": 1e3 * self.expected(0.99),
            "latency": self.latency.figures(),
            **asdict(self.counts),
        }

    def _tell_state(self) -> None:
        session = self._session
        if session is None:
            return
        self.tell(
            "state",
            paused=self.paused,
            seed=self.seed,
            run=self._run,
            block=session.block,
            oldest=session.now.reach,
            prompt=session.prompt,
            recording=self.recording is not None and self.recording.on,
            branches=[
                {"number": branch.number, "block": branch.block, "prompt": branch.prompt}
                for branch in self._branches.values()
            ],
        )


def _differ(a: ControlState, b: ControlState) -> bool:
    """Whether a newer control asks for anything else."""
    moved = any(b.look) or b.scroll or b.prompt is not None
    return bool(moved) or a.buttons != b.buttons or a.move != b.move


def cache_bytes(session: Session) -> int:
    """Bytes of the pages that a session's context holds now."""
    pool = session.context.pool
    return sum(pool.page_nbytes(pool.kind(entry.page)) for entry in session.context.table)
