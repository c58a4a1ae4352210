"""The controls of a world, as data: what it understands, and the tensors that this becomes."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worldsim.cache.camera import Camera
from worldsim.controls import AXES, SUMMED, Control, ControlState, Keys, merged
from worldsim.script import parse_controls
from worldsim.signals import (
    POSED,
    Buttons,
    CameraPose,
    Done,
    Floats,
    Heading,
    Place,
    Signal,
    named,
    place,
    read_signal,
    turns,
)

REACH = 8  # latent frames of walking: as far as a view counts
RATES = ("picture", "latent", "block")
NOTHING = ControlState()


@dataclass(frozen=True)
class Motion:
    """How something moves the player: cells forward, right and up, radians right and upwards.

    A key or a stick does so during each picture that it is held, look and scroll once per unit.
    """

    forward: float = 0.0
    right: float = 0.0
    turn: float = 0.0
    up: float = 0.0
    tilt: float = 0.0


class Encoded(NamedTuple):
    """What controls become: ``actions`` float32 ``[N, dim]``, ``rays`` float32 ``[N, columns,
    ray_dim]`` and the ``poses [N, pose_dim]`` at the end of each latent frame."""

    actions: NDArray[np.float32]
    rays: NDArray[np.float32]
    poses: Floats


@dataclass(frozen=True)
class ActionSpec:
    """The controls of a world, as data.

    Attributes:
        keys: event codes in the order of the action vector.
        letters: what a script calls each key.
        aliases: other event codes that mean one of ``keys``.
        labels: what a key does, in words, for legends; also what ``look``, ``move``, ``scroll`` do.
        motion: how each key moves the player; empty where no key does.
        periods: wavelengths, in cells, by which a dead-reckoned place is told to the model.
        field_of_view: of the camera, across the picture, in radians; 0 where rays are not told.
        harmonics: multiples of a ray's bearing whose sine and cosine are told.
        pictures: pictures of one latent frame.
        axes: how each of `worldsim.controls.AXES` moves the player, where one does.
        signals: what the action vector is made of, in order. Empty is all keys, and heading and
            place where there is a pose.
        forbidden: keys that are never held at once. Of what a player holds the key pressed last
            counts; a script that says so is refused.
        neutral: keys that count as held where none is (a "no operation" of its own).
        rate: what has an action of its own: each ``picture`` (a latent frame's vector is then those
            of its pictures, one after the other), each ``latent`` frame, or each ``block`` (what is
            done in any of its frames is then done in all of them).
    """

    keys: tuple[str, ...]
    letters: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    motion: tuple[Motion, ...] = ()
    periods: tuple[float, ...] = ()
    field_of_view: float = 0.0
    harmonics: tuple[int, ...] = (1, 2, 4, 8)
    pictures: int = 4
    axes: Mapping[str, Motion] = field(default_factory=dict)
    signals: tuple[Signal, ...] = ()
    forbidden: tuple[tuple[str, ...], ...] = ()
    neutral: tuple[str, ...] = ()
    rate: str = "latent"

    def __post_init__(self) -> None:
        told = [named(signal) for signal in self.signals]
        names: dict[str, Collection[str]] = {
            "letters": self.letters.values(),
            "aliases": self.aliases.values(),
            "signals": set[str]().union(*(keys for keys, _ in told)),
            "forbidden": {key for keys in self.forbidden for key in keys},
            "neutral": self.neutral,
        }
        for name, codes in names.items():
            if unknown := sorted(set(codes) - set(self.keys)):
                raise ValueError(f"action spec: {name} name keys that do not exist: {unknown}")
        if unknown := sorted(set(self.axes).union(*(axes for _, axes in told)) - set(AXES)):
            raise ValueError(f"action spec: an axis is one of {', '.join(AXES)}, not {unknown[0]}")
        if self.motion and len(self.motion) != len(self.keys):
            raise ValueError("action spec: motion must have one entry for each key")
        if not 0 <= self.field_of_view < math.pi:
            raise ValueError(f"action spec: field_of_view must be in 0…π, got {self.field_of_view}")
        if any(isinstance(signal, POSED) for signal in self.signals) and not self.posed:
            raise ValueError("action spec: a signal tells the pose, but nothing moves the player")
        if any(len(set(keys)) < 2 for keys in self.forbidden):
            raise ValueError("action spec: what is forbidden together must be two keys or more")
        if self.rate not in RATES:
            raise ValueError(f"action spec: rate must be one of {', '.join(RATES)}")
        self.state(())  # what is neutral must be allowed

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ActionSpec":
        """Read plain data, as ``world.json`` keeps it."""
        fields = {name: _tuples(value) for name, value in data.items()}
        fields["motion"] = tuple(Motion(**motion) for motion in fields.get("motion", ()))
        fields["axes"] = {name: Motion(**motion) for name, motion in data.get("axes", {}).items()}
        fields["signals"] = tuple(map(read_signal, fields.get("signals", ())))
        return cls(**fields)

    # --- sizes ----------------------------------------------------------------------------------
    @property
    def posed(self) -> bool:
        """Whether anything moves the player, so that there is a pose."""
        return bool(self.motion or self.axes)

    @property
    def pose_dim(self) -> int:
        """Numbers of a pose: x, y, heading, and where one looks up or climbs, height and tilt."""
        climbs = any(motion.up or motion.tilt for motion in (*self.motion, *self.axes.values()))
        told = any(isinstance(signal, CameraPose) for signal in self.signals)
        return 5 if climbs or told else 3

    @property
    def told(self) -> tuple[Signal, ...]:
        """What the action vector is made of."""
        pose = (Heading(), Place(self.periods)) if self.posed else ()
        return self.signals or (Buttons(), *pose)

    @property
    def dim(self) -> int:
        """Length of a latent frame's action vector."""
        one = sum(signal.dim(self.keys) for signal in self.told)
        return one * self.pictures if self.rate == "picture" else one

    @property
    def ray_dim(self) -> int:
        """Length of a ray: its bearing, and the place that it starts from; 0 without rays."""
        told = self.posed and self.field_of_view  # a camera that has a pose
        return 2 * len(self.harmonics) + 4 * len(self.periods) if told else 0

    @property
    def camera(self) -> Camera | None:
        """What a pose sees, or None where nobody moves or looks."""
        if not (self.posed and self.field_of_view):
            return None
        moves = (*self.motion, *self.axes.values())
        stride = max(max(abs(m.forward), abs(m.right)) for m in moves)
        if not stride:
            return None
        reach = REACH * self.pictures * stride
        return Camera(self.field_of_view, reach, max(self.periods, default=None))

    @property
    def names(self) -> dict[str, str]:
        """What a script calls each key."""
        letters = {key: letter for letter, key in self.letters.items()}
        return {key: letters.get(key, key) for key in self.keys}

    @property
    def analog(self) -> tuple[str, ...]:
        """What this world takes beside keys: any of ``look``, ``scroll`` and ``move``."""
        used = set(self.axes).union(*(named(signal)[1] for signal in self.told))
        return tuple(dict.fromkeys(axis.split(".")[0] for axis in AXES if axis in used))

    # --- what is understood ---------------------------------------------------------------------
    def resolve(self, buttons: Collection[str]) -> Keys:
        """Held event codes with aliases resolved.

        Raises:
            ValueError: for a code that this world does not have, naming those it has.
        """
        held = frozenset(self.aliases.get(button, button) for button in buttons)
        if unknown := sorted(held - set(self.keys)):
            known = f"this world has {self.legend()}"
            if unknown[0] in self.letters:
                known = f"write {self.letters[unknown[0]]!r}, the code of that key"
            raise ValueError(f"unknown key {unknown[0]!r}; {known}")
        return held

    def heard(self, control: Control) -> ControlState:
        """A snapshot of a player with aliases resolved; forbidden keys may be held.

        Raises:
            ValueError: for a key, or a look, move or scroll, that this world does not have.
        """
        state = control if isinstance(control, ControlState) else ControlState(frozenset(control))
        for name in ("look", "move", "scroll"):
            if getattr(state, name) != getattr(NOTHING, name) and name not in self.analog:
                raise ValueError(f"unknown control {name!r}; this world has {self.legend()}")
        return replace(state, buttons=self.resolve(state.buttons))

    def state(self, control: Control) -> ControlState:
        """What a latent frame is made under: as `heard`, and nothing that is forbidden.

        Raises:
            ValueError: as `heard`; for keys that are never held at once; for a prompt, which is no
                control of a frame.
        """
        state = self.heard(control)
        if state.prompt is not None:
            raise ValueError("a prompt is asked for by Session.control, or over time by a script")
        held = state.buttons or frozenset(self.neutral)
        for keys in self.forbidden:
            if held.issuperset(keys):
                raise ValueError(f"{' and '.join(keys)} cannot be held at once in this world")
        return replace(state, buttons=held)

    def track(self, controls: Sequence[Control]) -> tuple[ControlState, ...]:
        """What the latent frames of one block are made under; who said so and when is left out."""
        states = tuple(replace(self.state(c), t_client=0.0, event_id=0) for c in controls)
        if self.rate != "block" or len(set(states)) == 1:
            return states
        whole = merged(states, self.forbidden)
        return (self.state(whole.shared(len(states))),) * len(states)

    def parse(self, script: str) -> tuple[ControlState, ...]:
        """Read ``W*12 WJ*4, L*8 .*4``, see `worldsim.script.parse_controls`."""
        return parse_controls(script, self)

    def legend(self) -> str:
        """One line for people: ``W forward · S back · …``."""
        names = self.names | {name: name for name in self.analog}
        return " · ".join(
            f"{name} {self.labels.get(key, '')}".strip() for key, name in names.items()
        )

    # --- tensors --------------------------------------------------------------------------------
    def encode(
        self, states: Sequence[ControlState], start: Floats | None = None, columns: int = 0
    ) -> Encoded:
        """What the latent frames of a block, as `track` gave them, become for the model; ``start``:
        the pose before them, ``columns``: of tokens."""
        held = self.multi_hot([state.buttons for state in states])
        amounts = np.array([state.amounts for state in states], dtype=np.float64)
        path = self.path(held, start, amounts)
        poses = path[self.pictures - 1 :: self.pictures]
        actions = self.actions(held, path if self.rate == "picture" else poses, amounts)
        return Encoded(actions, self.rays(poses, columns), poses)

    def multi_hot(self, track: Sequence[Keys]) -> NDArray[np.bool_]:
        """Held keys of some latent frames, ``[N, keys]``."""
        return np.array([[key in held for key in self.keys] for held in track], dtype=bool)

    def actions(
        self, held: NDArray[np.bool_], poses: Floats, amounts: Floats | None = None
    ) -> NDArray[np.float32]:
        """Action vectors ``[..., N, dim]`` of latent frames under held keys ``[..., N, keys]`` and
        ``amounts [..., N, axes]`` (None: nothing), which led to poses ``[..., N, pose_dim]``: where
        the rate is ``picture``, to those of every picture."""
        if amounts is None:
            amounts = np.zeros((*held.shape[:-1], len(AXES)))
        if self.rate == "picture":
            held = np.repeat(held, self.pictures, axis=-2)
            amounts = np.repeat(amounts, self.pictures, axis=-2)
            amounts[..., :SUMMED] /= self.pictures
        done = Done(self.keys, held, amounts, poses)
        vectors = np.concatenate([signal.tell(done) for signal in self.told], axis=-1)
        if self.rate == "picture":
            vectors = vectors.reshape(*vectors.shape[:-2], -1, self.dim)
        return vectors.astype(np.float32)

    def rays(self, poses: Floats, columns: int) -> NDArray[np.float32]:
        """Where each of the ``columns`` of tokens looks from poses ``[..., N, pose_dim]``.

        Returns:
            ``[..., N, columns, ray_dim]``: sines and cosines of the bearing of the column's middle,
            and of the place.
        """
        if not self.ray_dim:
            return np.zeros((*poses.shape[:-1], columns, 0), dtype=np.float32)
        across = (2 * np.arange(columns) + 1) / columns - 1
        bearing = poses[..., 2:3] + np.arctan(across * math.tan(self.field_of_view / 2))
        there = np.broadcast_to(
            place(poses, self.periods)[..., None, :], (*bearing.shape, 4 * len(self.periods))
        )
        told = turns(bearing[..., None] * np.array(self.harmonics))
        return np.concatenate([told, there], axis=-1).astype(np.float32)

    def reckon(
        self,
        held: NDArray[np.bool_],
        start: Floats | None = None,
        amounts: Floats | None = None,
    ) -> Floats:
        """Poses at the end of each latent frame from controls alone, ``[..., N, pose_dim]``;
        arguments as of `path`."""
        return self.path(held, start, amounts)[..., self.pictures - 1 :: self.pictures, :]

    def path(
        self,
        held: NDArray[np.bool_],
        start: Floats | None = None,
        amounts: Floats | None = None,
    ) -> Floats:
        """Poses of every picture from held keys ``[..., N, keys]`` and ``amounts [..., N, axes]``
        (None: nothing), ``[..., N · pictures, pose_dim]``; ``start``: before the first one,
        ``[..., pose_dim]``, or the origin.

        Walls are unknown here, so a place is only as true as the way was free; the heading is
        exact.
        """
        if start is None:
            start = np.zeros((*held.shape[:-2], self.pose_dim))
        shape = (*held.shape[:-2], held.shape[-2] * self.pictures, self.pose_dim)
        if not self.posed:
            return np.broadcast_to(start[..., None, :], shape)
        forward, right, turn = self._moved(held, amounts, ("forward", "right", "turn"))
        heading = start[..., 2:3] + np.cumsum(turn, axis=-1)
        x = start[..., :1] + np.cumsum(forward * np.cos(heading) - right * np.sin(heading), axis=-1)
        y = start[..., 1:2] + np.cumsum(
            forward * np.sin(heading) + right * np.cos(heading), axis=-1
        )
        if self.pose_dim == 3:
            return np.stack([x, y, heading], axis=-1)
        up, tilt = self._moved(held, amounts, ("up", "tilt"))
        height = start[..., 3:4] + np.cumsum(up, axis=-1)
        return np.stack([x, y, heading, height, _tilted(start[..., 4], tilt)], axis=-1)

    def _moved(
        self, held: NDArray[np.bool_], amounts: Floats | None, names: Sequence[str]
    ) -> list[Floats]:
        """By how much each picture moves the player in each of the named ways, ``[..., N ·
        pictures]`` each."""
        moved = np.zeros((*held.shape[:-1], len(names)))
        if self.motion:
            by_key = np.array([[getattr(m, name) for name in names] for m in self.motion])
            moved = held.astype(np.float64) @ by_key
        if self.axes and amounts is not None:
            none = Motion()
            ways = [self.axes.get(axis, none) for axis in AXES]
            by_axis = np.array([[getattr(m, name) for name in names] for m in ways])
            by_axis[:SUMMED] /= self.pictures  # they are those of a latent frame
            moved = moved + amounts @ by_axis
        return [np.repeat(way, self.pictures, axis=-1) for way in np.moveaxis(moved, -1, 0)]


def _tilted(start: Floats, tilt: Floats) -> Floats:
    """The sum so far of ``tilt [..., P]``, but nobody looks further up or down than straight."""
    now, so_far = start, []
    for change in np.moveaxis(tilt, -1, 0):
        now = np.clip(now + change, -math.pi / 2, math.pi / 2)
        so_far.append(now)
    return np.stack(so_far, axis=-1)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down."""
    if isinstance(value, Mapping):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
