"""Which frames of a walk a clip of stage three is made of."""

import numpy as np
import torch

from worldsim.maze.clips import REMEMBERED, Clips, alike

FRAMES, LENGTH, SIDE = 8, 60, 16


def walk_there_and_back() -> torch.Tensor:
    """One walk along x: away from its start for half of the time, then back, ``[1, N, 3]``."""
    away = torch.minimum(torch.arange(LENGTH), LENGTH - 1 - torch.arange(LENGTH)) * 0.4
    return torch.stack((away, torch.zeros(LENGTH), torch.zeros(LENGTH)), dim=-1)[None]


def themes(change: int | None = None) -> torch.Tensor:
    track = torch.zeros(1, LENGTH, 4, dtype=torch.long)
    if change is not None:
        track[:, change:, 1] = 2
    return track


def test_views_are_alike_by_pose_across_the_seam_of_the_torus() -> None:
    poses = np.array([[[0.1, 3, 0.05], [15.9, 3, 2 * np.pi - 0.05], [8, 3, 0.05], [0.1, 3, 3.1]]])
    score = alike(poses.astype(np.float32), SIDE)[0]
    assert np.allclose(score, score.T) and np.allclose(np.diag(score), 1)
    assert score[0, 1] > 0.8 and score[0, 2] < 1e-3 and score[0, 3] < 1e-3


def test_a_returning_clip_ends_where_it_shows_what_is_remembered() -> None:
    clips = Clips(walk_there_and_back(), themes(), FRAMES, SIDE, 0.55, 0.2)
    random = np.random.default_rng(0)
    drawn = [clip for clip in (clips.draw(random) for _ in range(200)) if clip.remembered]
    assert len(drawn) > 80
    for clip in drawn:
        assert clip.remembered <= FRAMES // REMEMBERED and len(clip.frames) == FRAMES
        assert (np.diff(clip.frames) > 0).all(), "frames come in the order of time, each once"
        assert (np.diff(clip.frames[clip.remembered :]) == 1).all()
    late = [clip.frames[-1] > LENGTH - 12 for clip in drawn]
    assert np.mean(late) > 0.8, "this walk returns to its start at its very end"


def test_a_switching_clip_holds_the_change() -> None:
    clips = Clips(walk_there_and_back(), themes(change=30), FRAMES, SIDE, 0.55, 0.2)
    random = np.random.default_rng(1)
    runs = [clip.frames for clip in (clips.draw(random) for _ in range(300)) if not clip.remembered]
    holding = [frames[0] < 30 <= frames[-1] for frames in runs]
    # A share of 0.2 of all clips is drawn for it; of plain stretches one in eight holds it, too.
    assert np.mean(holding) > 0.4


def test_clips_are_a_pure_function_of_the_generator() -> None:
    clips = Clips(walk_there_and_back(), themes(20), FRAMES, SIDE, 0.55, 0.2)
    a, b = ([clips.draw(np.random.default_rng(7)) for _ in range(20)] for _ in range(2))
    assert all(np.array_equal(x.frames, y.frames) for x, y in zip(a, b, strict=True))
