"""A player's seat: all that others touch while blocks are made, each on a thread of its own.

- The player's side (`control`, `ask`, `acknowledge`) only notes what was said and never waits.
- The showing one (`waiting`, `take`) takes a finished block when it is due.

What is made of it is `worldsim.streaming.player`'s business. `_lock` is held for notes alone, never
while anything is computed, written or sent.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import Any, NamedTuple

from worldsim.controls import FARTHEST, ControlState
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


class Seat:
    """See the module docstring; `worldsim.streaming.player.Player` is the whole of it.

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
        self._before: Snapshot | None = None  # before the block that waits, or the next
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

    @property
    def kind(self) -> int:
        """Of its pictures, see `pictures`."""
        return self._encode.kind

    def expected(self, share: float) -> float:
        """Seconds in which that share of all blocks was ready, from when it was wanted."""
        return quantile(self._took, share)


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
