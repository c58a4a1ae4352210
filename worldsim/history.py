"""Which snapshots a session keeps to go back to: dense where it is near, sparse where it is far."""

from worldsim.state import Moment, Snapshot

STRIDE = 8  # blocks from one snapshot to the next
PAST = 4096  # blocks back to which a session knows how it came about


class History:
    """Snapshots of one session, in order; the first one is its beginning and costs no page.

    Attributes:
        most: how many are kept beside the first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: list[Snapshot] = []

    @property
    def blocks(self) -> tuple[int, ...]:
        """Right before which of them there is one."""
        return tuple(snapshot.block for snapshot in self._kept)

    def wants(self, block: int) -> bool:
        """Whether a snapshot before this block is to be added."""
        return self.most > 0 and block >= self._kept[-1].block + STRIDE

    def add(self, snapshot: Snapshot) -> None:
        """Keep another one; where there are too many, that one goes which leaves the smallest gap
        for its age."""
        self._kept.append(snapshot)
        if len(self._kept) <= 1 + self.most:
            return
        now = snapshot.block
        inner = range(1, len(self._kept) - 1)

        def gap(i: int) -> float:
            before, after = self._kept[i - 1].block, self._kept[i + 1].block
            return (after - before) / (now - before)

        del self._kept[min(inner, key=gap) if inner else 1]

    def go_to(self, snapshot: Snapshot) -> None:
        """Keep only what lies on the way to this one."""
        moment = snapshot.moment
        self._kept = [kept for kept in self._kept if moment.comes_from(kept.moment)]
        if not self._kept:
            self._kept = [snapshot]

    def before(self, block: int, now: Moment) -> Snapshot:
        """The latest snapshot from which a block can be reached.

        Raises:
            ValueError: if there is none any more.
        """
        known = [kept for kept in self._kept if now.comes_from(kept.moment)]
        ready = [kept for kept in known if kept.block <= block]
        if not ready:
            earliest = min((kept.block for kept in known), default=now.block)
            raise ValueError(
                f"cannot go back to block {block}: the way is known from {earliest} on"
            )
        return ready[-1]

    def copy(self) -> "History":
        """The same for a fork."""
        twin = History(self.most)
        twin._kept = list(self._kept)
        return twin
