"""What is asked for and done becomes the tensors that a block is made under."""

from collections.abc import Sequence

import numpy as np
import torch

from worldsim.actions import ActionSpec
from worldsim.cache.policy import Pose
from worldsim.controls import ControlState
from worldsim.models.transformer import Conditioning
from worldsim.state import Asked


def conditioning(
    asked: Asked,
    spec: ActionSpec | None,
    controls: Sequence[ControlState],
    start: Pose,
    columns: int,
    rows: int,
    device: torch.device,
) -> tuple[Conditioning, tuple[Pose, ...]]:
    """The conditioning of a block, and the poses at the end of each frame that its controls lead to
    from ``start``, where there are any.

    Args:
        spec: what the world makes of controls; None where it has none.
        controls: of each latent frame.
        columns: of tokens in a frame, each of which looks along a ray of its own.
        rows: that all are made under these controls.
    """
    if spec is None:
        return Conditioning(asked.keys, asked.values), ()
    told = spec.encode(controls, np.array(start), columns)
    actions, rays = (
        torch.from_numpy(x)[None].to(device).expand(rows, *x.shape)
        for x in (told.actions, told.rays)
    )
    poses = tuple(tuple(pose) for pose in told.poses.tolist())
    return Conditioning(asked.keys, asked.values, actions=actions, rays=rays), poses
