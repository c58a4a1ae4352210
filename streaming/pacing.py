"""When pictures are due: a deadline clock at the world's rate."""

from collections import deque

WATCHED = 8  # blocks
IDLE = 0.007  # seconds from receiving a picture to its being painted, where nothing is waited for
SLEW = 0.001  # seconds by which one deadline is moved at most
LATE = 0.5  # of a period: a picture that leaves later than this after it was due is a late one


class Pacer:
    """Deadlines of one player's pictures, in seconds of any steady clock.

    Pictures are due one period after another. A small delay moves no deadline, so that it does not
    add up; a block that comes too late moves all those after it, so that nothing is hurried.

    Attributes:
        period: seconds from picture to picture.
        due: when the first picture of the next block is due; None before the first block, and after
            a pause.
        pictures: how many were shown or dropped so far.
        late: how many of them were shown more than half a period after they were due.
        dropped: how many were not shown, since the next one was due already.
    """

    def __init__(self, fps: float) -> None:
        self.period = 1 / fps
        self.due: float | None = None
        self.pictures = 0
        self.late = 0
        self.dropped = 0
        self._waited: deque[float] = deque(maxlen=WATCHED)

    def begin(self, now: float, pictures: int) -> float:
        """A block's first picture is shown now; returns when it was due."""
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
        """Whether to show picture ``index`` of a block now, or to drop it; counts it."""
        self.pictures += 1
        wanted = self.at(due, index)
        if index + 1 < pictures and now >= wanted + self.period:
            self.dropped += 1
            return False
        if index and now - wanted > LATE * self.period:
            self.late += 1
        return True

    def follow(self, waited: float) -> None:
        """A block's first picture lay for so long in the browser before the screen's next frame.

        Where all of late did, blocks come too early for nothing: deadlines move, a little each
        time, to just before the screen's own. Pictures are seen when they were, and heed what is
        done until later. Where the network is not steady some wait for nothing, and nothing moves.
        """
        self._waited.append(waited)
        if self.due is not None and len(self._waited) == WATCHED:
            self.due += min(SLEW, max(0.0, min(self._waited) - IDLE))

    def stop(self) -> None:
        """Nothing is due until the next block comes."""
        self.due = None
