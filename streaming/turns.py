"""Many players, one computing thread: they take turns by block.

The next turn goes to the player among those who want one who had the least computing time of late.
A player's error ends that player and no other.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Thread

from worldsim.streaming.player import Player
from worldsim.streaming.seat import NEVER

MEMORY = 4.0  # seconds in which what a player had is forgotten to 1/e
REST = 0.5  # seconds between looks at who is idle


class Turns:
    """Runs players until it is closed; `add` and `drop` may be called from any thread."""

    def __init__(
        self,
        idle: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
        start: bool = True,
    ) -> None:
        """``idle``: seconds without a sign of a player after which it is dropped."""
        self._idle = idle
        self._clock = clock
        self._players: dict[Player, float] = {}  # seconds of computing, fading
        self._faded = clock()
        self._wake = Condition()
        self._woken = False
        self._closing = False
        self._thread = Thread(target=self._run, name="worldsim-turns", daemon=True)
        if start:
            self._thread.start()

    def add(self, player: Player) -> None:
        """A player joins; it gets no more than its share for having come late."""
        player.wake = self.wake
        with self._wake:
            if self._closing:
                raise ValueError("this server is closing")
            self._players[player] = min(self._players.values(), default=0.0)
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        with self._wake:
            self._woken = True
            self._wake.notify()

    def __len__(self) -> int:
        with self._wake:
            return len(self._players)

    @property
    def players(self) -> list[Player]:
        with self._wake:
            return list(self._players)

    def close(self) -> None:
        """End all players, then the thread."""
        with self._wake:
            self._closing = True
        for player in self.players:
            player.leave("the server was stopped")
        self.wake()
        if self._thread.is_alive():
            self._thread.join()

    def once(self) -> float:
        """One turn, if anybody wants one; returns when the next is wanted."""
        now = self._clock()
        self._let_go(now)
        wishes = {player: player.due() for player in self.players}
        wanted = {player: due for player, due in wishes.items() if due <= now}
        if not wanted:
            return min(wishes.values(), default=NEVER)
        player = min(wanted, key=lambda player: (self._players[player], wanted[player]))
        try:
            player.turn()
        except Exception as error:  # this player's, whatever it is: the others go on
            player.leave(f"the world stopped: {type(error).__name__}: {error}")
            with suppress(Exception):
                player.close()
        if player.closed:
            with self._wake:
                del self._players[player]
        self._count(player, self._clock() - now)
        return 0.0

    def _run(self) -> None:
        while True:
            next_ = self.once()
            with self._wake:
                if self._closing and not self._players:
                    return
                if not self._woken:
                    self._wake.wait(min(REST, max(0.0, next_ - self._clock())))
                self._woken = False

    def _let_go(self, now: float) -> None:
        for player in self.players:
            if now - player.active > self._idle:
                player.leave(f"nothing was done for {self._idle / 60:g} minutes")

    def _count(self, player: Player, seconds: float) -> None:
        """Who had how much, of late."""
        now = self._clock()
        fade = math.exp((self._faded - now) / MEMORY)
        self._faded = now
        with self._wake:
            for each in self._players:
                self._players[each] *= fade
            if player in self._players:
                self._players[player] += seconds
            whole = sum(self._players.values())
            for each, had in self._players.items():
                each.share = had / whole if whole else 1.0
