"""Where frames go: one small protocol, opened by the name of the target.

    with open_sink("out.mp4", fps=16, scale=4) as sink:
        sink.write(block.frames)

A target is checked when it is opened; nothing is written, and nothing overwritten, before the first
frame. Knows nothing of worlds or threads: `pipeline.Writer` puts a sink on a thread of its own.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Frames: TypeAlias = npt.NDArray[np.uint8]

TARGETS = "out.mp4, out.gif, out.webp, frames/ or frames/%05d.png (PNG), or - (raw RGB24 to stdout)"


class SinkClosed(Exception):
    """The reader went away (a closed pipe): nobody watches, so stop. Not a failure."""


class Sink(Protocol):
    """Takes blocks of frames, in order; complete once closed."""

    def write(self, frames: Frames) -> None:
        """Takes uint8 [n, height, width, 3], one size throughout."""

    def close(self) -> None:
        """Finishes the target; a second call does nothing."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, *raised: object) -> None: ...


def open_sink(target: str | Path, fps: float, scale: int = 1, keep: int = 0) -> Sink:
    """Opens a sink for `target`: .mp4, .gif, .webp, 'frames/', 'frames/%05d.png' or '-'.

    `fps` is the playing speed in frames per second (PNG and raw frames carry none). `scale` repeats
    every pixel scale x scale times, so that small worlds can be seen. An MP4 plays up to its last
    second even if the process is killed; GIF and WebP appear under their name at close. An MP4 that
    is there already may `keep` its first pictures, and go on after them.

    Raises ValueError for a target, fps or scale that cannot be, OSError for a target that cannot be
    written; one line each.
    """
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps is {fps}: give frames per second, from 0.01 to 1000")
    if scale < 1:
        raise ValueError(f"scale is {scale}: give a whole number, 1 or more")
    name = str(target)
    if name == "-":
        return RawSink(sys.stdout.fileno(), scale)
    if name.endswith(("/", os.sep)):
        return PngSink(Path(name) / "%05d.png", scale)
    path = Path(name)
    if path.is_dir():
        raise OSError(f"{name!r} is a folder: add a slash for PNG frames in it, or a file name")
    if path.suffix.lower() == ".png":
        return PngSink(path, scale)

    from worldsim.streaming.video_sinks import FORMATS, VideoSink  # loads PyAV: only when needed

    if path.suffix.lower() in FORMATS:
        return VideoSink(path, fps, scale, keep)
    raise ValueError(f"cannot tell what to write to {name!r}: name it like {TARGETS}")


class FrameSink:
    """What all sinks share: check, enlarge, open at the first frame, close once, say errors."""

    def __init__(self, target: str, scale: int) -> None:
        self._target = target
        self._scale = scale
        self._size: tuple[int, int] | None = None  # (height, width) as given; None until a frame
        self._failed = False
        self._closed = False

    def write(self, frames: Frames) -> None:
        """Writes uint8 [n, height, width, 3].

        Raises ValueError for other frames or another size than before, OSError when the target
        cannot take them (in one line), SinkClosed when its reader went away.
        """
        if self._closed:
            raise ValueError(f"{self._target} is closed")
        size = frame_size(frames, self._size)
        if not len(frames):
            return
        try:
            with plain_errors(self._target):
                if self._size is None:
                    self._open(size[0] * self._scale, size[1] * self._scale)
                    self._size = size
                for frame in frames:
                    self._add(enlarged(frame, self._scale))
                self._flush()
        except OSError:
            self._failed = True
            raise

    def close(self) -> None:
        """Finishes the target; does nothing if no frame came, or the second time."""
        if self._closed:
            return
        self._closed = True
        if self._size is not None:
            with plain_errors(self._target):
                self._finish(complete=not self._failed)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # what a kind of sink fills in

    def _open(self, height: int, width: int) -> None:
        """Begins the target, whose frames have this size."""

    def _add(self, frame: Frames) -> None:
        """Writes one frame uint8 [height, width, 3], contiguous."""
        raise NotImplementedError

    def _flush(self) -> None:
        """Lets the frames so far reach their reader."""

    def _finish(self, complete: bool) -> None:
        """Ends the target; not `complete` after a failed write."""


class PngSink(FrameSink):
    """Numbered PNG files; frames of an earlier run with higher numbers stay where they are."""

    def __init__(self, pattern: Path, scale: int = 1) -> None:
        if "%" in str(pattern.parent) or not re.fullmatch(r"[^%]*%\d*d[^%]*", pattern.name):
            raise ValueError(f"{str(pattern)!r} has no number: name it like frames/%05d.png")
        check_writable(Path(str(pattern) % 0))
        super().__init__(str(pattern), scale)
        self._count = 0

    def _add(self, frame: Frames) -> None:
        import imageio.v3 as imageio

        png = imageio.imwrite("<bytes>", frame, plugin="pillow", extension=".png", compress_level=1)
        Path(self._target % self._count).write_bytes(png)  # imageio would trip over a full disk
        self._count += 1


class RawSink(FrameSink):
    """RGB24 bytes, frame after frame, to a file descriptor; it stays open."""

    def __init__(self, descriptor: int, scale: int = 1) -> None:
        if os.isatty(descriptor):
            raise ValueError("'-' writes raw RGB24 frames: pipe them somewhere, not to a terminal")
        super().__init__("raw frames", scale)
        self._descriptor = descriptor

    def _add(self, frame: Frames) -> None:
        # not through sys.stdout: what it cannot deliver it would try again, and fail, at exit
        rest = frame.data.cast("B")
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def frame_size(frames: Frames, expected: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of uint8 [n, height, width, 3]; ValueError for others, or if unexpected."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [n, h, w, 3]")
    size = (frames.shape[1], frames.shape[2])
    if expected is not None and size != expected:
        raise ValueError(f"frames change from {expected} to {size} pixels (height, width)")
    return size


def enlarged(frame: Frames, scale: int) -> Frames:
    """uint8 [h, w, 3] -> [h * scale, w * scale, 3], contiguous: every pixel repeated."""
    if scale == 1:
        return np.ascontiguousarray(frame)
    return frame.repeat(scale, axis=1).repeat(scale, axis=0)  # rows last: whole rows are copied


def check_writable(path: Path) -> None:
    """Raises OSError, in one line, unless a file can be written at `path`; leaves none behind."""
    folder = path.parent
    if not folder.is_dir():
        raise OSError(f"cannot write {path}: there is no folder {folder} (mkdir -p {folder})")
    with plain_errors(str(path)):
        try:
            with path.open("xb"):
                pass
        except FileExistsError:
            with path.open("ab"):  # appending nothing: the file that is there keeps its bytes
                pass
        else:
            path.unlink()


@contextmanager
def plain_errors(target: str) -> Iterator[None]:
    """Turns the OSErrors of writing to `target` into one line; a broken pipe into SinkClosed."""
    try:
        yield
    except BrokenPipeError as error:
        raise SinkClosed(f"{target}: the reader has closed the pipe") from error
    except OSError as error:
        line = f"cannot write {target}: {error.strerror or error}: make room or name another target"
        raise OSError(line) from error
