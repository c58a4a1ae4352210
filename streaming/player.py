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
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worldsim.controls import FARTHEST, ControlState
from worldsim.replay import Differs, Replay
from worldsim.schedule import Cell
from worldsim.state import Block, Snapshot
from worldsim.streaming.course import Course
from worldsim.streaming.latency import Latency, quantile, trip
from worldsim.streaming.pacing import Pacer
from worldsim.streaming.pictures import Encode
from worldsim.streaming.recording import Recording

NEVER = float("inf")
TIMES_KEPT = 300  # of making a block: what p99 is taken from
HEARD_KEPT = 64  # controls since the last block; of more, the oldest are made one
COMMANDS_KEPT = 64  # that wait to be done; more are refused
LARGE = ("load", "begin")  # commands of which one at a time waits: they hold a file
UNANSWERED = 256  # blocks sent of which no picture was acknowledged yet


class Superseded(Exception):
    """A block was given up: there is a newer control, and time to heed it."""


class Said(NamedTuple):
    """A control, when it came, and after how many of the player's commands."""

    state: ControlState
    arrived: float
    after: int


@dataclass
class Ready:
    """A finished block that waits to be shown, or has been.

    Attributes:
        run: grows with every reset, rewind and change of branch; pictures of another run are old.
        number: of its first picture, over all runs.
        pictures: encoded, in order; the first is there at once, the others a moment later.
        count: how many there will be.
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
    count: int
    kind: int
    heeded: tuple[Said, ...]
    event: int
    pose: tuple[float, float, float] | None
    work: dict[str, float]
    made: float
    sent: float = 0.0


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
        course: its way through the world.
        encode: makes bytes of a picture.
        fps: the world's rate.
        late_latching: False begins every block as soon as it may be begun.
        recording: where films of it are written.
        wake: called whenever there may be something to compute.
        changed: called whenever there may be something to show or to tell.
    """

    def __init__(
        self,
        course: Course,
        encode: Encode,
        fps: float,
        *,
        seed: int = 0,
        late_latching: bool = True,
        recording: Recording | None = None,
        wake: Callable[[], None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.course = course
        self.pacer = Pacer(fps)
        self.latency = Latency()
        self.counts = Counts()
        self.late_latching = late_latching
        self.wake, self.changed, self.clock = wake, changed, clock
        self.recording = recording
        self.seed = seed  # to begin with
        self.paused = False
        self.ended: str | None = None  # why
        self.active = clock()  # when the player last did something
        self.share = 1.0  # of the computing time, see `turns`
        self.closed = False
        self.block = 0  # the next one
        self.oldest = 0  # to which one may go back
        self.asked = ""  # what the world is to look like
        self.cache_bytes = 0  # of the context's pages
        self._encode = encode
        self._lock = Lock()
        # Said, and not yet heeded.
        self._commands: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._done = 0  # commands
        self._heard: list[Said] = []
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

    # --- the player's side ----------------------------------------------------------------------
    def control(self, state: ControlState) -> int:
        """Note what the player does now; returns the block that will heed it at the earliest."""
        now = self.clock()
        with self._lock:
            before = self._latest
            if before is None or _differ(before, state):
                self._urgent = True
            self._latest = replace(state, look=(0.0, 0.0), scroll=0.0, prompt=None)
            self._heard.append(Said(state, now, self._done + len(self._commands)))
            while len(self._heard) > HEARD_KEPT:
                _fold(self._heard)
            self.active = now
        self.wake()
        return self.block

    def prompt(self, text: str, t_client: float = 0.0, event_id: int = 0) -> int:
        """Ask for something else in words; what is held stays held."""
        held = self._latest or ControlState()
        state = replace(
            held, look=(0.0, 0.0), scroll=0.0, prompt=text, t_client=t_client, event_id=event_id
        )
        return self.control(state)

    def ask(self, what: str, *values: Any) -> bool:
        """Note a command; what it does is the method ``_do_…`` of its name. False, and the player
        is told, if too many wait already, or another file."""
        with self._lock:
            self.active = self.clock()
            large = what in LARGE and any(waiting in LARGE for waiting, _ in self._commands)
            if taken := not large and len(self._commands) < COMMANDS_KEPT:
                self._commands.append((what, values))
                self.paused = self.paused or what == "pause"
        if taken:
            self.wake()
        else:
            self.tell("notice", text=f"{what}: too much waits to be done: ask again in a moment")
        return taken

    def acknowledge(self, number: int, received: float, due: float, painted: float) -> None:
        """The player's browser has painted picture ``number``, by its own clock (seconds)."""
        with self._lock:
            self.pacer.painted(painted - due)
            ready = next((r for r in self._sent if 0 <= number - r.number < r.count), None)
            if ready is None:
                return
            while self._sent.popleft() is not ready:
                pass
            if ready.block.index > self._seen:
                self._seen = ready.block.index
                self._allowed = self.clock()
            self.counts.applied += len(ready.heeded)
            if number == ready.number and received <= due:
                self.pacer.follow(painted - due)
        for state, arrived, _ in ready.heeded:
            if state.event_id and arrived < NEVER:
                key = state.t_client / 1e3
                self.latency.add(
                    trip(
                        state.event_id, ready.block.index, ready.work, arrived, ready.sent, key,
                        received, due, painted,
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
            due = self.pacer.begin(now, ready.count)
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
            if self._leaving or not self.course.begun or self._commands:
                return 0.0
            if self._shown or self.course.behind:
                return 0.0
            if self._ready is not None:
                return 0.0 if self._to_be_redone() else NEVER
            return 0.0 if self._before is None else self._start()

    def turn(self) -> None:
        """Do the next thing that is to be done.

        Raises:
            Exception: whatever the model raises; the session cannot go on then.
        """
        if self._leaving:
            self.close()
        elif not self.course.begun:
            self._begin(self.seed)
        elif self.course.behind:
            self._catch_up()
        elif self._shown:
            self._settle()
        elif self._commands:
            with self._lock:
                command = self._commands.popleft()
                self._done += 1
            self._command(*command)
        else:
            self._latch()

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            self._ready, self._before, self._leaving = None, None, True
            self.ended = self.ended or "closed"
            self._sent.clear()
            self._shown.clear()
        if self.recording is not None:
            with suppress(OSError):
                self.recording.close()
        self.course.close()
        self.closed = True

    @property
    def kind(self) -> int:
        """Of its pictures, see `pictures`."""
        return self._encode.kind

    def expected(self, share: float) -> float:
        """Seconds in which that share of all blocks was ready, from when it was wanted."""
        return quantile(self._took, share)

    def _start(self) -> float:
        """When to begin the next block. With the lock held."""
        if self.paused or self.block > self._seen + 1:
            return NEVER
        if not self.late_latching or self.pacer.due is None or not self._took:
            return 0.0
        return self.pacer.due - self.expected(0.99)

    def _to_be_redone(self) -> bool:
        """Whether there is a newer control than the block at hand heeds, and time for it. With the
        lock held."""
        due = self.pacer.due
        if not (self.late_latching and self._urgent and self._took) or due is None:
            return False
        return not self.course.replaying and self.clock() + self.expected(0.9) <= due

    def _latch(self) -> None:
        """Make the next block, or the one that waits anew, if it is time."""
        with self._lock:
            redo = self._ready is not None and self._to_be_redone()
            start = NEVER if self._ready is not None else self._start()
        if redo:
            self._withdraw()
            self.counts.redone += 1
        if self._before is None:
            self._before = self.course.session.snapshot()
        if redo or start <= self.clock():
            self._make()

    def _make(self) -> None:
        with self._lock:
            heeded = tuple(self._heard)
            changed, self._heard, self._urgent = self._urgent, [], False
            wanted = max(self._allowed, self._start())
        if changed and self.course.replaying:
            self.course.take_over()
            self._before = self.course.session.snapshot()
            self._tell_state()
        heeded = tuple(said for said in heeded if self._heeds(said.state))
        try:
            block = self.course.step(self._look)
        except Superseded:
            assert self._before is not None
            self.course.session.restore(self._before)
            self.counts.aborted += 1
            with self._lock:
                self._heard = [*heeded, *self._heard]
                self._urgent = True
                self._allowed = self.clock()
            return
        except (Differs, ValueError) as error:
            if not self.course.replaying:
                raise
            differs = isinstance(error, Differs)
            why = "another world than was recorded" if differs else "a run that makes no sense"
            self.tell("notice", text=f"this is {why}: {error}")
            self._begin(self.course.seed)
            return
        encoding = self.clock()
        pictures = [self._encode(block.frames[0])]
        done = self.clock()
        work = {"denoise": block.timings["denoise"], "decode": block.timings["decode"]}
        work["encode"] = done - encoding
        pose = None
        if self.course.session.world.actions.posed:
            x, y, heading = self.course.session.pose[:3]
            pose = (x, y, heading)
        for said in heeded:
            self._event = said.state.event_id or self._event
        ready = Ready(
            self._run, block, self._number, pictures, len(block.frames), self._encode.kind, heeded,
            self._event, pose, work, done,
        )  # fmt: skip
        self._number += ready.count
        self._took.append(done - wanted)
        with self._lock:
            self._ready = ready
        self.changed()
        pictures += [self._encode(picture) for picture in block.frames[1:]]
        self._look_around()
        self.counts.made += 1

    def _heeds(self, state: ControlState) -> bool:
        """Whether the session took a control; if not, the player is told why."""
        if self.course.replaying:
            return False
        try:
            with warnings.catch_warnings(record=True) as passed_over:
                warnings.simplefilter("always")
                self.course.session.control(state=state)
        except ValueError as error:
            self.tell("notice", text=str(error))
            return False
        for warning in passed_over:
            self.tell("notice", text=str(warning.message))
        return True

    def _look(self, cell: Cell, x0: Tensor) -> None:
        """After each step: give the block up for a newer control, if there is time."""
        with self._lock:
            if self._to_be_redone() or self._leaving:
                raise Superseded

    def _withdraw(self) -> None:
        """Take back the block that is ready and not shown. One of a replay stays: it would be the
        same."""
        with self._lock:
            if self.course.replaying or self._ready is None:
                return
            ready, self._ready = self._ready, None
            self._heard = [*ready.heeded, *self._heard]
            self._allowed = self.clock()
        assert self._before is not None
        self._number = ready.number
        self.course.session.restore(self._before)
        self._look_around()

    def _settle(self) -> None:
        """After a block is shown: record it, and get ready for the next while nobody waits."""
        while self._shown:
            ready = self._shown.popleft()
            self.course.walked(ready.block, ready.pose)
            if self.recording is not None:
                try:
                    self.recording.write(ready.block.frames)
                except (OSError, ValueError) as error:
                    self.tell("notice", text=f"the recording has ended: {error}")
                    self._tell_state()
        self._before = self.course.session.snapshot()

    def _begin(self, seed: int, *pictures: Any) -> None:
        try:
            self.course.begin(seed, *pictures)
        except OSError as error:
            self.tell("notice", text=f"no replay file is written: {error}")
        self._anew()

    def _catch_up(self) -> None:
        self.course.catch_up()
        if not self.course.behind:
            self._anew()

    def _anew(self) -> None:
        """It goes on from elsewhere: what was ready, sent or seen counts no more."""
        self._look_around()
        with self._lock:
            self._ready, self._before = None, None
            self._sent.clear()
            self._shown.clear()
            self._run += 1
            self._seen = self.block - 1
            self._allowed = self.clock()
            self.pacer.stop()
            # What was said before the command was meant for where it came from.
            self._heard = [said for said in self._heard if said.after >= self._done]
            self._urgent = self._urgent and bool(self._heard)
            if not self._heard and self._latest is not None:
                # Keys stay held, whatever the world had been told.
                self._heard = [Said(self._latest, NEVER, self._done)]
        self.tell("path", run=self._run, points=list(self.course.path))
        self._tell_state()

    def _look_around(self) -> None:
        """Note what others may want to know, who may not ask the session."""
        now, pool = self.course.session.now, self.course.session.context.pool
        self.block, self.oldest, self.asked = now.block, self.course.oldest, now.asked.prompt
        table = self.course.session.context.table
        self.cache_bytes = sum(pool.page_nbytes(pool.kind(entry.page)) for entry in table)

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
        self._begin(seed)

    def _do_begin(self, picture: NDArray[np.uint8]) -> None:
        """Anew, from a picture uint8 ``[H, W, 3]``."""
        self._begin(self.course.seed, picture)

    def _do_load(self, replay: Replay) -> None:
        try:
            self.course.follow(replay)
        except OSError as error:
            self.tell("notice", text=f"no replay file is written: {error}")
        self._anew()

    def _do_rewind(self, block: int) -> None:
        self._withdraw()
        self.course.rewind(block)
        if not self.course.behind:
            self._anew()

    def _do_fork(self) -> None:
        self._withdraw()
        self.course.fork()

    def _do_switch(self, number: int) -> None:
        self._withdraw()
        self.course.switch(number)
        self._anew()

    def _do_drop(self, number: int) -> None:
        self.course.drop(number)

    def _do_record(self, on: bool) -> None:
        if self.recording is None:
            raise ValueError("this player records nothing")
        if on:
            self.recording.start()
        elif self.recording.on:
            self.recording.stop()
            self.tell("recorded")

    # --- telling --------------------------------------------------------------------------------
    def tell(self, kind: str, **data: Any) -> None:
        with self._lock:
            self._told.append(Told(kind, data))
        self.changed()

    def figures(self) -> dict[str, Any]:
        """How it goes, as plain numbers; times in milliseconds."""
        return {
            "block": self.block,
            "oldest": self.oldest,
            "paused": self.paused,
            "ahead": max(0, self.block - 1 - self._seen),
            "share": self.share,
            "cache_bytes": self.cache_bytes,
            "pictures": self.pacer.pictures,
            "late": self.pacer.late,
            "dropped": self.pacer.dropped,
            "p99": 1e3 * self.expected(0.99),
            "latency": self.latency.figures(),
            **asdict(self.counts),
        }

    def _tell_state(self) -> None:
        self.tell(
            "state",
            paused=self.paused,
            seed=self.course.seed,
            run=self._run,
            block=self.block,
            oldest=self.oldest,
            behind=len(self.course.behind),
            replaying=self.course.replaying,
            prompt=self.asked,
            recording=self.recording is not None and self.recording.on,
            branches=[
                {"number": branch.number, "block": branch.block, "prompt": branch.prompt}
                for branch in self.course.branches.values()
            ],
        )


def _differ(a: ControlState, b: ControlState) -> bool:
    """Whether a newer control asks for anything else."""
    moved = any(b.look) or b.scroll or b.prompt is not None
    return bool(moved) or a.buttons != b.buttons or a.move != b.move


def _fold(heard: list[Said]) -> None:
    """Make one of the two oldest controls between which no command came: no prompt, no movement and
    no tap is lost. The newest stays as it is, since it says what is held."""
    pairs = range(len(heard) - 2)
    at = next((i for i in pairs if heard[i].after == heard[i + 1].after), 0)
    (a, *_), (b, arrived, after) = heard[at : at + 2]
    across, down, scroll = (
        max(-FARTHEST, min(FARTHEST, x + y))
        for x, y in zip((*a.look, a.scroll), (*b.look, b.scroll), strict=True)
    )
    state = replace(
        b, buttons=a.buttons | b.buttons, look=(across, down), scroll=scroll,
        prompt=a.prompt if b.prompt is None else b.prompt,
    )  # fmt: skip
    heard[at : at + 2] = [Said(state, arrived, after)]
