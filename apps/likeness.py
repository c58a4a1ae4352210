"""How alike two streams of one script are, second by second."""

from typing import Any

import numpy as np

from worldsim import metrics
from worldsim.streaming.sinks import Frames


class Likeness:
    """Takes the frames of two streams as they come; keeps those of one second.

    Attributes:
        seconds: ``second`` (where it ends), ``psnr`` and ``ssim`` of each second; the last one may
            be shorter.
        pictures: pairs taken so far.
        differs: number of the first picture in which the two are not the same, None so far.
    """

    def __init__(self, fps: float) -> None:
        self.seconds: list[dict[str, Any]] = []
        self.pictures = 0
        self.differs: int | None = None
        self._fps = fps
        self._second = max(1, round(fps))  # pictures
        self._held: list[tuple[Frames, Frames]] = []  # one picture of each

    def add(self, left: Frames, right: Frames) -> None:
        """Takes the next frames of both, uint8 ``[n, H, W, 3]`` each."""
        for pair in zip(left, right, strict=True):
            if self.differs is None and not np.array_equal(*pair):
                self.differs = self.pictures
            self.pictures += 1
            self._held.append(pair)
            if len(self._held) == self._second:
                self.finish()

    def finish(self) -> None:
        """Measures the second that has begun, as long as it is."""
        if not self._held:
            return
        left, right = (np.stack(clip) for clip in zip(*self._held, strict=True))
        self._held.clear()
        self.seconds.append({
            "second": round(self.pictures / self._fps, 3),
            "psnr": metrics.psnr(left, right),
            "ssim": metrics.ssim(left, right),
        })  # fmt: skip
