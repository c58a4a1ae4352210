"""What goes over the WebSocket: JSON in, JSON and pictures out. docs/play.md has it as a table.

Nothing that comes in is trusted: every field of every message has its type and its bounds, and what
has others is refused as a whole.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from worldsim.controls import FARTHEST

VERSION = 2
MESSAGE_BYTES = 4096  # of a message that comes in
PROMPT_LETTERS = 500
BUTTONS = 16  # held at a time
NAME_LETTERS = 24
NUMBER = 2**53  # up to there a browser counts

# version, kind of picture, bit field, run, number, block, event, pose (x, y, heading), ms when the
# picture is to be seen, ms when it was sent, both by the server's clock
HEADER = struct.Struct("<BBHIIII3fdd")
FIRST = 1  # in the bit field: this picture is its block's first
NO_POSE = (math.nan, math.nan, math.nan)


class Malformed(ValueError):
    """A message that no page of ours sends: why, in one line."""


Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda x: type(x) is int and low <= x <= high


def _number(x: Any, most: float = NUMBER) -> bool:
    return type(x) in (int, float) and abs(x) <= most  # so neither NaN nor infinite


def _amount(x: Any) -> bool:
    return _number(x, FARTHEST)


def _amounts(count: int) -> Check:
    return lambda x: isinstance(x, list) and len(x) == count and all(map(_amount, x))


def _names(x: Any) -> bool:
    return (
        isinstance(x, list)
        and len(x) <= BUTTONS
        and all(isinstance(name, str) and 0 < len(name) <= NAME_LETTERS for name in x)
    )


def _words(x: Any) -> bool:
    return isinstance(x, str) and len(x.strip()) > 0 and len(x) <= PROMPT_LETTERS


_COUNT = _whole(0, 2**32 - 1)
# Of each kind of message: its fields and what they must be; those in OPTIONAL may be missing.
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "control": {
        "id": _COUNT,
        "t": _number,
        "buttons": _names,
        "look": _amounts(2),
        "move": _amounts(3),
        "scroll": _amount,
    },
    "prompt": {"id": _COUNT, "t": _number, "text": _words},
    "ack": {"number": _COUNT, "received": _number, "due": _number, "painted": _number},
    "pause": {},
    "resume": {},
    "reset": {"seed": _whole(0, NUMBER)},
    "rewind": {"block": _COUNT},
    "fork": {},
    "switch": {"branch": _COUNT},
    "drop": {"branch": _COUNT},
    "record": {"on": lambda x: isinstance(x, bool)},
}
OPTIONAL = ("look", "move", "scroll")


def read(text: str | bytes) -> dict[str, Any]:
    """One message, with its ``type``.

    Raises:
        Malformed: for anything but what `FIELDS` describes.
    """
    if not isinstance(text, str):
        raise Malformed("messages are JSON text, this one is binary")
    if len(text.encode("utf-8", "replace")) > MESSAGE_BYTES:
        raise Malformed(f"a message is at most {MESSAGE_BYTES} bytes long")
    try:
        message = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Malformed("a message must be JSON") from None
    if not isinstance(message, dict):
        raise Malformed("a message must be a JSON object")
    kind = message.get("type")
    fields = FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise Malformed(f"a message's type is one of {', '.join(FIELDS)}")
    if unknown := sorted(set(message) - set(fields) - {"type"}):
        raise Malformed(f"{kind}: unknown field {unknown[0][:NAME_LETTERS]!r}")
    for name, right in fields.items():
        if name not in message:
            if name not in OPTIONAL:
                raise Malformed(f"{kind}: {name} is missing")
        elif not right(message[name]):
            raise Malformed(f"{kind}: {name} cannot be that")
    return message


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def picture(
    kind: int,
    run: int,
    number: int,
    block: int,
    event: int,
    pose: tuple[float, float, float] | None,
    due: float,
    sent: float,
    data: bytes,
    first: bool,
) -> bytes:
    """One picture with its header; the times in seconds."""
    return (
        HEADER.pack(
            VERSION, kind, FIRST * first, run, number, block, event, *(pose or NO_POSE),
            1e3 * due, 1e3 * sent,
        )
        + data
    )  # fmt: skip


class Rate:
    """So many messages a second, and so many at once."""

    def __init__(self, per_second: float, at_once: int, now: float) -> None:
        self._per_second, self._at_once = per_second, at_once
        self._left, self._then = float(at_once), now

    def allows(self, now: float) -> bool:
        """Whether one more may come now."""
        self._left = min(self._at_once, self._left + (now - self._then) * self._per_second)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
