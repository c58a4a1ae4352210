"""How a stream's looks change from its beginning to its end; needs no ground truth."""

from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldsim import metrics
from worldsim.streaming.sinks import Frames

ENDS = 10.0  # seconds at each end of a long stream; a shorter one has a tenth at each end
PARTS = 10  # equal parts of a stream for its Video Drift Error


class Drift:
    """Takes a stream's frames as they come; keeps only those of its two ends.

    Attributes:
        sharpness: of each picture.
        motion: of each picture but the first, against the one before.
    """

    def __init__(self, fps: float) -> None:
        self.sharpness: list[float] = []
        self.motion: list[float] = []
        self._fps = fps
        self._most = max(1, round(ENDS * fps))
        self._head: list[NDArray[np.uint8]] = []
        self._tail: deque[NDArray[np.uint8]] = deque(maxlen=self._most)

    def add(self, frames: Frames) -> None:
        """Takes the next frames, uint8 ``[n, H, W, 3]``."""
        for picture in frames:
            self.sharpness.append(metrics.sharpness(picture[None]))
            if self._tail:
                self.motion.append(metrics.motion(np.stack([self._tail[-1], picture])))
            self._tail.append(picture)
            if len(self._head) < self._most:
                self._head.append(picture)

    @property
    def ends(self) -> int:
        """Pictures of the beginning, and of the end, that are set against each other."""
        made = len(self.sharpness)
        return self._most if made >= 2 * self._most else max(1, made // 10)

    def by_second(self) -> list[dict[str, float | None]]:
        """Sharpness and motion of each second; the last one may be shorter."""
        size = max(1, round(self._fps))
        return [
            {
                "sharpness": fmean(self.sharpness[first : first + size]),
                "motion": _mean(self.motion[max(0, first - 1) : first + size - 1]),
            }
            for first in range(0, len(self.sharpness), size)
        ]

    def figures(self) -> dict[str, Any]:
        """``ends`` in seconds, sharpness and motion of the first and the last of them, the colour
        distance between them, and the Video Drift Error of sharpness. None is what a stream is too
        short for, or too flat.
        """
        count = self.ends
        head, tail = self._head[:count], list(self._tail)[-count:]
        return {
            "ends_s": count / self._fps,
            "sharpness": _first_last(self.sharpness, count),
            "motion": _first_last(self.motion, count),
            "colour": metrics.colour_distance(np.stack(head), np.stack(tail)) if head else None,
            "vde": _vde(self.sharpness),
        }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _first_last(values: Sequence[float], count: int) -> list[float] | None:
    return [fmean(values[:count]), fmean(values[-count:])] if values else None


def _vde(values: Sequence[float]) -> float | None:
    size = len(values) // PARTS  # what is left over at the end is not looked at
    if not size:
        return None
    parts = [fmean(values[i * size : (i + 1) * size]) for i in range(PARTS)]
    return metrics.vde(parts) if parts[0] > 0 else None
