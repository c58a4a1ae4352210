"""The scores of the scoreboard: each is taken of a `Subject` on one held-out walk.

A measure returns named numbers for its walk; `worldsim evaluate` averages them over walks. Every
measure compares with the truth of the same controls, and none looks at anything but pictures.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from worldsim.controls import IDLE, Keys
from worldsim.maze.inverse import Inverse, labels
from worldsim.maze.looks import Looks
from worldsim.maze.simulator import PICTURES_PER_LATENT
from worldsim.maze.streams import Pictures, Stream, Subject
from worldsim.maze.themes import WALLS
from worldsim.maze.truth import FIRST, FORKS, GIVEN, SECOND, Truth
from worldsim.maze.walks import HALF_TURN
from worldsim.metrics import colour_distance, motion, psnr, sharpness, vde

PICTURES = SECOND * PICTURES_PER_LATENT  # of a second
ROLLOUT, MINUTE = 4, 60  # seconds
LATE = 10  # seconds at the end of a minute
PARTS = 10  # of a minute, for the drift error
MOST_ALIKE = 25.0  # dB: forks count where every two truths differ by more than coding loses
AWAY = 6  # latent frames walked away from a place that is left, and back
RETURN = 5  # latent frames: the last quarter of the turn back, when the place is seen again
LEFT, RIGHT = frozenset({"KeyJ"}), frozenset({"KeyL"})

Scores = dict[str, float]


@dataclass(frozen=True)
class Readers:
    """What reads pictures: the theme that they show, and how they moved."""

    looks: Looks
    inverse: Inverse


Measure = Callable[[Subject, Truth, int, Readers], Scores]


def rollout(subject: Subject, truth: Truth, row: int, readers: Readers) -> Scores:
    """Four seconds under the walk's own controls: PSNR of the 1st, 2nd and 4th, that of freezing
    the last given picture, and how often the motion in the pictures is the true one (and how often
    that is none: what a still picture gets)."""
    track = truth.track(row)[GIVEN : GIVEN + SECOND * ROLLOUT]
    stream = subject.resume(truth, row)
    made = stream.walk(track)
    stream.close()
    true = truth.pictures(row, FIRST - 1, FIRST + len(made)).numpy()
    still = true[:1].repeat(len(made), axis=0)
    out = {}
    for second in (1, 2, 4):
        part = slice(PICTURES * (second - 1), PICTURES * second)
        out[f"second {second}"] = psnr(made[part], true[1:][part])
        out[f"frozen {second}"] = psnr(still[part], true[1:][part])
    moved, clear = labels(truth.poses[row, FIRST - 1 : FIRST + len(made)])
    seen = readers.inverse.recover(np.concatenate([true[:1], made]))
    for axis, name in enumerate(("turn", "advance")):
        counted = clear[:, axis]
        out[f"{name} seen"] = share((seen == moved)[:, axis], counted)
        out[f"{name} none"] = share(moved[:, axis] == 0, counted)
    return out


def share(right: NDArray[np.bool_], counted: NDArray[np.bool_]) -> float:
    """Share of those that count which are right; NaN, which no mean counts, where none does."""
    return float(right[counted].mean()) if counted.any() else math.nan


def forks(subject: Subject, truth: Truth, row: int, _: Readers) -> Scores:
    """The fork test: one second under five controls, from one state with the same noise; the share
    of clips whose nearest simulator truth (by PSNR) is that of their own control."""
    futures = true_forks(truth, row)
    stream = subject.resume(truth, row)
    right = 0
    for own, keys in enumerate(FORKS.values()):
        twin = stream.fork()
        made = twin.walk([keys] * SECOND)
        twin.close()
        right += int(np.argmax([psnr(made, future) for future in futures]) == own)
    stream.close()
    return {"forks": right / len(FORKS)}


def true_forks(truth: Truth, row: int) -> list[torch.Tensor]:
    return [truth.continued(row, FIRST - 1, keys, SECOND) for keys in FORKS.values()]


def forkable(truth: Truth, wanted: int) -> list[int]:
    """The first ``wanted`` walks whose five futures can be told apart; the simulator alone decides.

    Raises:
        ValueError: if there are not so many.
    """
    rows: list[int] = []
    for row in range(len(truth.poses)):
        pairs = combinations(true_forks(truth, row), 2)
        if all(psnr(a, b) <= MOST_ALIKE for a, b in pairs):
            rows.append(row)
        if len(rows) == wanted:
            return rows
    raise ValueError(
        f"only {len(rows)} of {len(truth.poses)} held-out walks can be forked, not {wanted}"
    )


def leaving(truth: Truth, row: int) -> list[Keys]:
    """Turn round, walk on as far as one can come back from exactly, come back, and turn to the
    first view again (the other way round on every other walk), then stand still for one latent
    frame. As long as it takes at most `AWAY` steps each way; what is not walked is waited."""
    tracks = [_away_and_back(steps, round_trip=bool(row % 2)) for steps in range(AWAY, -1, -1)]
    # The last one turns on the spot: it always comes back.
    return next(track for track in tracks if truth.comes_back(row, FIRST - 1, track))


def _away_and_back(steps: int, round_trip: bool) -> list[Keys]:
    middle = [frozenset({"KeyW"})] * steps + [frozenset({"KeyS"})] * steps
    idle = [IDLE] * (2 * (AWAY - steps))
    back = LEFT if round_trip else RIGHT
    return [LEFT] * HALF_TURN + middle + idle + [back] * HALF_TURN + [IDLE]


def returning(subject: Subject, truth: Truth, row: int, _: Readers) -> Scores:
    """Leave and return: PSNR of the first view when it is seen again; that of what is seen with the
    back turned to it, which who never left scores as high; that of the return where the given
    frames, all that is left of that place, are those of another map; and how alike the two places
    are. The walk stands still while it is given, so that any sink holds the view."""
    track = leaving(truth, row)
    stream = subject.resume(truth, row)
    turned, absent, again = track[:HALF_TURN], track[HALF_TURN:-RETURN], track[-RETURN:]
    true = truth.pictures(row, FIRST - 1, FIRST).numpy()
    away = _view(stream.walk(turned), true)
    stream.walk(absent)
    other = truth.of_another_map(row)
    mistaken = subject.mistaken(stream, other, 0)
    out = {
        "return, away": away,
        "return": _view(stream.walk(again), true),
        "return, swapped": _view(mistaken.walk(again), true),
        "return, other map": _view(other.pictures(0, FIRST - 1, FIRST).numpy(), true),
    }
    stream.close()
    mistaken.close()
    return out


def _view(made: Pictures, true: Pictures) -> float:
    last = made[-PICTURES_PER_LATENT:]
    return psnr(last, true.repeat(len(last), axis=0))


def prompts(subject: Subject, truth: Truth, row: int, readers: Readers) -> Scores:
    """What the pictures show of what was asked: the share of a prompt's attributes in the first
    two seconds; whether all four are those of another prompt from the second to the end of the
    third second after a change, and their share; whether the wall is right when the prompt names
    nothing else. Only attributes that can be read off the true pictures of the same walk count."""
    track = truth.track(row)
    first = slice(1, 1 + 2 * PICTURES)
    stream = subject.dream(truth, row, truth.prompt(row))
    begun = stream.walk(track[1 : 1 + 2 * SECOND])
    other = truth.in_theme((row + 1) % len(truth.poses))
    stream.ask(other.theme(row))
    last = slice(-2 * PICTURES, None)
    changed = stream.walk(track[1 + 2 * SECOND : 1 + 5 * SECOND])[last]
    stream.close()
    wall = int(truth.themes[row][0])
    stream = subject.dream(truth, row, WALLS[wall])
    made = stream.walk(track[1 : 1 + 2 * SECOND])
    stream.close()
    right, counted = _shown(readers.looks, changed, other, row, last)
    return {
        "prompt": share(*_shown(readers.looks, begun, truth, row, first)),
        "change shown": float(right.all()) if counted.all() else math.nan,
        "change": share(right, counted),
        "one word": float(readers.looks.recognise(made)[0] == wall),
    }


def _shown(
    looks: Looks, made: Pictures, truth: Truth, row: int, part: slice
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of a theme's attributes are read right off what was made, and which of them off that
    part of the true walk: before a bare wall nobody can tell them all."""
    asked = truth.themes[row].numpy()
    true = truth.pictures(row, part.start, part.stop)
    return np.array(looks.recognise(made)) == asked, np.array(looks.recognise(true)) == asked


def minute(subject: Subject, truth: Truth, row: int, readers: Readers) -> Scores:
    """Sixty seconds under the walk's own controls, against the truth of the same seed.

    Sharpness and motion, in the first and last ten seconds, are ratios to those of the whole true
    walk (a stretch of it may face a bare wall); colour is a distance. ``drift error`` is LV-Bench's
    VDE over ten parts of the walk; its m is the ratio of each part's sharpness to the true part's
    (or to half of the whole walk's, where that is more), so that what is to be seen counts little.
    ``late forks``: five controls, tried once in the last ten seconds, where the true walk has most
    room, and judged by the motion in the pictures; who does not heed keys at all gets a fifth.
    """
    track = truth.track(row)[GIVEN : GIVEN + SECOND * MINUTE]
    stream = subject.resume(truth, row)
    before = roomiest(truth, row)
    made = stream.walk(track[:before])
    late = _late_forks(stream, made[-1:], readers.inverse)
    made = np.concatenate([made, stream.walk(track[before:])])
    stream.close()
    true = truth.pictures(row, FIRST, FIRST + len(made)).numpy()
    early, end = slice(0, PICTURES * LATE), slice(-PICTURES * LATE, None)
    clear, moving = sharpness(true), motion(true)
    parts = list(zip(np.split(made, PARTS), np.split(true, PARTS), strict=True))
    return {
        "sharpness, first": sharpness(made[early]) / clear,
        "sharpness": sharpness(made[end]) / clear,
        "motion, first": motion(made[early]) / moving,
        "motion": motion(made[end]) / moving,
        "colour, first": colour_distance(made[early], true[early]),
        "colour": colour_distance(made[end], true[end]),
        "theme": share(*_shown(readers.looks, made[end], truth, row, end)),
        "drift error": vde([sharpness(a) / max(sharpness(b), clear / 2) for a, b in parts]),
        "late forks": late,
    }


def roomiest(truth: Truth, row: int) -> int:
    """The latent frame after the given ones, in the last ten seconds of a minute, from which the
    true walk could go furthest for a second, forward or back, whichever is less."""
    moments = range(SECOND * (MINUTE - LATE), SECOND * (MINUTE - 1))
    pictures = [FIRST - 1 + PICTURES_PER_LATENT * moment for moment in moments]
    free = truth.room(row, pictures, (FORKS["forward"], FORKS["back"]), SECOND)
    return moments[int(free.argmax())]


def _late_forks(stream: Stream, last: Pictures, inverse: Inverse) -> float:
    """Share of five forks of one second whose turn and advance, summed over their latent frames,
    have the sign of the control."""
    right = 0
    for keys in FORKS.values():
        twin = stream.fork()
        made = np.concatenate([last, twin.walk([keys] * SECOND)])
        twin.close()
        seen = np.sign(inverse.recover(made).sum(0))
        turn = int("KeyL" in keys) - int("KeyJ" in keys)
        advance = int("KeyW" in keys) - int("KeyS" in keys)
        right += int(seen[0] == turn and seen[1] == advance)
    return right / len(FORKS)


MEASURES: Mapping[str, Measure] = {
    "rollout": rollout,
    "forks": forks,
    "returning": returning,
    "prompts": prompts,
    "minute": minute,
}
