"""What the context itself costs a block on the host, beside the model's work."""

import statistics

from worldsim.apps.clock import Clock
from worldsim.apps.setting import Setting
from worldsim.world import World


def cache_times(world: World, setting: Setting, warm_up: int, blocks: int) -> dict[str, float]:
    """Median milliseconds of a block of a full context: ``gather`` (plan, and bring rotated copies
    up to date) and ``publish`` (stage pages and commit them, mid forms included)."""
    clock = Clock(world.device)
    with setting.session(world) as session:
        frames = world.config.block_frames
        for block in range(warm_up + blocks):
            session.settle()
            if block >= warm_up:
                # The newest commit once more: its keys are still staged in the view.
                newest, start = session.block - 1, session.frame - frames
                level = session.settings.schedule.commit_cell(newest).level
                session.context.abort(newest)
                rows = range(start, start + frames)
                poses = [session.pose] * frames
                with clock.timed("publish"):
                    staged = session.view.staged(frames)
                    session.context.stage(newest, level, rows, *staged, poses=poses)
                    session.context.commit(newest, level)
                with clock.timed("gather"):
                    session.view.prepare(session.frame, frames, poses[-1])
            session.denoise()
    return {name: statistics.median(times) for name, times in clock.ms.items()}
