"""When pictures are due: a deadline clock at the world's rate."""

import math
from collections import deque

WATCHED = 8  # blocks
AHEAD = 0.018  # seconds from a block's being due here to its first picture's being seen
IDLE = 0.004  # seconds between a picture's being due and painted that are left as they are
SLEW = 0.001  # seconds by which one deadline is moved at most
LATE = 0.5  # of a period: what leaves or is painted later than this after it was due is late


class Pacer:
    """Deadlines of one player's pictures, in seconds of any steady clock.

    Blocks leave when their first picture is due here, and all their pictures at once; they are seen
    `AHEAD` seconds later, one period after another. A small delay moves no deadline, so that it
    does not add up; a block that comes too late moves all those after it, so that nothing is
    hurried.

    Attributes:
        period: seconds from picture to picture.
        due: when the next block is due here; None before the first block, and after a pause.
        pictures: how many were sent or dropped so far.
        late: how many of them were painted, or how many blocks left, more than half a period after
            they were due.
        dropped: how many were not sent, since the next one was due already.
    """

    def __init__(self, fps: float) -> None:
        self.period = 1 / fps
        self.due: float | None = None
        self.pictures = 0
        self.late = 0
        self.dropped = 0
        self._waited: deque[float] = deque(maxlen=WATCHED)

    def begin(self, now: float, pictures: int) -> float:
        """A block leaves now; returns when it was due."""
        due = now if self.due is None else self.due
        late = now - due
        if late > LATE * self.period:
            self.late += 1
            due = now
        self.due = due + pictures * self.period
        return due

    def at(self, due: float, index: int) -> float:
        """When picture ``index`` of a block is due whose first one was due at ``due``."""
        return due + index * self.period

    def shows(self, now: float, due: float, index: int, pictures: int) -> bool:
        """Whether to send picture ``index`` of a block now, or to drop it; counts it."""
        self.pictures += 1
        wanted = self.at(due, index)
        if index + 1 < pictures and now >= wanted + self.period:
            self.dropped += 1
            return False
        return True

    def painted(self, delay: float) -> None:
        """A picture was painted so long after it was due on the screen."""
        self.late += delay > LATE * self.period

    def follow(self, waited: float) -> None:
        """A block's first picture, in the browser by then, was painted so long after it was due:
        the screen has frames of its own, and the nearest may be a little earlier.

        Deadlines follow the screen, a little each time, so that frames begin right where pictures
        are due: what waits for a frame could as well have heeded what was done until later, and
        half-way between two frames pictures would take now the one and now the other.
        """
        self._waited.append(waited)
        if self.due is None or len(self._waited) < WATCHED:
            return
        longest = sorted(self._waited)[-2]  # but for one that something else held up
        off = max(0.0, abs(longest) - IDLE)
        self.due += math.copysign(min(SLEW, off), longest)

    def stop(self) -> None:
        """Nothing is due until the next block comes."""
        self.due = None
