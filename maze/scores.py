"""Scores of a world against the simulator. Each takes a world and returns one number per state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldsim.maze.looks import Looks
from worldsim.maze.truth import FORKS, GIVEN, Truth, psnr, sharpness
from worldsim.models.autoencoder import GROUP, from_pictures, to_pictures
from worldsim.session import Session
from worldsim.world import World

Open = Callable[[str, int], Session]  # (prompt, seed) -> a session with the settings under test
Scores = NDArray[np.float64]
Note = Callable[[], None]  # called after each state, for a progress bar
SECOND = 4  # latent frames
MARGIN = 3.0  # dB by which an autoencoded truth must be nearer to itself than to any other


@dataclass(frozen=True)
class Started:
    """A session that was given a true second, and the number of its walk."""

    session: Session
    row: int


def start(open_session: Open, truth: Truth, row: int) -> Started:
    """A session that has seen the first ``GIVEN`` latent frames of a held-out walk."""
    session = open_session(truth.prompt(row), row)
    pictures = truth.pictures(row, 0, GROUP * (GIVEN - 1) + 1)
    track = truth.track(row)
    for frame, latents in enumerate(encoded(session.world, pictures).split(1, dim=2)):
        session.decode(session.give(latents, [track[frame]]))
    return Started(session, row)


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
        with start(open_session, truth, row).session as session:
            track = truth.track(row)[GIVEN : GIVEN + SECOND * seconds]
            made = np.concatenate([session.step([keys]).frames for keys in track])
        first = GROUP * (GIVEN - 1)
        true = truth.pictures(row, first, first + 1 + len(made))
        parts = [slice(16 * s, 16 * (s + 1)) for s in range(seconds)]
        still = true[:1].expand_as(true[1:])
        model.append([psnr(made[part], true[1:][part]) for part in parts])
        frozen.append([psnr(still[part], true[1:][part]) for part in parts])
        clips.append(made)
        note()
    return np.array(model), np.array(frozen), clips


def control_following(open_session: Open, truth: Truth, states: int, note: Note) -> Scores:
    """The fork test: one second under five controls with the same noise, from the same state.

    Returns for each state the share of clips whose nearest simulator truth (by PSNR) is that of
    its own control. Only states count in which the five truths can be told apart (`distinct`).

    Raises:
        ValueError: if the walks have too few such states.
    """
    out: list[float] = []
    for row in range(len(truth.poses)):
        if len(out) == states:
            break
        futures = [
            truth.continued(row, GROUP * (GIVEN - 1), keys, SECOND) for keys in FORKS.values()
        ]
        started = start(open_session, truth, row)
        with started.session as session:
            if not distinct(session, futures):
                continue
            right = 0
            for own, keys in enumerate(FORKS.values()):
                with session.fork() as twin:
                    made = np.concatenate([twin.step([keys]).frames for _ in range(SECOND)])
                scores = [psnr(made, future) for future in futures]
                right += int(np.argmax(scores) == own)
        out.append(right / len(FORKS))
        note()
    if len(out) < states:
        raise ValueError(f"only {len(out)} of {len(truth.poses)} walks can be forked; add walks")
    return np.array(out)


@torch.inference_mode()
def distinct(session: Session, futures: Sequence[Tensor]) -> bool:
    """Whether each future, seen through the autoencoder, is nearer to itself by `MARGIN` dB.

    It is decoded as the world decodes, after what the session has shown so far.
    """
    for own, future in enumerate(futures):
        seen = reconstructed(session.world, torch.cat((future[:1], future)))[1:]
        scores = [psnr(seen, other) for other in futures]
        others = [score for i, score in enumerate(scores) if i != own]
        if scores[own] - max(others) < MARGIN:
            return False
    return True


def long_walks(
    open_session: Open, truth: Truth, seconds: int, note: Note
) -> tuple[Scores, list[NDArray[np.uint8]]]:
    """Sharpness relative to truth in each second of a long rollout ``[B, seconds]``, and clips.

    The truth follows the same controls; 1 means as sharp as the simulator, and a collapse shows
    as a fall towards 0 (or a rise, if it turns to noise).
    """
    out, clips = [], []
    for row in range(len(truth.poses)):
        with start(open_session, truth, row).session as session:
            track = truth.track(row)[GIVEN : GIVEN + SECOND * seconds]
            made = np.concatenate([session.step([keys]).frames for keys in track])
        first = GROUP * (GIVEN - 1) + 1
        true = truth.pictures(row, first, first + len(made))
        parts = [slice(16 * s, 16 * (s + 1)) for s in range(seconds)]
        whole = sharpness(true)  # a single second may face one flat wall
        out.append([sharpness(made[part]) / whole for part in parts])
        clips.append(made)
        note()
    return np.array(out), clips


def prompt_response(
    open_session: Open, truth: Truth, looks: Looks, note: Note
) -> tuple[Scores, list[NDArray[np.uint8]]]:
    """From nothing but a prompt, two seconds of walking: which theme do the pictures show?

    Returns the share of the four attributes recognised as asked for, and the clips.
    """
    out, clips = [], []
    for row in range(len(truth.poses)):
        with open_session(truth.prompt(row), row) as session:
            made = [session.step([frozenset()]).frames]
            made += [session.step([keys]).frames for keys in truth.track(row)[1 : 1 + 2 * SECOND]]
        clip = np.concatenate(made)
        shown = looks.recognise(clip)
        out.append(
            np.mean([a == b for a, b in zip(shown, truth.themes[row].tolist(), strict=True)])
        )
        clips.append(clip)
        note()
    return np.array(out), clips
