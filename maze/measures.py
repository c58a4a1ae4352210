"""The scores of the scoreboard: each is taken of a `Subject` on one held-out walk.

A measure returns named numbers for its walk; `worldsim evaluate` averages them over walks. Every
measure compares with the truth of the same controls, and none looks at anything but pictures.
"""

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
    the last given picture, and how often the motion in the pictures is the true one."""
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
    right = np.where(clear, seen == moved, np.nan)
    out["turn seen"], out["advance seen"] = np.nanmean(right, axis=0).tolist()
    return out


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
    raise ValueError(f"only {len(rows)} of {len(truth.poses)} walks can be forked; add walks")


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
    """Leave and return: PSNR of the first view when it is seen again; the same where the given
    frames, all that is left of that place, are those of another map; and how alike the two places
    are. The walk stands still while it is given, so that any sink holds the view."""
    track = leaving(truth, row)
    stream = subject.resume(truth, row)
    absent, again = track[:-RETURN], track[-RETURN:]
    stream.walk(absent)
    other = truth.of_another_map(row)
    mistaken = subject.mistaken(stream, other, 0)
    true = truth.pictures(row, FIRST - 1, FIRST).numpy()
    out = {
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
    nothing else."""
    track = truth.track(row)
    stream = subject.dream(truth, row, truth.prompt(row))
    made = stream.walk(track[1 : 1 + 2 * SECOND])
    begun = _shown(readers.looks, made, truth, row)
    other = (row + 1) % len(truth.poses)
    stream.ask(truth.theme(other))
    made = stream.walk(track[1 + 2 * SECOND : 1 + 5 * SECOND])
    stream.close()
    switched = _shown(readers.looks, made[-2 * PICTURES :], truth, other)
    wall = int(truth.themes[row][0])
    stream = subject.dream(truth, row, WALLS[wall])
    made = stream.walk(track[1 : 1 + 2 * SECOND])
    stream.close()
    return {
        "prompt": begun.mean(),
        "change shown": float(switched.all()),
        "change": switched.mean(),
        "one word": float(readers.looks.recognise(made)[0] == wall),
    }


def _shown(looks: Looks, clip: Pictures, truth: Truth, row: int) -> NDArray[np.bool_]:
    return np.array(looks.recognise(clip)) == truth.themes[row].numpy()


def minute(subject: Subject, truth: Truth, row: int, readers: Readers) -> Scores:
    """Sixty seconds under the walk's own controls, against the truth of the same seed.

    Sharpness and motion, in the first and last ten seconds, are ratios to those of the whole true
    walk (a stretch of it may face a bare wall); colour is a distance. ``drift error`` is LV-Bench's
    VDE over ten parts of the walk; its m is the ratio of each part's sharpness to the true part's
    (or to half of the whole walk's, where that is more), so that what is to be seen counts little.
    ``late forks``: five controls, tried once in the last ten seconds and judged by the motion in
    the pictures. Some run into walls; who does not heed keys at all gets a fifth.
    """
    track = truth.track(row)[GIVEN : GIVEN + SECOND * MINUTE]
    stream = subject.resume(truth, row)
    before = SECOND * (MINUTE - LATE // 2)
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
        "theme": _shown(readers.looks, made[end], truth, row).mean(),
        "drift error": vde([sharpness(a) / max(sharpness(b), clear / 2) for a, b in parts]),
        "late forks": late,
    }


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
