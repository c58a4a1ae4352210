"""What can happen to ranks, and who notices: loads no torch.

Every rank has a side thread that beats: it counts up its own key in the run's store. Whoever
watches (the process that started the ranks, or under torchrun every rank) sees a rank that died by
its process, one that hangs by its silence, and one that failed by what it said.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import Protocol

SILENT = 10.0  # seconds without a heartbeat after which a rank counts as hanging
WAKING = 60.0  # seconds until its first one: its process loads what it needs to have a heart
BEAT = 0.25  # seconds between two heartbeats
GRACE = 0.75  # seconds in which others may still say what they know


class RankFailed(Exception):
    """A rank died, hung or failed; one line that names it and the block it was at."""


class PeerLost(Exception):
    """Another rank went away in the middle of a message: that one is to blame."""


class Store(Protocol):
    """What is needed of `torch.distributed.TCPStore`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Failure:
    """What a rank said when it failed.

    Attributes:
        peer: only because of another one.
        asked: it was asked for what cannot be, which is nobody's failure.
    """

    rank: int
    block: int
    why: str
    peer: bool = False
    asked: bool = False

    def error(self) -> Exception:
        """What to raise."""
        return ValueError(self.why) if self.asked else RankFailed(str(self))

    def __str__(self) -> str:
        return f"rank {self.rank} {self.why} at block {self.block}; the run has ended on every rank"


class Beat:
    """A rank's side of it.

    Attributes:
        block: that the rank is at; goes with every beat.
    """

    def __init__(self, store: Store, rank: int, lost: Callable[[], None]) -> None:
        """``store``: for this thread alone. ``lost`` is called where the store is gone, and with it
        whoever watches."""
        self.block = 0
        self._store, self._rank, self._lost = store, rank, lost
        self._over = Event()
        Thread(target=self._run, name="worldsim-beat", daemon=True).start()

    def _run(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", f"{count} {self.block}")
            except Exception:
                if not self._over.is_set():
                    self._lost()
                return
            self._over.wait(BEAT)

    def fail(self, store: Store, why: str, peer: bool = False, asked: bool = False) -> None:
        """Say why this rank ends; see `Failure`."""
        said = {"block": self.block, "why": why, "peer": peer, "asked": asked}
        store.set(f"failed/{self._rank}", json.dumps(said))

    def done(self, store: Store) -> None:
        """Say that this rank ends because all is done."""
        self._over.set()
        store.set(f"done/{self._rank}", "1")


class Watch:
    """The other side: notes heartbeats, and finds who is to blame."""

    def __init__(self, store: Store, ranks: int) -> None:
        self._store, self._ranks = store, ranks
        self._heard = [("", time.monotonic())] * ranks

    def listen(self) -> int | None:
        """Note the newest beats; returns a rank that has been silent for too long."""
        now = time.monotonic()
        for rank in range(self._ranks):
            said = self._read(f"beat/{rank}")
            if said != self._heard[rank][0]:
                self._heard[rank] = said, now
        # Weights are loaded with a beating heart; only what comes before it may take longer.
        silent = [
            (now - when, rank)
            for rank, (said, when) in enumerate(self._heard)
            if now - when > (SILENT if said else WAKING) and not self._read(f"done/{rank}")
        ]
        return max(silent)[1] if silent else None

    def block(self, rank: int) -> int:
        """The block that a rank was last heard to be at."""
        said = self._read(f"beat/{rank}") or self._heard[rank][0]
        return int(said.split()[1]) if said else 0

    def said(self) -> Failure | None:
        """What ranks said of their end: of several the one that blames no other."""
        told = []
        for rank in range(self._ranks):
            if said := self._read(f"failed/{rank}"):
                told.append(Failure(rank, **json.loads(said)))
        return min(told, key=lambda failure: failure.peer, default=None)

    def silent(self, rank: int) -> Failure:
        limit = SILENT if self._heard[rank][0] else WAKING
        return Failure(rank, self.block(rank), f"hangs: no heartbeat for {limit:.0f} s")

    def died(self, rank: int, code: int | None) -> Failure:
        """Of a process that ended with this exit code and no word."""
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed ({signal.Signals(-code).name})"
        return Failure(rank, self.block(rank), how)

    def beats(self, rank: int) -> str:
        """Changes with every beat of a rank."""
        return self._read(f"beat/{rank}")

    def ended(self, rank: int) -> bool:
        """Whether a rank said that it ended, for whatever reason."""
        return bool(self._read(f"done/{rank}") or self._read(f"failed/{rank}"))

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


def end_process(code: int = 1) -> None:
    """Leave at once: no handler, no other thread and no message in flight can hold it up."""
    os._exit(code)
