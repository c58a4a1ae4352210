"""One of two streams that are compared: a session that plays a script, and what it costs."""

from statistics import median
from typing import Any

import numpy as np

from worldsim.apps.clock import Clock
from worldsim.apps.drift import Drift
from worldsim.apps.setting import Setting
from worldsim.models.autoencoder import GROUP
from worldsim.parts import COMPUTED
from worldsim.script import Script
from worldsim.streaming.sinks import Frames
from worldsim.world import World

WARM_UP = 24  # blocks that are not timed; of a short stream a quarter


class Side:
    """Makes blocks, one by one, each part timed by itself; hands their frames out as asked.

    Attributes:
        drift: what has been handed out, looked at.
        made: pictures made so far.
    """

    def __init__(self, setting: Setting, world: World, script: Script, seed: int) -> None:
        self.setting = setting
        self.world = world
        self.session = setting.session(world, script.prompt(0), seed)
        self.drift = Drift(world.config.fps)
        self.made = 0
        self._script = script
        self._clock = Clock(world.device, {part: [] for part in COMPUTED})
        self._waiting: Frames = np.empty((0, world.config.height, world.config.width, 3), np.uint8)

    def step(self) -> None:
        """Make the next block; what comes before the next block is its own work, as in a stream."""
        session = self.session
        keys = session.follow(self._script)
        with self._clock.timed("commit"):
            if not session.fuses:  # else it is part of the first step
                session.settle()
        with self._clock.timed("denoise"):
            block = session.denoise(keys)
        with self._clock.timed("decode"):
            session.decode(block)
        self._waiting = np.concatenate([self._waiting, block.frames])
        self.made += len(block.frames)

    def take(self, count: int) -> Frames:
        """The next ``count`` frames, uint8 ``[count, H, W, 3]``."""
        frames, self._waiting = np.split(self._waiting, [count])
        self.drift.add(frames)
        return frames

    def figures(self) -> dict[str, Any]:
        """The setting, and what it cost: median milliseconds of a block by part, pictures per
        second of that, bytes; drift. None is what a stream is too short for.
        """
        settings = self.session.settings
        spent = self._clock.ms
        blocks = len(spent["denoise"])
        timed = blocks - max(1, min(WARM_UP, blocks // 4))
        ms = {part: median(times[-timed:]) for part, times in spent.items()} if timed > 0 else {}
        whole = zip(*(times[-timed:] for times in spent.values()), strict=True)
        pictures = GROUP * self.world.config.block_frames
        return {
            "setting": str(self.setting),
            "world": self.setting.world,
            "steps": list(settings.schedule.steps),
            "sampler": settings.sampler,
            "cache": settings.cache.line(),
            "dtype": settings.dtype,
            "ms": ms or None,
            "fps": 1e3 * pictures / median(map(sum, whole)) if ms else None,
            "timed_blocks": max(0, timed),
            "bytes": self.session.memory_report().figures(),
            "drift": self.drift.figures(),
        }
