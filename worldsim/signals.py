"""What an action vector is made of: signals, described by data, side by side.

A world with other actions lists other signals in its ``world.json``. Letters in shapes: K keys, A
axes (`worldsim.controls.AXES`), N vectors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worldsim.controls import AXES

Floats = NDArray[np.float64]


class Done(NamedTuple):
    """What is told: ``held`` bool ``[..., N, K]`` of ``keys``, ``amounts [..., N, A]``, and the
    ``poses [..., N, 3 or 5]`` that they led to: x, y, heading, and where one looks up and climbs
    also height and tilt."""

    keys: Sequence[str]
    held: NDArray[np.bool_]
    amounts: Floats
    poses: Floats

    def of(self, keys: Sequence[str]) -> Floats:
        """``[..., N, len(keys)]``: 1 for those that are held."""
        return self.held[..., [self.keys.index(key) for key in keys]].astype(np.float64)

    def amount(self, axis: str) -> Floats:
        """``[..., N, 1]``"""
        index = AXES.index(axis)
        return self.amounts[..., index : index + 1]


@dataclass(frozen=True)
class Buttons:
    """One float for each key, 1 while it is held; without ``keys``, all of the world's."""

    keys: tuple[str, ...] = ()
    kind: str = field(default="buttons", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return len(self.keys or keys)

    def tell(self, done: Done) -> Floats:
        return done.of(self.keys or done.keys)


@dataclass(frozen=True)
class Analog:
    """One float: ``scale`` times an axis, and so much more for each key of ``keys`` that is held.

    Attributes:
        axis: one of `AXES`, or nothing.
        step: it is rounded to a multiple of this; 0 leaves it.
        limit: it is kept within ± this; None leaves it.
    """

    axis: str = ""
    scale: float = 1.0
    keys: Mapping[str, float] = field(default_factory=dict)
    step: float = 0.0
    limit: float | None = None
    kind: str = field(default="analog", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return 1

    def tell(self, done: Done) -> Floats:
        value = np.zeros((*done.held.shape[:-1], 1))
        if self.axis:
            value = value + self.scale * done.amount(self.axis)
        if self.keys:
            value = value + done.of(list(self.keys)) @ np.array(list(self.keys.values()))[:, None]
        if self.step:
            value = np.round(value / self.step) * self.step
        return value if self.limit is None else np.clip(value, -self.limit, self.limit)


@dataclass(frozen=True)
class Bins:
    """A one-hot of the value that ``scale`` times an axis is nearest to."""

    axis: str
    values: tuple[float, ...]
    scale: float = 1.0
    kind: str = field(default="bins", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return len(self.values)

    def tell(self, done: Done) -> Floats:
        away = np.abs(self.scale * done.amount(self.axis) - np.array(self.values))
        return one_hot(away.argmin(axis=-1), len(self.values))


@dataclass(frozen=True)
class Choice:
    """A one-hot of the option of which most keys are held, and all of them: of equal ones the
    first. An empty option is what is told when no other fits; without one that is all zeros."""

    options: tuple[tuple[str, ...], ...]
    kind: str = field(default="choice", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return len(self.options)

    def tell(self, done: Done) -> Floats:
        fits = [done.of(option).all(axis=-1) * (1 + len(option)) for option in self.options]
        best = np.stack(fits, axis=-1)
        none = best.max(axis=-1, keepdims=True) == 0
        return np.where(none, 0.0, one_hot(best.argmax(axis=-1), len(self.options)))


@dataclass(frozen=True)
class Constant:
    """Floats that nothing changes."""

    values: tuple[float, ...]
    kind: str = field(default="constant", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return len(self.values)

    def tell(self, done: Done) -> Floats:
        return np.broadcast_to(np.array(self.values), (*done.held.shape[:-1], len(self.values)))


@dataclass(frozen=True)
class Heading:
    """Cosine and sine of the dead-reckoned heading."""

    kind: str = field(default="heading", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return 2

    def tell(self, done: Done) -> Floats:
        return turns(done.poses[..., 2:3])


@dataclass(frozen=True)
class Place:
    """The dead-reckoned place by wavelengths (in cells): places a period apart are told alike."""

    periods: tuple[float, ...]
    kind: str = field(default="place", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return 4 * len(self.periods)

    def tell(self, done: Done) -> Floats:
        return place(done.poses, self.periods)


@dataclass(frozen=True)
class CameraPose:
    """The dead-reckoned camera: its matrix camera → world ``[4, 4]`` by rows, then ``intrinsics``
    (fx, fy, cx, cy, in whatever unit the model was trained with; none are told if there are none).

    As in OpenCV, x is right, y down and z forward; a stream begins with the identity.
    """

    intrinsics: tuple[float, ...] = ()
    kind: str = field(default="camera", init=False)

    def dim(self, keys: Sequence[str]) -> int:
        return 16 + len(self.intrinsics)

    def tell(self, done: Done) -> Floats:
        matrix = camera_to_world(done.poses).reshape(*done.poses.shape[:-1], 16)
        lens = Constant(self.intrinsics).tell(done)
        return np.concatenate([matrix, lens], axis=-1)


Signal = Buttons | Analog | Bins | Choice | Constant | Heading | Place | CameraPose
SIGNALS: tuple[type[Signal], ...] = (
    Buttons, Analog, Bins, Choice, Constant, Heading, Place, CameraPose,
)  # fmt: skip
POSED = (Heading, Place, CameraPose)  # they need a pose


def read_signal(data: Mapping[str, Any]) -> Signal:
    """A signal out of plain data, as ``world.json`` keeps it."""
    kinds = {str(signal.__dataclass_fields__["kind"].default): signal for signal in SIGNALS}
    fields = dict(data)
    kind = str(fields.pop("kind", None))
    if kind not in kinds:
        raise ValueError(f"action spec: a signal is one of {', '.join(kinds)}, not {kind}")
    return kinds[kind](**fields)


def named(signal: Signal) -> tuple[set[str], set[str]]:
    """The keys and the axes that a signal names."""
    if isinstance(signal, Choice):
        return {key for option in signal.options for key in option}, set()
    keys = set(signal.keys) if isinstance(signal, (Buttons, Analog)) else set[str]()
    axes = {signal.axis} - {""} if isinstance(signal, (Analog, Bins)) else set[str]()
    return keys, axes


def turns(angles: Floats) -> Floats:
    """Cosine and sine of each angle, one after the other: ``[..., n] → [..., 2 n]``."""
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return pairs.reshape(*angles.shape[:-1], 2 * angles.shape[-1])


def place(poses: Floats, periods: Sequence[float]) -> Floats:
    """``[..., 3] → [..., 4 · periods]``."""
    told = [2 * math.pi * poses[..., :2] / period for period in periods]
    return turns(np.concatenate(told, axis=-1)) if told else poses[..., :0]


def camera_to_world(poses: Floats) -> Floats:
    """``[..., 5] → [..., 4, 4]``, see `CameraPose`."""
    x, y, heading, height, tilt = np.moveaxis(poses, -1, 0)
    zero = np.zeros_like(x)
    right = np.stack([np.cos(heading), zero, -np.sin(heading)], axis=-1)
    level = np.cos(tilt)
    forward = np.stack([np.sin(heading) * level, -np.sin(tilt), np.cos(heading) * level], axis=-1)
    matrix = np.zeros((*poses.shape[:-1], 4, 4))
    matrix[..., :3, 0] = right
    matrix[..., :3, 1] = np.cross(forward, right)
    matrix[..., :3, 2] = forward
    matrix[..., :3, 3] = np.stack([y, -height, x], axis=-1)
    matrix[..., 3, 3] = 1
    return matrix


def one_hot(index: NDArray[np.int_], count: int) -> Floats:
    return np.eye(count)[index]
