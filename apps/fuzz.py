"""Throw random and mutated messages at a server of `worldsim play` while somebody plays on it.

    worldsim fuzz 100000

What must hold: no crash, no session, page or memory left behind, and who plays does not notice.
"""

import json
import random
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from worldsim.apps.play import PlayOptions, background, build, listening, opened, playable
from worldsim.apps.room import Room
from worldsim.apps.wire import HEADER
from worldsim.world import World

AT_ONCE = (1, 1, 2, 3, 10, 50)  # messages of one connection
EARLY = 0.1  # of all connections talk before they are let in
GROWTH = 32 * 2**20  # bytes: what a process may take more at the end than after its first half
PATIENCE = 30.0

Random = random.Random
KINDS: dict[str, dict[str, Any]] = {
    "control": {"id": 1, "t": 1.0, "buttons": ["KeyW", "KeyA"]},
    "prompt": {"id": 2, "t": 1.0, "text": "night"},
    "ack": {"number": 3, "received": 1.0, "due": 1.5, "painted": 2.0},
    "pause": {},
    "resume": {},
    "reset": {"seed": 5},
    "rewind": {"block": 2},
    "fork": {},
    "switch": {"branch": 1},
    "drop": {"branch": 1},
    "record": {"on": True},
}
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 1e308, -1e-308, "", "KeyW", "\0", "😀" * 40, [], [[]], {},
    {"a": {}}, ["KeyW"] * 40, "../../etc/passwd", "__class__", "x" * 3000,
)  # fmt: skip


def message(draw: Random) -> str | bytes:
    """One message: as it should be, with a field that is not, cut up, or nothing known at all."""
    kind = draw.choice(list(KINDS))
    fields = {"type": kind, **KINDS[kind]}
    how = draw.randrange(8)
    if how == 0:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    if how == 1:
        return "".join(chr(draw.randrange(1, 0xD7FF)) for _ in range(draw.randrange(200)))
    if how == 2:
        fields[draw.choice([*fields, "extra"])] = draw.choice(STRANGE)
    text = json.dumps(fields)
    if how == 3:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice('{}[]",:0e-\\n') + text[at + draw.randrange(4) :]
    return text


class Witness(threading.Thread):
    """Somebody who plays, and counts what is seen."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.pictures = 0
        self.restarts = 0
        self.longest = 0.0  # seconds without a picture
        self.last = 0.0  # when the newest picture came
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            with suppress(ConnectionClosed, TimeoutError, OSError), _opened(self._url) as socket:
                self._play(socket)
            self.restarts += not self.stop.is_set()

    def _play(self, socket: ClientConnection) -> None:
        event = 0
        while not self.stop.is_set():
            got = socket.recv(timeout=PATIENCE)
            if isinstance(got, str):
                continue
            now = time.perf_counter()
            if self.pictures:
                self.longest = max(self.longest, now - self.last)
            self.last = now
            self.pictures += 1
            number = HEADER.unpack(got[: HEADER.size])[4]
            socket.send(
                json.dumps({"type": "ack", "number": number, "received": 1, "due": 1, "painted": 2})
            )
            if self.pictures % 8 == 0:
                event += 1
                held = ["KeyW"] if event % 2 else []
                socket.send(json.dumps({"type": "control", "id": event, "t": 1, "buttons": held}))


def fuzz(world: World, options: PlayOptions, count: int, seed: int = 0) -> dict[str, Any]:
    """Send ``count`` messages; returns what came of it."""
    draw = random.Random(seed)
    sent = connections = answered = 0
    grown = before = 0
    with ExitStack() as stack:
        sock = stack.enter_context(listening("127.0.0.1", 0))
        room = stack.enter_context(opened(world, options))
        url = stack.enter_context(background(build(room, options), sock)).replace("http", "ws")
        witness = Witness(url)
        witness.start()
        while not witness.pictures:
            time.sleep(0.01)
        began = time.perf_counter()
        while sent < count:
            with suppress(ConnectionClosed, TimeoutError), _opened(url) as socket:
                early = draw.random() < EARLY
                if not early:
                    _until(socket, "hello")
                for _ in range(min(count - sent, draw.choice(AT_ONCE))):
                    sent += 1
                    socket.send(message(draw))
                if not early:
                    socket.send(json.dumps({"type": "control", "id": 9, "t": 1, "buttons": []}))
                    _until(socket, "receipt")
                answered += 1
            connections += 1
            if not before and sent > count // 2:
                before = resident()
        longest = max(witness.longest, time.perf_counter() - witness.last)
        seconds = time.perf_counter() - began
        witness.stop.set()
        witness.join(PATIENCE)
        left = _left(room)
        grown = resident() - before if before else 0
    return {
        "messages": sent, "connections": connections, "refused": connections - answered,
        "answered": answered, "pictures": witness.pictures, "restarts": witness.restarts,
        "longest_wait_s": round(longest, 3), "seconds": round(seconds, 1), "sessions_left": left[0],
        "pages_left": left[1], "grown_bytes": grown,
    }  # fmt: skip


def run(count: int, options: PlayOptions, seed: int) -> None:
    """Print what came of it; exit code 1 where anything was harmed."""
    told = fuzz(playable(options), options, count, seed)
    console = Console(stderr=True, highlight=False)
    for name, value in told.items():
        console.print(f"{name.replace('_', ' '):18} {value:,}")
    harmed = told["restarts"] or told["sessions_left"] or told["pages_left"]
    if harmed or told["grown_bytes"] > GROWTH:
        raise SystemExit("worldsim: something was harmed")


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return 0


def _opened(url: str) -> ClientConnection:
    return connect(f"{url}/worldsim/ws", open_timeout=PATIENCE, close_timeout=1)


def _until(socket: ClientConnection, kind: str) -> None:
    """Read until a message of this kind comes."""
    until = time.perf_counter() + PATIENCE
    while time.perf_counter() < until:
        got = socket.recv(timeout=PATIENCE)
        if isinstance(got, str) and json.loads(got)["type"] == kind:
            return
    raise TimeoutError(f"no {kind}")


def _left(room: Room) -> tuple[int, int]:
    """Sessions and pages that are there after all have gone."""
    until = time.perf_counter() + PATIENCE
    while len(room.turns) and time.perf_counter() < until:
        time.sleep(0.01)
    return len(room.turns), room.world.pool.used_pages
