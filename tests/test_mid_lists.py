"""Random lives of a context, against plain lists of frame numbers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from test_mid import context_of, pose_of, put

from worldsim.cache.context import FLUSH_KEEPS, Event
from worldsim.cache.policy import CUT


@dataclass
class Lists:
    """What a context keeps, as lists of frame numbers; nothing is shared with the real thing."""

    sink: int
    mid: int
    form: str
    recent: int
    packed: bool
    kept: dict[str, list[int]] = field(
        default_factory=lambda: {"sink": [], "mid": [], "waiting": [], "recent": []}
    )
    cut: bool = False

    def append(self, frames: Sequence[int]) -> None:
        kept = self.kept
        for frame in frames:
            kept["sink" if len(kept["sink"]) < self.sink else "recent"].append(frame)
            while len(kept["recent"]) > self.recent:
                kept["waiting"].append(kept["recent"].pop(0))
            step = 2 if self.form == "pool" else 1
            while len(kept["waiting"]) >= step:
                kept["mid"] += kept["waiting"][:step]
                del kept["waiting"][:step]
        kept["mid"] = kept["mid"][max(0, len(kept["mid"]) - self.mid) :]
        self.cut = False

    def event(self, event: Event) -> None:
        kept = self.kept
        if event is Event.CUT:
            self.cut = True
            return
        if event is Event.FLUSH:
            kept["recent"] = kept["recent"][-FLUSH_KEEPS:]
            kept["mid"], kept["waiting"] = [], []
        elif event is Event.REOPEN:
            kept["recent"] = []
            self.cut = False
        else:
            self.kept = {name: [] for name in kept}
            self.cut = False

    def positions(self, start: int, read: list[int]) -> dict[int, float]:
        """Where each frame is read, of a bank the ones that are ``read``: of two that were pooled,
        the middle of both."""
        mid = self.kept["mid"] if self.form == "pool" else read
        order = self.kept["sink"] + mid + self.kept["recent"]
        gap = CUT if self.cut else 0
        at = {
            frame: (start - len(order) + i if self.packed else frame) - gap
            for i, frame in enumerate(order)
        }
        pairs = list(zip(mid[::2], mid[1::2], strict=True)) if self.form == "pool" else []
        for first, second in pairs:
            middle = (at[first] + at.pop(second)) / 2
            at[first] = middle
        return at


def test_five_hundred_random_lives_against_plain_lists() -> None:
    draw = random.Random(0)
    seen: set[str] = set()
    for _ in range(500):
        n = draw.choice([1, 2, 3])
        form = draw.choice(["", "", "pool", "topk", "pose"])
        read_of_mid = draw.choice([2, 4]) if form else 0
        bank = read_of_mid + (0 if form in ("", "pool") else draw.choice([0, 1, 3]))
        lists = Lists(
            draw.choice([0, 1, 3]), bank, form, draw.choice([1, 2, 4, 5]), draw.random() < 0.5
        )
        line = f"sink={lists.sink},recent={lists.recent}{draw.choice(['', ':int8'])}"
        line += f",mid={read_of_mid}:{form}" if form else ""
        line += ":int8" if form and "int8" in line else ""
        line += f",bank={bank}" if form in ("topk", "pose") else ""
        line += ",positions=packed" if lists.packed else ""
        context = context_of(line, n)
        block = 0
        for _ in range(draw.randint(3, 14)):
            act = draw.choice(["append"] * 5 + ["retry", "flush", "cut", "reset", "recache"])
            seen.add(act)
            frames = range(block * n, block * n + n)
            if act in ("append", "retry"):
                before = context.table
                put(context, block, n)
                if act == "retry":
                    context.abort(block)
                    assert context.table == before
                    put(context, block, n)
                lists.append(frames)
                block += 1
            elif act == "recache":
                frames_held = sorted(lists.kept["recent"])
                context.on_event(Event.REOPEN)
                lists.event(Event.REOPEN)
                for old in sorted({frame // n for frame in frames_held}):
                    put(context, old, n, set(frames_held))
                lists.kept["recent"] = frames_held
            else:
                event = Event(act)
                context.on_event(event)
                lists.event(event)
            plan = context.plan(block * n, n, pose_of(block * n))
            got = {
                read.entry.frame: read.position + (read.entry.span - 1) / 2 for read in plan.reads
            }
            outside = {*lists.kept["sink"], *lists.kept["recent"]}
            chosen = sorted(frame for frame in got if frame not in outside)
            assert got == lists.positions(block * n, chosen), (line, act)
            if form in ("topk", "pose"):
                assert [entry.frame for entry in context.table.mid.bank] == lists.kept["mid"]
                assert len(chosen) == min(read_of_mid, len(lists.kept["mid"]))
                assert set(chosen) <= set(lists.kept["mid"])
            assert plan.query_positions == tuple(range(block * n, block * n + n))
        context.close()
        assert context.pool.used_pages == 0
    assert len(seen) == 6
