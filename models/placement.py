"""Where the tokens of the context's pages are read: (t, h, w) of each, before any rotation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worldsim.cache.config import POOLED
from worldsim.cache.policy import Read
from worldsim.cache.pool import PagePool
from worldsim.models.rope import token_positions


def placement(reads: Sequence[Read], pool: PagePool) -> Tensor:
    """Of some pages of one kind, side by side: float64 ``[tokens, 3]``."""
    span = reads[0].entry.span
    times = torch.tensor([read.position for read in reads], dtype=torch.float64)
    if span == 1:
        return token_positions(times, *pool.shape.grid)
    # The middle of what a patch stands for; at an odd edge it is smaller.
    patches = [torch.arange(side, dtype=torch.float64).split(POOLED) for side in pool.shape.grid]
    height, width = (torch.stack([patch.mean() for patch in axis]) for axis in patches)
    time = times + (span - 1) / 2
    return torch.stack(torch.meshgrid(time, height, width, indexing="ij"), -1).reshape(-1, 3)


def placed(read: Read, pool: PagePool, layer: int) -> Tensor:
    """Of a placed page in one layer: each token at its own frame, or in their order from
    ``read.position`` on, as many to a frame as a frame has. float64 ``[tokens, 3]``."""
    per_frame, (_, width) = pool.shape.tokens, pool.shape.grid
    places = pool.places(read.entry.page)[layer, : read.entry.tokens]
    # On the pool's device: a pass asks for them, and no pass waits for a device.
    frame, token = places // per_frame, places % per_frame
    if not read.own:
        frame = torch.arange(len(places), device=places.device) // per_frame
    at = (frame + read.position, token // width, token % width)
    return torch.stack([x.to(torch.float64) for x in at], dim=-1)
