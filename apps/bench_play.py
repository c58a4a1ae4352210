"""`worldsim bench --play`: from a key to the picture that shows it, in a real browser.

Keys are pressed at random moments in headless Chromium on this machine. Which picture is the first
to show a key is not believed of the server: afterwards the whole run is made once more, and at
every press it is forked and goes on without that key. The first picture that was painted, and whose
pixels differ from the twin's, counts; its time is the browser's own.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldsim.apps.browser import chromium
from worldsim.apps.play import PlayOptions, background, build, listening, opened, playable
from worldsim.apps.report import machine, print_table, write_json
from worldsim.controls import ControlState
from worldsim.state import Played
from worldsim.streaming.latency import PARTS, Trip, quantile
from worldsim.streaming.pictures import WEBP
from worldsim.streaming.player import Player
from worldsim.streaming.sinks import check_writable
from worldsim.world import World

WARM = 2.5  # seconds before the first press
PRESS = (0.30, 0.65)  # seconds that a key is held, and that none is
LOOK_AHEAD = 3  # blocks in which a key must show
SEED = 3

Shown = dict[str, Any]  # what page.js notes of a painted picture


@dataclass(frozen=True)
class BenchPlayOptions:
    """What the command line was given."""

    play: PlayOptions
    presses: int
    json: Path | None


@dataclass(frozen=True)
class Run:
    """What one visit was like; times in milliseconds.

    Attributes:
        delays: from a key to the first painted picture that differs from the twin's.
        unseen: keys that made no difference, or whose pictures were not painted.
        trips: the same as the server counts it, by part.
        intervals: between painted pictures.
        pictures, late, dropped: how many were due, came late, were not shown.
        redone: blocks made anew, or given up half-made.
        period: of the world.
        exact: painted pixels were compared, not only numbers.
    """

    delays: list[float]
    unseen: int
    trips: list[Trip]
    intervals: list[float]
    pictures: int
    late: int
    dropped: int
    redone: int
    period: float
    exact: bool

    def figures(self) -> dict[str, Any]:
        parts = {
            part: [
                1e3 * quantile([getattr(trip, part) for trip in self.trips], share)
                for share in (0.5, 0.95)
            ]
            for part in (*PARTS, "own")
        }
        return {
            "keys": len(self.delays),
            "keys that made no difference": self.unseen,
            "key to picture": [quantile(self.delays, 0.5), quantile(self.delays, 0.95)],
            **parts,
            "interval p99, periods": quantile(self.intervals, 0.99) / self.period,
            "late or dropped, %": 100 * (self.late + self.dropped) / max(1, self.pictures),
            "blocks made anew": self.redone,
            "pixels compared": self.exact,
        }


def run(options: BenchPlayOptions) -> None:
    """Measure with and without late latching, and print.

    Raises:
        ValueError, OSError: without a browser, or for options that cannot be.
    """
    if options.json is not None:
        check_writable(options.json)
    world = playable(options.play)
    told = {}
    with chromium() as browser:
        for name, late_latching in (("late latching", True), ("without", False)):
            play = replace(options.play, late_latching=late_latching)
            told[name] = visit(browser, world, play, options.presses).figures()
    one, other = told.values()
    ratio = one["key to picture"][1] / max(1e-9, other["key to picture"][1])
    rows = [[name, *(_shown(figures[name]) for figures in told.values())] for name in one]
    title = (
        f"{world.config.name} at {world.config.fps:g} fps in headless Chromium: ms, p50 / p95; "
        f"p95 with late latching is {ratio:.2f} of that without"
    )
    print_table(title, ("", *told), rows)
    write_json(options.json, {"machine": machine(), "ratio": ratio, **told})


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(f"{x:.1f}" for x in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def visit(browser: Any, world: World, options: PlayOptions, presses: int) -> Run:
    """Play for a while in a browser."""
    with ExitStack() as stack:
        sock = stack.enter_context(listening("127.0.0.1", 0))
        room = stack.enter_context(opened(world, options))
        url = stack.enter_context(background(build(room, options), sock))
        page = browser.new_page()
        stack.callback(page.close)
        page.goto(url)
        page.wait_for_selector('.badge[data-state="live"]')
        page.wait_for_timeout(1e3 * WARM)
        page.evaluate("worldsim.log = []; worldsim.keys = []; worldsim.dropped = 0")
        (player,) = room.players.values()
        pictures, late, dropped = (
            getattr(player.pacer, n) for n in ("pictures", "late", "dropped")
        )
        player.latency.trips.clear()
        _press(
            page, [key[3:].lower() for key in world.actions.keys if key.startswith("Key")], presses
        )
        log, keys, lost = page.evaluate("[worldsim.log, worldsim.keys, worldsim.dropped]")
        player.ask("pause")
        page.wait_for_selector('.badge[data-state="paused"]')
        past = player.course.session.now.past
        shown = {entry["number"]: entry for entry in log}
        exact = player.kind == WEBP
        delays = showing(world, options, past, keys, shown, exact)
        painted = sorted(entry["painted"] for entry in log)
        return Run(
            [delay for delay in delays if delay is not None],
            sum(delay is None for delay in delays),
            list(player.latency.trips),
            np.diff(painted).tolist(),
            player.pacer.pictures - pictures,
            player.pacer.late - late,
            player.pacer.dropped - dropped + lost,
            _redone(player),
            1e3 * player.pacer.period,
            exact,
        )


def _redone(player: Player) -> int:
    return player.counts.redone + player.counts.aborted


def _press(page: Any, letters: list[str], presses: int) -> None:
    """One key at a time, at moments that have nothing to do with the world's blocks."""
    draw = random.Random(SEED)
    for _ in range(presses):
        letter = draw.choice(letters)
        page.keyboard.down(letter)
        page.wait_for_timeout(1e3 * draw.uniform(*PRESS))
        page.keyboard.up(letter)
        page.wait_for_timeout(1e3 * draw.uniform(*PRESS))


def showing(
    world: World,
    options: PlayOptions,
    past: tuple[Played, ...],
    keys: list[dict[str, Any]],
    shown: dict[int, Shown],
    exact: bool,
) -> list[float | None]:
    """Of each key that went down: ms until a picture was painted that is another without it.

    Args:
        past: how each block of the run, from the first on, came to be.
        keys: what the page noted of each key.
        shown: what it noted of each painted picture, by its number.
        exact: the painted pixels must be those of the run, and not of the twin.
    """
    down = [key for key in keys if key["down"]]
    delays: list[float | None] = []
    with options.setting.session(world, seed=options.seed) as session:
        number = 0
        for index, played in enumerate(past):
            before = 0 if not index else past[index - 1].applied.event
            heeded = [key for key in down if before < key["event"] <= played.applied.event]
            for key in heeded:
                differs = _first_difference(
                    session, past[index : index + LOOK_AHEAD], number, key, shown, exact
                )
                delays.append(None if differs is None else differs - key["t"])
            number += len(session.decode(session.play(played)).frames)
    return delays


def _first_difference(
    session: Any,
    track: tuple[Played, ...],
    number: int,
    key: dict[str, Any],
    shown: dict[int, Shown],
    exact: bool,
) -> float | None:
    """When the first picture was painted that is another without that key."""
    with session.fork() as real, session.fork() as twin:
        for played in track:
            frames = real.decode(real.play(played)).frames
            without = [_without(state, key["name"]) for state in played.applied.controls]
            others = twin.step(without).frames
            for picture, other in zip(frames, others, strict=True):
                entry = shown.get(number)
                number += 1
                if entry is None or np.array_equal(picture, other):
                    continue
                if exact and entry["pixels"] != fnv(picture):
                    raise ValueError(
                        f"picture {number - 1} was painted with other pixels than made"
                    )
                return float(entry["painted"])
    return None


def _without(state: ControlState, name: str) -> ControlState:
    return replace(state, buttons=state.buttons - {name})


def fnv(picture: NDArray[np.uint8]) -> int:
    """FNV-1a of a picture's bytes, as page.js takes it."""
    value = 0x811C9DC5
    for byte in picture.tobytes():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value
