"""What the player does, in the words of no world: held keys, mouse, stick, prompt.

A `ControlState` is a snapshot; `Held` is what has been heard since the last block. Which keys a
world understands and what becomes of them is data: `worldsim.actions.ActionSpec`.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Keys = frozenset[str]
IDLE: Keys = frozenset()

# Look and scroll are summed over the time that a state stands for, and shared out evenly where that
# time is cut up. Move is a stick's deflection: like a button it is held until told otherwise.
AXES = ("look.x", "look.y", "scroll", "move.x", "move.y", "move.z")
SUMMED = 3  # of them, the first ones
FARTHEST = 1e6  # of any axis, either way: what is told to a model stays finite


@dataclass(frozen=True)
class ControlState:
    """A snapshot of what the player does.

    Attributes:
        buttons: what is held: W3C ``event.code`` names, or any name that a world gives (Mouse0).
        look: mouse movement right and down, summed over the time it stands for.
        move: a stick's deflection right, up and forward, held.
        scroll: of the wheel, summed.
        prompt: what is asked for from now on; None leaves it as it is.
        t_client: the player's clock, in ms.
        event_id: grows with every event of a player; 0 where nobody counts.
    """

    buttons: Keys = IDLE
    look: tuple[float, float] = (0.0, 0.0)
    move: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scroll: float = 0.0
    prompt: str | None = None
    t_client: float = 0.0
    event_id: int = 0

    def __post_init__(self) -> None:
        # Any set or list will do, but what is kept can be hashed and changes no more.
        object.__setattr__(self, "buttons", _names(self.buttons))
        for name, count in (("look", 2), ("move", 3)):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), count, FARTHEST))
        for name, most in (("scroll", FARTHEST), ("t_client", math.inf)):
            object.__setattr__(self, name, _numbers(name, (getattr(self, name),), 1, most)[0])
        if not (self.prompt is None or isinstance(self.prompt, str)):
            raise ValueError(f"control: prompt must be words or None, got {self.prompt!r}")
        if type(self.event_id) is not int or self.event_id < 0:
            raise ValueError(f"control: event_id must be 0 or more, got {self.event_id!r}")

    @property
    def amounts(self) -> tuple[float, ...]:
        """How much of each of `AXES`."""
        return (*self.look, self.scroll, *self.move)

    def shared(self, count: int) -> "ControlState":
        """What each of ``count`` equal parts of the time gets of it."""
        if count == 1:
            return self
        across, down = self.look
        return replace(self, look=(across / count, down / count), scroll=self.scroll / count)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what differs from nothing at all."""
        default = ControlState()
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain = {name: value for name, value in told.items() if value != getattr(default, name)}
        return {
            name: sorted(value) if name == "buttons" else list(value) if name in VECTORS else value
            for name, value in plain.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ControlState":
        """Read what `as_dict` wrote, or anybody else.

        Raises:
            ValueError: one line, for what is no control.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"control: must be an object of fields, got {type(data).__name__}")
        if unknown := sorted(map(str, set(data) - set(cls.__dataclass_fields__))):
            raise ValueError(f"control: unknown field {unknown[0]!r}")
        for name in ("buttons", *VECTORS):
            if not isinstance(data.get(name, ()), (list, tuple)):
                raise ValueError(f"control: {name} must be a list, got {data[name]!r}")
        return cls(**data)


VECTORS = ("look", "move")
Control = ControlState | Collection[str]  # held keys alone are a control too


@dataclass(frozen=True)
class Receipt:
    """What `Session.control` gives back: ``block`` is the first one to be made under the event."""

    event_id: int
    block: int


@dataclass(frozen=True)
class Press:
    """A key that went down; ``fresh``: since the last block was begun."""

    key: str
    down: bool = True
    fresh: bool = True


@dataclass(frozen=True)
class Held:
    """What the player holds, as the next block will hear of it: the newest snapshot wins, but a key
    that was pressed and let go of since the last block counts for the next one.

    A value that never changes: every event makes a new one, so a session's snapshot can keep it.

    Attributes:
        presses: the oldest first.
        newest: the newest snapshot; its look and scroll are the sums since the last block.
    """

    presses: tuple[Press, ...] = ()
    newest: ControlState = field(default_factory=ControlState)

    @property
    def buttons(self) -> Keys:
        """What is down now."""
        return frozenset(press.key for press in self.presses if press.down)

    def heard(self, state: ControlState) -> "Held":
        """After one more snapshot. Of keys that go down in one snapshot the last by name counts as
        the newest."""
        presses = []
        for press in self.presses:
            if press.key not in state.buttons:
                if press.fresh:
                    presses.append(replace(press, down=False))
            elif press.down:
                presses.append(press)
        down = {press.key for press in presses if press.down}
        presses += [Press(key) for key in sorted(state.buttons - down)]
        right, below, scroll = (
            max(-FARTHEST, min(FARTHEST, a + b))
            for a, b in zip(self.newest.amounts[:SUMMED], state.amounts[:SUMMED], strict=True)
        )
        summed = replace(state, look=(right, below), scroll=scroll, prompt=None)
        return Held(tuple(presses), summed)

    def now(self, forbidden: Iterable[Collection[str]] = ()) -> ControlState:
        """What the next block is made under. Of keys that are ``forbidden`` together the one that
        was pressed first is left out."""
        keys = [press.key for press in self.presses]
        for together in forbidden:
            if set(together) <= set(keys):
                keys.remove(next(key for key in keys if key in together))
        return replace(self.newest, buttons=frozenset(keys))

    def spent(self) -> "Held":
        """After a block was made under it: what is down stays down, what was summed is used up."""
        presses = tuple(replace(press, fresh=False) for press in self.presses if press.down)
        return Held(presses, replace(self.newest, look=(0.0, 0.0), scroll=0.0))


def merged(
    states: Iterable[ControlState], forbidden: Iterable[Collection[str]] = ()
) -> ControlState:
    """One state for all the time that several, one after the other, stand for."""
    held = Held()
    for state in states:
        held = held.heard(state)
    return held.now(forbidden)


def _names(buttons: Any) -> Keys:
    if isinstance(buttons, str) or not all(isinstance(button, str) for button in buttons):
        raise ValueError(f"control: buttons must be a set of names, got {buttons!r}")
    return frozenset(buttons)


def _numbers(name: str, values: Any, count: int, most: float) -> tuple[float, ...]:
    """So many finite numbers, none of them beyond ± ``most``."""
    try:
        plain = tuple(float(v) for v in values if not isinstance(v, (str, bool)))
    except (TypeError, ValueError, OverflowError):
        plain = ()
    if len(plain) != count or len(values) != count or not all(map(math.isfinite, plain)):
        wanted = "a finite number" if count == 1 else f"{count} finite numbers"
        got = values[0] if count == 1 else values
        raise ValueError(f"control: {name} must be {wanted}, got {got!r}")
    if max(map(abs, plain)) > most:
        raise ValueError(f"control: {name} must be within ±{most:g}, got {values!r}")
    return plain
