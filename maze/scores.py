"""Scores of a world against the simulator: one number per held-out walk each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldsim.maze.looks import Looks
from worldsim.maze.themes import WALLS
from worldsim.maze.truth import FIRST, FORKS, GIVEN, Truth
from worldsim.metrics import motion, psnr, sharpness
from worldsim.models.autoencoder import GROUP, from_pictures, to_pictures
from worldsim.session import Session
from worldsim.world import World

Open = Callable[[str, int], Session]  # (prompt, seed) -> a session with the settings under test
Scores = NDArray[np.float64]
Note = Callable[[], None]  # called after each state, for a progress bar
SECOND = 4  # latent frames
MOST_ALIKE = 25.0  # dB: 3 below the least that an autoencoder must keep (28 dB)


def start(open_session: Open, truth: Truth, row: int) -> Session:
    """A session that was given the first ``GIVEN`` latent frames of a held-out walk."""
    session = open_session(truth.prompt(row), row)
    track = truth.track(row)
    given = encoded(session.world, truth.pictures(row, 0, FIRST)).split(1, dim=2)
    for keys, latents in zip(track, given, strict=False):
        session.decode(session.give(latents, [keys]))
    return session


def walked_on(session: Session, truth: Truth, row: int, seconds: int) -> NDArray[np.uint8]:
    """Pictures of a started session that goes on as its walk did, ``[16 · seconds, H, W, 3]``."""
    track = truth.track(row)[GIVEN : GIVEN + SECOND * seconds]
    return np.concatenate([session.step([keys]).frames for keys in track])


@torch.inference_mode()
def encoded(world: World, pictures: Tensor) -> Tensor:
    """Latents ``[1, C, T, h, w]`` of a clip that begins a stream."""
    source = from_pictures(pictures[None]).to(world.device, world.dtype)
    return world.autoencoder.encode(source)[0].float()


@torch.inference_mode()
def reconstruction(world: World, truth: Truth, note: Note) -> Scores:
    """PSNR of each walk's pictures through the autoencoder: the ceiling of everything else."""
    out = []
    for row in range(len(truth.poses)):
        pictures = truth.pictures(row)
        out.append(psnr(reconstructed(world, pictures), pictures))
        note()
    return np.array(out)


@torch.inference_mode()
def reconstructed(world: World, pictures: Tensor) -> Tensor:
    latents = encoded(world, pictures).to(world.dtype)
    return to_pictures(world.autoencoder.decode(latents)[0]).cpu()


def rollouts(
    open_session: Open, truth: Truth, seconds: int, note: Note
) -> tuple[Scores, Scores, list[NDArray[np.uint8]]]:
    """Roll each walk on for ``seconds`` under its own controls.

    Returns:
        PSNR against truth of every second ``[B, seconds]``, the same of freezing the last given
        picture, and the generated pictures.
    """
    model, frozen, clips = [], [], []
    for row in range(len(truth.poses)):
        with start(open_session, truth, row) as session:
            made = walked_on(session, truth, row, seconds)
        true = truth.pictures(row, FIRST - 1, FIRST + len(made))
        still = true[:1].expand_as(true[1:])
        model.append([psnr(made[part], true[1:][part]) for part in by_second(seconds)])
        frozen.append([psnr(still[part], true[1:][part]) for part in by_second(seconds)])
        clips.append(made)
        note()
    return np.array(model), np.array(frozen), clips


def by_second(seconds: int) -> list[slice]:
    """The pictures of each second."""
    size = SECOND * GROUP
    return [slice(size * second, size * (second + 1)) for second in range(seconds)]


def control_following(
    open_session: Open, truth: Truth, states: int, note: Note
) -> tuple[Scores, int]:
    """The fork test: one second under five controls with the same noise, from the same state.

    Returns for each state the share of clips whose nearest simulator truth (by PSNR) is that of
    its own control, and how many walks were looked at. Only states count in which the five truths
    can be told apart (`distinct`); the simulator alone decides that.

    Raises:
        ValueError: if the walks have too few such states.
    """
    out: list[float] = []
    for row in range(len(truth.poses)):
        futures = [truth.continued(row, FIRST - 1, keys, SECOND) for keys in FORKS.values()]
        if not distinct(futures):
            continue
        right = 0
        with start(open_session, truth, row) as session:
            for own, keys in enumerate(FORKS.values()):
                with session.fork() as twin:
                    made = np.concatenate([twin.step([keys]).frames for _ in range(SECOND)])
                right += int(np.argmax([psnr(made, future) for future in futures]) == own)
        out.append(right / len(FORKS))
        note()
        if len(out) == states:
            return np.array(out), row + 1
    raise ValueError(f"only {len(out)} of {len(truth.poses)} walks can be forked; add walks")


def distinct(futures: Sequence[Tensor]) -> bool:
    """Whether every two futures differ by more than an autoencoder loses (`MOST_ALIKE`)."""
    return all(psnr(a, b) <= MOST_ALIKE for a, b in combinations(futures, 2))


@dataclass(frozen=True)
class LongWalk:
    """A long rollout beside the truth of the same controls, per walk and second ``[B, seconds]``.

    Attributes:
        sharpness, motion: relative to the truth of the whole walk; a collapse shows as a fall
            towards 0, noise as a rise.
        theme: share of the four attributes still recognised in the last ten seconds, ``[B]``.
    """

    sharpness: Scores
    motion: Scores
    theme: Scores


def long_walks(
    open_session: Open, truth: Truth, seconds: int, looks: Looks, note: Note
) -> LongWalk:
    """Let each walk go on for ``seconds`` (at least ten)."""
    sharp, moved, theme = [], [], []
    for row in range(len(truth.poses)):
        with start(open_session, truth, row) as session:
            made = walked_on(session, truth, row, seconds)
        true = truth.pictures(row, FIRST, FIRST + len(made))
        clear, moving = sharpness(true), motion(true)  # of all: one second may face a flat wall
        sharp.append([sharpness(made[part]) / clear for part in by_second(seconds)])
        moved.append([motion(made[part]) / moving for part in by_second(seconds)])
        theme.append(_shown(looks, made[-10 * SECOND * GROUP :], truth.themes[row]))
        note()
    return LongWalk(np.array(sharp), np.array(moved), np.array(theme))


def prompt_response(
    open_session: Open, truth: Truth, looks: Looks, note: Note
) -> dict[str, Scores]:
    """What the pictures show of what was asked, per walk.

    Returns:
        ``start``: share of four attributes after two seconds from nothing but the prompt;
        ``switch``: the same in the third second after a change to another prompt;
        ``one word``: whether the wall is right when the prompt names nothing else.
    """
    out: dict[str, list[float]] = {"start": [], "switch": [], "one word": []}
    for row in range(len(truth.poses)):
        track = truth.track(row)
        with open_session(truth.prompt(row), row) as session:
            made = [session.step([keys]).frames for keys in track[: 1 + 2 * SECOND]]
            out["start"].append(_shown(looks, np.concatenate(made), truth.themes[row]))
            other = (row + 1) % len(truth.poses)
            session.control(prompt=truth.prompt(other))
            made = [session.step([keys]).frames for keys in track[: 3 * SECOND]]
        last = np.concatenate(made[-SECOND:])
        out["switch"].append(_shown(looks, last, truth.themes[other]))
        wall = int(truth.themes[row][0])
        with open_session(WALLS[wall], row) as session:
            made = [session.step([keys]).frames for keys in track[: 1 + 2 * SECOND]]
        out["one word"].append(float(looks.recognise(np.concatenate(made))[0] == wall))
        note()
    return {name: np.array(values) for name, values in out.items()}


def _shown(looks: Looks, clip: NDArray[np.uint8], asked: Tensor) -> float:
    shown = looks.recognise(clip)
    return float(np.mean([a == b for a, b in zip(shown, asked.tolist(), strict=True)]))
