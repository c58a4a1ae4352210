"""Training's own attention equals the masked attention over the whole clip."""

import numpy as np
import torch

from worldsim.maze.dit_stage import earlier_frames
from worldsim.maze.two_copies import TwoCopies
from worldsim.models.context import ClipContext


def test_two_copies_equal_one_masked_square() -> None:
    frames, grid, head_dim = 5, (2, 3), 12
    window = np.array([5, 2, 1])
    seen = earlier_frames(frames, window)
    own = torch.eye(frames, dtype=torch.bool).expand_as(seen)
    visible = torch.cat(
        (torch.cat((seen | own, torch.zeros_like(seen)), 2), torch.cat((seen, own), 2)), 1
    )
    square = ClipContext(visible, torch.arange(frames).repeat(2), grid, head_dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 60, head_dim, generator=generator) for _ in range(3))
    ours = TwoCopies(seen, grid, head_dim).attend(0, q, k, v)
    assert torch.allclose(ours, square.attend(0, q, k, v), atol=1e-5)


def test_a_frame_sees_only_the_window_before_it() -> None:
    seen = earlier_frames(4, np.array([2]))[0]
    assert seen.tolist() == [
        [False, False, False, False],
        [True, False, False, False],
        [True, True, False, False],
        [False, True, True, False],
    ]
