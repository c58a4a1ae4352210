"""From a key to the picture that shows it, part by part.

Two clocks: the player's (when the key went down, when the picture was received, due and painted)
and ours (all between). Each is only ever subtracted from itself, so they need not agree:

    network = (received - key) - (sent - arrived)      both ways, and the browser's own queues
"""

import math
from collections import deque
from dataclasses import dataclass

PARTS = ("wait", "denoise", "decode", "encode", "network", "paint")
OWN = ("encode", "network", "paint")  # what is neither the model's work nor the wait for a block
KEPT = 256


@dataclass(frozen=True)
class Trip:
    """One control's way, in seconds; `PARTS` sum to ``total``.

    Attributes:
        event: the control.
        block: that was the first to heed it.
        wait: until that block began, and from its being ready, here and there, until it was due.
        denoise, decode, encode: the block's work that was waited for.
        network: there and back.
        paint: from the picture's being received and due to its being painted.
    """

    event: int
    block: int
    wait: float
    denoise: float
    decode: float
    encode: float
    network: float
    paint: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def own(self) -> float:
        return sum(getattr(self, part) for part in OWN)


def trip(
    event: int,
    block: int,
    work: dict[str, float],
    arrived: float,
    sent: float,
    key: float,
    received: float,
    due: float,
    painted: float,
) -> Trip:
    """Put together what the two sides measured.

    Args:
        work: seconds of denoise, decode and encode.
        arrived, sent: our clock: the control came in, the block's first picture went out.
        key, received, due, painted: the player's clock, in seconds.
    """
    inside = sent - arrived
    there = max(0.0, painted - received)
    early = min(there, max(0.0, due - received))
    done = {part: work.get(part, 0.0) for part in ("denoise", "decode", "encode")}
    return Trip(
        event,
        block,
        wait=max(0.0, inside - sum(done.values())) + early,
        network=max(0.0, received - key - inside),
        paint=there - early,
        **done,
    )


def quantile(values: "deque[float] | list[float]", share: float) -> float:
    """The smallest value that ``share`` of all do not exceed; 0 without any."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Latency:
    """The newest trips, and their quantiles."""

    def __init__(self) -> None:
        self.trips: deque[Trip] = deque(maxlen=KEPT)

    def add(self, trip: Trip) -> None:
        self.trips.append(trip)

    def figures(self) -> dict[str, tuple[float, float]]:
        """p50 and p95 of each part, of ``own`` and of ``total``, in milliseconds."""
        trips = list(self.trips)
        return {
            name: (
                1e3 * quantile(values := [getattr(trip, name) for trip in trips], 0.5),
                1e3 * quantile(values, 0.95),
            )
            for name in (*PARTS, "own", "total")
        }
