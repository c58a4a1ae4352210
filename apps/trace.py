"""What a Chrome trace says about where the time went.

Events are those of the format's ``traceEvents``: each has a thread ``tid``, a category ``cat``, and
a beginning and a length in microseconds, ``ts`` and ``dur``. On one thread events lie inside each
other or apart.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
REGION, OPERATOR, KERNEL = "user_annotation", "cpu_op", "kernel"
WORK = (OPERATOR, KERNEL)


@dataclass
class Total:
    """Seconds and calls of everything under one name."""

    seconds: float = 0.0
    calls: int = 0

    def add(self, microseconds: float) -> None:
        self.seconds += 1e-6 * microseconds
        self.calls += 1


def by_part(events: Iterable[Event]) -> dict[str, Total]:
    """The regions ``denoise block 12`` by their first word, as far as they are whole."""
    totals: dict[str, Total] = defaultdict(Total)
    for event in _whole(events):
        if event["cat"] == REGION:
            totals[event["name"].split(" block ")[0]].add(event["dur"])
    return dict(totals)


def by_operator(events: Iterable[Event]) -> dict[str, Total]:
    """Operators by the time in them and in no operator that they call; the kernels of a device,
    where there are any. What a region spends outside operators is ``denoise, no operator``.
    """
    whole = list(_whole(events))
    kernels = [event for event in whole if event["cat"] == KERNEL]
    totals: dict[str, Total] = defaultdict(Total)
    for event, own in _own_times(kernels or whole):
        name = event["name"]
        if event["cat"] == REGION:
            name = f"{name.split(' block ')[0]}, no operator"
        totals[name].add(own)
    return dict(totals)


def _whole(events: Iterable[Event]) -> Iterable[Event]:
    """Operators, kernels and the regions of blocks, without those that the trace's end cuts."""
    for event in events:
        category = event.get("cat")
        wanted = " block " in event["name"] if category == REGION else category in WORK
        if wanted and event["ph"] == "X" and event.get("args", {}).get("finished", True):
            yield event


def _own_times(events: list[Event]) -> list[tuple[Event, float]]:
    """Each event with its microseconds outside the events that lie in it."""
    own = {id(event): float(event["dur"]) for event in events}
    inside: dict[Any, list[Event]] = defaultdict(list)  # by thread, the outermost first
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        around = inside[event["tid"]]
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        if around:
            own[id(around[-1])] -= event["dur"]
        around.append(event)
    return [(event, own[id(event)]) for event in events]
