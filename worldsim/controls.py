"""What the player does: keys, scripts of keys, and prompts over time.

A control is a snapshot of held keys (W3C ``event.code`` names) for one latent frame. Which keys a
world understands, what a script calls them and how they move the player is data: `ActionSpec`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from worldsim.cache.camera import Camera

REACH = 8  # latent frames of walking: as far as a view counts

Keys = frozenset[str]
IDLE: Keys = frozenset()


@dataclass(frozen=True)
class Motion:
    """How one key moves the player during one picture: cells forward and right, radians right."""

    forward: float = 0.0
    right: float = 0.0
    turn: float = 0.0


@dataclass(frozen=True)
class ActionSpec:
    """The controls of a world, as data.

    Attributes:
        keys: event codes in the order of the action vector.
        letters: what a script calls each key.
        aliases: other event codes that mean one of ``keys``.
        labels: what a key does, in words, for legends.
        motion: how each key moves the player; empty where the world gives no pose.
        periods: wavelengths, in cells, by which a dead-reckoned place is told to the model.
        field_of_view: of the camera, across the picture, in radians; 0 where rays are not told.
        harmonics: multiples of a ray's bearing whose sine and cosine are told.
        pictures: pictures of one latent frame.
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

    def __post_init__(self) -> None:
        for name, codes in (("letters", self.letters), ("aliases", self.aliases)):
            if unknown := sorted(set(codes.values()) - set(self.keys)):
                raise ValueError(f"action spec: {name} name keys that do not exist: {unknown}")
        if self.motion and len(self.motion) != len(self.keys):
            raise ValueError("action spec: motion must have one entry for each key")
        if not 0 <= self.field_of_view < math.pi:
            raise ValueError(f"action spec: field_of_view must be in 0…π, got {self.field_of_view}")

    @property
    def dim(self) -> int:
        """Length of an action vector: keys, then heading and place where there is a pose."""
        return len(self.keys) + (2 + 4 * len(self.periods) if self.motion else 0)

    @property
    def ray_dim(self) -> int:
        """Length of a ray: its bearing, and the place that it starts from; 0 without rays."""
        told = self.motion and self.field_of_view  # a camera that has a pose
        return 2 * len(self.harmonics) + 4 * len(self.periods) if told else 0

    @property
    def camera(self) -> Camera | None:
        """What a pose sees, or None where nobody moves or looks."""
        if not (self.motion and self.field_of_view):
            return None
        stride = max(max(abs(m.forward), abs(m.right)) for m in self.motion)
        if not stride:
            return None
        reach = REACH * self.pictures * stride
        return Camera(self.field_of_view, reach, max(self.periods, default=None))

    def resolve(self, buttons: Sequence[str] | Keys) -> Keys:
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

    def legend(self) -> str:
        """One line for people: ``W forward · S back · …``."""
        by_key = {key: letter for letter, key in self.letters.items()}
        return " · ".join(
            f"{by_key.get(key, key)} {self.labels.get(key, '')}".strip() for key in self.keys
        )

    def multi_hot(self, track: Sequence[Keys]) -> NDArray[np.bool_]:
        """Held keys of some latent frames, ``[N, keys]``."""
        return np.array([[key in held for key in self.keys] for held in track], dtype=bool)

    def actions(self, held: NDArray[np.bool_], poses: NDArray[np.float64]) -> NDArray[np.float32]:
        """Action vectors ``[..., N, dim]`` of latent frames under held keys ``[..., N, keys]``,
        which led to poses ``[..., N, 3]``."""
        if not self.motion:
            return held.astype(np.float32)
        told = [held, _turns(poses[..., 2:]), self._place(poses)]
        return np.concatenate(told, axis=-1).astype(np.float32)

    def rays(self, poses: NDArray[np.float64], columns: int) -> NDArray[np.float32]:
        """Where each of the ``columns`` of tokens looks from poses ``[..., N, 3]``.

        Returns:
            ``[..., N, columns, ray_dim]``: sines and cosines of the bearing of the column's middle,
            and of the place.
        """
        if not self.ray_dim:
            return np.zeros((*poses.shape[:-1], columns, 0), dtype=np.float32)
        across = (2 * np.arange(columns) + 1) / columns - 1
        bearing = poses[..., 2:] + np.arctan(across * math.tan(self.field_of_view / 2))
        place = np.broadcast_to(
            self._place(poses)[..., None, :], (*bearing.shape, 4 * len(self.periods))
        )
        told = _turns(bearing[..., None] * np.array(self.harmonics))
        return np.concatenate([told, place], axis=-1).astype(np.float32)

    def _place(self, poses: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[..., 3] → [..., 4 · periods]``."""
        turns = [2 * math.pi * poses[..., :2] / period for period in self.periods]
        return _turns(np.concatenate(turns, axis=-1)) if turns else poses[..., :0]

    def reckon(
        self, held: NDArray[np.bool_], start: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Poses (x, y, heading) at the end of each latent frame from held keys ``[..., N, keys]``
        alone, ``[..., N, 3]``; ``start``: before the first frame, ``[..., 3]``, or the origin.

        Walls are unknown here, so a place is only as true as the way was free; the heading is
        exact.
        """
        if start is None:
            start = np.zeros((*held.shape[:-2], 3))
        if not self.motion:
            return np.broadcast_to(start[..., None, :], (*held.shape[:-1], 3))
        moves = np.array([[m.forward, m.right, m.turn] for m in self.motion])
        forward, right, turn = np.moveaxis(held.astype(np.float64) @ moves, -1, 0)
        forward, right, turn = (
            np.repeat(a, self.pictures, axis=-1) for a in (forward, right, turn)
        )
        heading = start[..., 2:] + np.cumsum(turn, axis=-1)
        x = start[..., :1] + np.cumsum(forward * np.cos(heading) - right * np.sin(heading), axis=-1)
        y = start[..., 1:2] + np.cumsum(
            forward * np.sin(heading) + right * np.cos(heading), axis=-1
        )
        return np.stack([x, y, heading], axis=-1)[..., self.pictures - 1 :: self.pictures, :]

    def parse(self, script: str) -> tuple[Keys, ...]:
        """Read ``W*12 WJ*4, L*8 .*4``: held keys of each latent frame.

        Comma or space separates, ``WA`` holds both, ``.`` holds nothing; a count of one may be
        left out. Arrow keys are written by their event code, ``ArrowLeft*4``.

        Raises:
            ValueError: for an unknown key or a count that is no number.
        """
        track: list[Keys] = []
        for part in re.split(r"[,\s]+", script.strip()):
            if part:
                chord, star, count = part.partition("*")
                if star and (not count.isdecimal() or int(count) == 0):
                    raise ValueError(
                        f"controls: {part!r} must end in a count, as in 'W*12' (latent frames)"
                    )
                track += [self._chord(chord)] * (int(count) if star else 1)
        return tuple(track)

    def _chord(self, chord: str) -> Keys:
        if chord == ".":
            return IDLE
        if chord in self.keys or chord in self.aliases:
            return self.resolve([chord])
        if not chord:
            raise ValueError("controls: a count needs a key before it, as in 'W*12'")
        for letter in chord:
            if letter.upper() not in self.letters:
                raise ValueError(
                    f"controls: unknown key {letter!r} in {chord!r}; this world has "
                    f"{self.legend()} · . nothing"
                )
        return frozenset(self.letters[letter.upper()] for letter in chord)


@dataclass(frozen=True)
class PromptSegment:
    """A prompt from latent frame ``start`` on; ``cut`` marks a scene change before it."""

    prompt: str
    start: int
    cut: bool = False


def parse_prompts(text: str, latents_per_second: float) -> tuple[PromptSegment, ...]:
    """Read ``red brick[4s] | night[4s#]``: each prompt, for how long, and ``#`` for a cut.

    The last duration may be left out. A text without ``|`` is one prompt for ever.

    Raises:
        ValueError: for a segment before the last without a duration, or one that is no number.
    """
    segments: list[PromptSegment] = []
    start = 0.0
    parts = text.split("|")
    for i, part in enumerate(parts):
        match = re.fullmatch(r"\s*(.*?)\s*(?:\[\s*([\d.]+)\s*s\s*(#?)\s*\])?\s*", part, re.DOTALL)
        assert match is not None
        prompt, seconds, cut = match.groups()
        if "[" in prompt or (seconds is None and i + 1 < len(parts)):
            raise ValueError(
                f"prompt: {part.strip()!r} needs a duration, as in 'red brick[4s] | night[4s]'"
            )
        segments.append(PromptSegment(prompt, round(start), bool(cut)))
        if seconds is not None:
            try:
                start += float(seconds) * latents_per_second
            except ValueError:
                raise ValueError(f"prompt: {seconds!r} is not a number of seconds") from None
    return tuple(segments)


def _turns(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine and sine of each angle, one after the other: ``[..., n] → [..., 2 n]``."""
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return pairs.reshape(*angles.shape[:-1], -1)
