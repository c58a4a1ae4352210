"""When pictures are due: a deadline clock at the world's rate."""

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

    def stop(self) -> None:
        """Nothing is due until the next block comes."""
        self.due = None
