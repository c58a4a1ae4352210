"""What can be scored: a world that plays, and the simulator itself, whole or spoilt on purpose.

Both are a `Subject`: they take up a held-out walk after its first ``GIVEN`` latent frames, or begin
from nothing but a prompt, and go on under any controls. So every score of a world can also be taken
of the truth, and of a truth with a known fault: the scoreboard measures itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldsim.controls import IDLE, Keys
from worldsim.maze.simulator import KEYS, MazeMaps, render, trajectory
from worldsim.maze.themes import Theme
from worldsim.maze.truth import FIRST, Truth
from worldsim.models.autoencoder import to_pictures
from worldsim.session import Session
from worldsim.world import World

Pictures = NDArray[np.uint8]  # [P, H, W, 3]


class Stream(Protocol):
    """A walk that goes on; each latent frame shows four pictures."""

    def walk(self, track: Sequence[Keys]) -> Pictures:
        """The pictures of the next latent frames, ``[4 · len(track), H, W, 3]``."""
        ...

    def ask(self, theme: Theme) -> None:
        """Ask for another theme from the next latent frame on."""
        ...

    def fork(self) -> "Stream":
        """A twin that goes its own way from here."""
        ...

    def close(self) -> None: ...


class Subject(Protocol):
    """Whatever is scored."""

    def resume(self, truth: Truth, row: int) -> Stream:
        """A stream that was given the first ``GIVEN`` latent frames of a walk."""
        ...

    def dream(self, truth: Truth, row: int, prompt: str) -> Stream:
        """A stream out of nothing but a prompt, after its first picture. The simulator, which
        reads no prompts, stands at the beginning of that walk."""
        ...

    def mistaken(self, stream: Stream, other: Truth, row: int) -> Stream:
        """The same stream, but for its given frames, which are those of another walk."""
        ...


# --- a world that plays ---------------------------------------------------------------------------
Open = Callable[[str, int], Session]  # (prompt, seed) -> a session with the settings under test


@dataclass
class PlayedStream:
    """A session, and what it was made of."""

    session: Session
    made: list[tuple[Tensor, Keys]] = field(default_factory=list)  # since the given frames

    def walk(self, track: Sequence[Keys]) -> Pictures:
        blocks = []
        for keys in track:
            block = self.session.step([keys])
            self.made.append((block.latents, keys))
            blocks.append(block.frames)
        return np.concatenate(blocks)

    def ask(self, theme: Theme) -> None:
        self.session.control(prompt=theme.prompt())

    def fork(self) -> "PlayedStream":
        return PlayedStream(self.session.fork(), list(self.made))

    def close(self) -> None:
        self.session.close()


@dataclass(frozen=True)
class Played:
    """A world under the settings with which ``open_session`` opens it; blocks of one frame."""

    open_session: Open

    def resume(self, truth: Truth, row: int) -> PlayedStream:
        return self._given(truth, row, seed=row)

    def _given(self, truth: Truth, row: int, seed: int) -> PlayedStream:
        session = self.open_session(truth.prompt(row), seed)
        given = session.world.encoded(truth.pictures(row, 0, FIRST)).split(1, dim=2)
        for keys, latents in zip(truth.track(row), given, strict=False):
            session.decode(session.give(latents, [keys]))
        return PlayedStream(session)

    def dream(self, truth: Truth, row: int, prompt: str) -> PlayedStream:
        session = self.open_session(prompt, row)
        session.step([IDLE])
        return PlayedStream(session)

    def mistaken(self, stream: Stream, other: Truth, row: int) -> PlayedStream:
        assert isinstance(stream, PlayedStream)
        twin = self._given(other, row, stream.session.settings.seed)
        twin.session.control(prompt=stream.session.prompt)
        for latents, keys in stream.made:
            twin.session.decode(twin.session.give(latents, [keys]))
        return PlayedStream(twin.session, list(stream.made))


@torch.inference_mode()
def reconstructed(world: World, pictures: Tensor) -> Tensor:
    """A clip through the autoencoder and back: the ceiling of everything that the DiT can make."""
    assert world.autoencoder is not None, "a maze shows pictures"
    latents = world.encoded(pictures).to(world.dtype)
    return to_pictures(world.autoencoder.decode(latents)[0]).cpu()


# --- the simulator, whole or spoilt ---------------------------------------------------------------
def unchanged(pictures: Pictures) -> Pictures:
    return pictures


@dataclass(frozen=True)
class Fault:
    """One known fault of a simulated stream.

    Attributes:
        pictures: what happens to every picture.
        keys: which control acts in place of the one that is held.
        still: the last picture is shown for ever.
        elsewhere: it goes on in another map.
    """

    pictures: Callable[[Pictures], Pictures] = unchanged
    keys: Mapping[str, str] = field(default_factory=dict)
    still: bool = False
    elsewhere: bool = False


@dataclass
class SimulatedStream:
    """The simulator in one pose of one map."""

    fault: Fault
    mazes: MazeMaps
    pose: Tensor  # [1, 3]
    theme: Theme
    size: tuple[int, int]
    made: list[Keys] = field(default_factory=list)

    def walk(self, track: Sequence[Keys]) -> Pictures:
        held = torch.tensor([[False] * len(KEYS), *(self._held(keys) for keys in track)])
        poses = trajectory(self.mazes, self.pose, held[None])
        self.made += track
        self.pose = poses[:, -1]
        shown = poses[:, 1:]
        if self.fault.still:
            self.pose, shown = poses[:, 0], poses[:, :1].expand_as(shown)
        themes = torch.tensor(self.theme.indices()).expand(1, shown.shape[1], 4)
        return self.fault.pictures(render(self.mazes, shown, themes, *self.size)[0].numpy())

    def ask(self, theme: Theme) -> None:
        self.theme = self.theme if self.fault.still else theme

    def fork(self) -> "SimulatedStream":
        return replace(self, made=list(self.made))

    def close(self) -> None:
        pass

    def _held(self, keys: Keys) -> list[bool]:
        acting = {self.fault.keys.get(key, key) for key in keys}
        return [key in acting for key in KEYS]


@dataclass(frozen=True)
class Simulated:
    """The simulator as a subject."""

    fault: Fault = field(default_factory=Fault)

    def resume(self, truth: Truth, row: int) -> SimulatedStream:
        place = (row + 1) % len(truth.poses) if self.fault.elsewhere else row
        return self._at(truth, place, truth.poses[place : place + 1, FIRST - 1], truth.theme(row))

    def dream(self, truth: Truth, row: int, prompt: str) -> SimulatedStream:
        return self._at(truth, row, truth.poses[row : row + 1, 0], truth.theme(row))

    def mistaken(self, stream: Stream, other: Truth, row: int) -> SimulatedStream:
        assert isinstance(stream, SimulatedStream)
        twin = self.resume(other, row)
        twin.walk(stream.made)
        return twin

    def _at(self, truth: Truth, row: int, pose: Tensor, theme: Theme) -> SimulatedStream:
        return SimulatedStream(self.fault, truth.mazes[row : row + 1], pose, theme, truth.size)
