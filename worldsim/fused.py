"""A block's context pass and the next one's first cell, run as the rows of one pass.

Equal to the two, but for the rounding of products of more rows: none on a CPU. When that may be is
`worldsim.maker.Maker.fuses`.
"""

import torch
from torch import Tensor

from worldsim.models.view import ContextView
from worldsim.rollout import Making, Pass, ours, side_by_side, stage, timesteps
from worldsim.schedule import Cell
from worldsim.state import Made


def fused(
    run: Pass, passing: Cell, made: Made, cell: Cell, making: Making, view: ContextView
) -> Tensor | None:
    """Run both cells and stage what the first one leaves behind; nothing is committed.

    Args:
        run: the model's fused pass.
        passing, made: the context pass, and the finished block that it is of.
        cell, making: the first cell of the next one.
        view: what both read; it is prepared for the finished block, and then for the next one.

    Returns:
        what `Making.take` takes; None where the view's buffers would have to grow.
    """
    block, context = made.block, view.context
    frames = range(block.start, making.start)
    try:
        table = context.foresee(block.index, passing.level, frames, made.poses)
        ahead = view.ahead(table, frames, making.poses[-1] if making.poses else None)
        if ahead is None:
            return None
        finished = ours(block.latents)
        noisy, level = making.rows(cell, 1)
        flow: Tensor = run(
            torch.cat((finished, noisy)),
            torch.cat((timesteps(passing, finished), level)),
            side_by_side([made.conditioning, making.conditioning]),
            [view, ahead],
        )
        stage(passing, block.start, made.poses, [view], [view], len(frames))
    except BaseException:  # the context pass can yet be run alone
        context.abort(block.index)
        view.prepare(block.start, len(frames), made.poses[-1] if made.poses else None)
        raise
    ahead.take_over()
    return flow
