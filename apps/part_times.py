"""Milliseconds of a block by part, one part after the other, each beside its roofline.

A block's parts and its roofline are timed in turns, so that both meet the same machine: whatever
else it does falls on both sides of the ratio.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from worldsim.apps.clock import Clock
from worldsim.apps.opening import shown_scale
from worldsim.apps.roofline import Roofline
from worldsim.apps.setting import Setting
from worldsim.controls import ControlState
from worldsim.parts import COMPUTED, PARTS
from worldsim.streaming.sinks import open_sink
from worldsim.world import World


@dataclass(frozen=True)
class PartTimes:
    """Milliseconds of every timed block by part, of the roofline, and its operations.

    Attributes:
        flops: floating-point operations that the roofline of a part counts, for one block.
        pictures: frames of a block.
        gemm: operations a second of the fastest of its products; 0 where none was timed.
    """

    ms: dict[str, list[float]]
    roofline_ms: dict[str, list[float]]
    flops: dict[str, int]
    pictures: int
    gemm: float


def time_parts(world: World, setting: Setting, warm_up: int, blocks: int) -> PartTimes:
    """Time ``blocks`` blocks by part; the last of ``warm_up`` blocks tells what the roofline is.

    The world's own controls play; where a block has several latent frames it holds one of them.
    """
    assert warm_up > 1, "a block that is recorded commits the block before"
    script = world.actions.parse(world.config.controls) or (ControlState(),)
    measured, alone, roofline = Clock(world.device), Clock(world.device), Roofline()
    pictures = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        open_sink(Path(folder, "bench.mp4"), world.config.fps, shown_scale(world)) as sink,
        setting.session(world) as session,
    ):
        count = warm_up + blocks
        for i in track(range(count), "parts", console=Console(stderr=True)):
            session.control(state=script[i % len(script)])
            look = roofline.record if i == warm_up - 1 else measured.timed
            with look("commit"):
                if not session.fuses:  # else it is part of the first step
                    session.settle()
            with look("denoise"):
                block = session.denoise()
            with look("decode"):
                session.decode(block)
            with look("encode"):
                sink.write(block.frames)
            for part in COMPUTED if i >= warm_up else ():
                with alone.timed(part):
                    roofline.run(part)
            pictures = len(block.frames)
            if i == warm_up - 1:
                roofline.sharpen()
    return PartTimes(
        {part: measured.ms[part][-blocks:] for part in PARTS},
        alone.ms,
        {part: roofline.flops(part) for part in COMPUTED},
        pictures,
        roofline.gemm,
    )
