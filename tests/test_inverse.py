"""Motion from pictures: what true poses are called, and what little learning makes of clips."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from worldsim.maze.inverse import Inverse, labels, learn_inverse
from worldsim.maze.layout import SIZE
from worldsim.maze.simulator import KEYS, PICTURES_PER_LATENT, maps, trajectory
from worldsim.maze.truth import Truth, held_out

SHAPE = (24, 32)  # no square: a mixed-up axis shows


@pytest.fixture(scope="module")
def inverse() -> Inverse:
    return learn_inverse(SHAPE, 1)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return held_out(48, 13, SHAPE)


def poses(start: tuple[float, float, float], *held: str) -> Tensor:
    """Poses under the keys of each latent frame, ``[1 + 4·N, 3]``, on an open plain."""
    mazes = maps([0])
    mazes.walls[:] = False
    keys = torch.tensor([[key.removeprefix("Key") in names for key in KEYS] for names in held])
    rest = torch.zeros(1, len(KEYS), dtype=torch.bool)
    return trajectory(mazes, torch.tensor([start]), torch.cat((rest, keys))[None])[0]


def test_labels_name_turns_and_steps() -> None:
    held = ("", "W", "S", "J", "L", "WJ", "SL", "D")
    moved, clear = labels(poses((8.0, 8.0, 0.3), *held))
    expected = [[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0], [-1, 1], [1, -1], [0, 0]]
    assert moved.tolist() == expected
    assert clear.all()


@pytest.mark.parametrize("heading", [0.0, 1.0, math.pi, 5.0])
def test_labels_hold_across_the_edges_of_a_map(heading: float) -> None:
    for x, y in ((0.05, 0.05), (SIZE - 0.05, 0.05), (0.05, SIZE - 0.05)):
        assert labels(poses((x, y, heading), "W"))[0].tolist() == [[0, 1]]
        assert labels(poses((x, y, heading), "S"))[0].tolist() == [[0, -1]]
    for start in (0.01, 2 * math.pi - 0.01):
        assert labels(poses((8.0, 8.0, start), "J", "L"))[0].tolist() == [[-1, 0], [1, 0]]


@pytest.mark.parametrize(("steps", "moved", "clear"), [(1, 0, True), (2, 0, False), (3, 1, True)])
def test_a_motion_cut_short_by_a_wall_counts_by_its_length(
    steps: int, moved: int, clear: bool
) -> None:
    walked = poses((8.0, 8.0, 0.0), "W")
    walked[steps:] = walked[steps].clone()
    found, certain = labels(walked)
    assert certain.tolist() == [[True, clear]]
    assert not clear or found.tolist() == [[0, moved]]


def test_motion_is_read_off_other_maps(inverse: Inverse, truth: Truth) -> None:
    moved, clear = labels(truth.poses)
    read = np.stack([inverse.recover(truth.pictures(row)) for row in range(len(moved))])
    right = (read == moved) & clear
    assert (right.sum((0, 1)) / clear.sum((0, 1)) > 0.9).all()
    for way in (-1, 0, 1):  # none is right by being common; chance is a third
        shown = clear & (moved == way)
        assert (shown.sum((0, 1)) >= 5).all()
        assert ((right & shown).sum((0, 1)) / shown.sum((0, 1)) > 0.7).all()
    assert min(inverse.accuracy) > 0.9


def test_a_clip_run_backwards_moves_the_other_way(inverse: Inverse, truth: Truth) -> None:
    clips = [truth.pictures(row) for row in range(len(truth.poses))]
    forwards = np.stack([inverse.recover(clip) for clip in clips])
    backwards = np.stack([inverse.recover(clip.flip(0)) for clip in clips])[:, ::-1]
    assert (forwards == -backwards).mean() > 0.95


def test_a_frozen_clip_does_not_move(inverse: Inverse, truth: Truth) -> None:
    for row in range(len(truth.poses)):
        frozen = truth.pictures(row, 0, 1).expand(1 + PICTURES_PER_LATENT, -1, -1, -1)
        assert inverse.recover(frozen.numpy()).tolist() == [[0, 0]]


def test_learning_is_deterministic_and_leaves_random_numbers_alone(inverse: Inverse) -> None:
    before = torch.get_rng_state()
    again = learn_inverse(SHAPE, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.accuracy == inverse.accuracy
    for a, b in zip(inverse.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(), (5,), (4, 24, 32, 3), (1, 24, 32, 3), (5, 32, 24, 3)])
def test_other_shapes_are_refused_in_one_line(inverse: Inverse, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^motion is recovered from pictures .*24, 32, 3.*$") as e:
        inverse.recover(np.zeros(shape, dtype=np.uint8))
    assert "\n" not in str(e.value)
