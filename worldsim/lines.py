"""The words for schedules: one short text becomes a `Schedule` and the name of a sampler."""

import re
from dataclasses import dataclass, replace

from worldsim.samplers import SAMPLERS
from worldsim.schedule import Schedule, equal_steps

DIAGONAL = ((1000, 933, 733, 100), (1000, 933, 100))  # Diagonal Distillation's first two blocks
DIAGONAL_REST = (1000, 100)
FEWEST = 2  # steps that are left in the end where every block has one less than the one before


@dataclass(frozen=True)
class Named:
    """What a name stands for: fields of `Schedule`, and a word for people."""

    context: str
    order: str
    says: str
    lag: int = 0


NAMES = {
    "serial": Named("clean", "serial", "step by step, then a context pass (Self-Forcing)"),
    "fused": Named("fused", "serial", "the context pass shares the next block's first forward"),
    "reuse": Named("last", "serial", "what the last step leaves behind, no context pass"),
    "diagonal": Named("last", "serial", "reuse, many steps early and few later"),
    "disa": Named("clean", "serial", "serial, every block one step less until two"),
    "tpp": Named("lag", "steps", "each step on a rank of its own, same levels (Live Avatar)"),
    "batch": Named("lag", "batch", "tpp on one device: the steps of several blocks in one batch"),
    "ring": Named("lag", "layers", "the same, layers spread over ranks (StreamDiffusionV2)"),
    "hiar": Named("output", "steps", "each step on a rank, reads the level that it leads to"),
    "rolling": Named("joint", "joint", "a window's blocks see each other (Rolling Forcing)"),
}
LAG = re.compile(r"lag(\d{1,3})")
EXAMPLE = "'tpp', 'euler', 'renoise:1000,750,500,250' or 'euler+tpp:1000,500'"


def named(name: str) -> Named:
    """What a name stands for; ``lag0``, ``lag1``, … are names too.

    Raises:
        ValueError: for one that nobody knows.
    """
    if lagging := LAG.fullmatch(name):
        return Named("lag", "batch", "step s reads what step s + k left behind", int(lagging[1]))
    if name not in NAMES:
        raise ValueError(f"schedule: unknown {name!r}: there is {', '.join(NAMES)}, lag1, lag2, …")
    return NAMES[name]


def is_name(word: str) -> bool:
    """Whether a word names a schedule."""
    return word in NAMES or LAG.fullmatch(word) is not None


def read(line: str, plain: Schedule, sampler: str, numbered: bool) -> tuple[Schedule, str]:
    """Read ``tpp``, ``euler``, ``renoise:1000,750,500,250`` or ``euler+tpp:1000,500``.

    Args:
        plain: the schedule that is there without a line; its steps stay where none are listed.
        sampler: the one that is there without a line.
        numbered: the number of steps was asked for elsewhere.

    Raises:
        ValueError: for words that nobody knows, two of a kind, or step lists that cannot be.
    """
    words, colon, listed = line.partition(":")
    samplers: list[str] = []
    names: list[str] = []
    for word in words.split("+"):
        if word not in SAMPLERS and not is_name(word):
            raise ValueError(
                f"schedule: {word!r} is none of {', '.join((*SAMPLERS, *NAMES))}, lag1, lag2, …; "
                f"write for example {EXAMPLE}"
            )
        (samplers if word in SAMPLERS else names).append(word)
    for kind in (samplers, names):
        if len(kind) > 1:
            raise ValueError(f"schedule: {' and '.join(kind)} exclude each other")
    sampler = samplers[0] if samplers else sampler
    schedule = plain
    if colon:
        if numbered:
            raise ValueError(f"schedule: {line!r} lists its steps; leave out the number of steps")
        if sampler == "unipc":
            raise ValueError("schedule: unipc makes its own step list: give the number of steps")
        steps = Schedule.listed(listed, plain.shift).steps
        schedule = replace(plain, steps=steps)
    if not names:
        _check_spread(schedule.context, "the rule of this world", sampler)
        return schedule, sampler
    return called(names[0], schedule, sampler, bool(colon) or numbered), sampler


def called(name: str, plain: Schedule, sampler: str = "renoise", counted: bool = False) -> Schedule:
    """A schedule by its name, with the steps of ``plain``.

    Args:
        counted: somebody asked for these steps.

    Raises:
        ValueError: for a name that nobody knows, or what it cannot do.
    """
    known = named(name)
    _check_spread(known.context, name, sampler)
    schedule = replace(plain, context=known.context, lag=known.lag, order=known.order)
    if name == "diagonal":
        if counted:
            raise ValueError("schedule: diagonal has step lists of its own; leave the steps out")
        return replace(schedule, steps=DIAGONAL_REST, first_steps=DIAGONAL)
    if name == "disa":
        most = len(plain.steps)
        falling = tuple(equal_steps(count) for count in range(most, min(most, FEWEST), -1))
        return replace(schedule, steps=equal_steps(min(most, FEWEST)), first_steps=falling)
    return schedule


def _check_spread(context: str, name: str, sampler: str) -> None:
    if sampler == "unipc" and context not in ("clean", "fused"):
        raise ValueError(
            f"schedule: unipc remembers the steps before, which {name} spreads; "
            "use renoise or euler"
        )
