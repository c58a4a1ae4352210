"""The players of one server: who plays, who waits, and how many there is room for."""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldsim.apps.opening import shown_scale
from worldsim.apps.setting import Setting
from worldsim.config import Settings
from worldsim.memory import MemoryReport
from worldsim.models.autoencoder import Autoencoder
from worldsim.session import Session
from worldsim.streaming.course import Course
from worldsim.streaming.pictures import encoder
from worldsim.streaming.player import Player
from worldsim.streaming.recording import Recording
from worldsim.streaming.turns import Turns
from worldsim.world import World

HISTORY_BYTES = 16 * 2**20  # of the snapshots that a player may rewind to
BRANCHES = (2, 8)  # that a player may keep: at least, and at most where they are small
BRANCH_BYTES = 96 * 2**20  # that they may take in all, but for the least
BESIDE_BYTES = 32 * 2**20  # of a player beside all that: pictures, the film's encoder, the socket
WAITING = 64  # at most
KEEP_FREE = 0.1  # of what there is


class Full(ValueError):
    """Even the queue is full."""


@dataclass(frozen=True)
class Room:
    """See the module docstring; used on the server's event loop.

    Attributes:
        capacity: players at a time.
        folder: where films are written.
    """

    world: World
    setting: Setting
    turns: Turns
    capacity: int
    folder: Path
    seed: int = 0
    late_latching: bool = True
    players: dict[str, Player] = field(default_factory=dict)  # by their key, which only they know
    queue: deque[asyncio.Event] = field(default_factory=deque)

    def open(self, seed: int, picture: NDArray[np.uint8] | None = None) -> Session:
        """A player's session."""
        more: dict[str, Any] = {} if picture is None else {"pictures": picture[None]}
        return self.setting.session(self.world, seed=seed, history=HISTORY_BYTES, **more)

    def wanted(self) -> Settings:
        """What all players' sessions are opened with, but for the seed."""
        own = self.setting
        return self.world.settings(0, own.steps, own.cache, own.schedule)

    @property
    def takes_pictures(self) -> bool:
        """Whether a session may begin with a picture."""
        return isinstance(self.world.autoencoder, Autoencoder)

    def free(self) -> bool:
        return len(self.turns) < self.capacity

    def enter(
        self, changed: Callable[[], None], late_latching: bool | None = None
    ) -> tuple[str, Player]:
        """A new player and its key.

        Raises:
            Full: if there is no room.
        """
        if not self.free():
            raise Full(f"all {self.capacity} places are taken")
        key = secrets.token_urlsafe(16)
        config = self.world.config
        course = Course(
            self.open, branches(self.world, self.setting), self.folder / f"{key}.wsrun",
            HISTORY_BYTES,
        )  # fmt: skip
        player = Player(
            course,
            encoder(config.height, config.width),
            config.fps,
            seed=self.seed,
            late_latching=self.late_latching if late_latching is None else late_latching,
            recording=Recording(self.folder / f"{key}.mp4", config.fps, shown_scale(self.world)),
            changed=changed,
        )
        self.turns.add(player)
        self.players[key] = player
        return key, player

    def leave(self, key: str, why: str) -> None:
        """A player goes; its place is free once its session is closed."""
        if (player := self.players.pop(key, None)) is not None:
            player.leave(why)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)


def capacity(world: World, setting: Setting, most: int, free: int) -> int:
    """Players that ``free`` bytes have room for, at most ``most``.

    Raises:
        ValueError: if there is no room for one.
    """
    report = world.memory_report(setting.cache, HISTORY_BYTES)
    kept = branches(world, setting) * _branch(report)
    each = report.session + kept + BESIDE_BYTES
    fit = int((1 - KEEP_FREE) * free) // each
    if fit < 1:
        raise ValueError(
            f"a player takes {each / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free: "
            "give a smaller --cache"
        )
    return min(most, fit)


def branches(world: World, setting: Setting) -> int:
    """How many moments a player may keep to come back to."""
    least, most = BRANCHES
    each = _branch(world.memory_report(setting.cache, HISTORY_BYTES))
    return max(least, min(most, BRANCH_BYTES // each if each else most))


def _branch(report: MemoryReport) -> int:
    """Bytes of pages that a fork may keep from being used again."""
    return report.sink + report.mid + report.recent + report.history
