"""Films of what a player saw, and where they may be fetched."""

from contextlib import suppress
from pathlib import Path

from worldsim.streaming.pipeline import Writer
from worldsim.streaming.sinks import Frames, open_sink

LONGEST = 600.0  # seconds


class Recording:
    """One film at a time, in a folder of its own; a new one replaces the last.

    Attributes:
        path: of the newest film; it plays while it is still being written.
    """

    def __init__(self, path: Path, fps: float, scale: int = 1) -> None:
        self.path = path
        self._fps, self._scale = fps, scale
        self._writer: Writer | None = None
        self._pictures = 0

    @property
    def on(self) -> bool:
        return self._writer is not None

    def start(self) -> None:
        """Begin a film with the next picture."""
        self.stop()
        self._writer = Writer(open_sink(self.path, self._fps, self._scale))
        self._pictures = 0

    def write(self, frames: Frames) -> None:
        """Pictures uint8 ``[n, H, W, 3]``; nothing happens where no film is being made.

        Raises:
            OSError, ValueError: in one line; the film ends there, and plays up to there.
        """
        if self._writer is None:
            return
        self._pictures += len(frames)
        try:
            self._writer.write(frames)
        except BaseException:
            self._abandon()
            raise
        if self._pictures > LONGEST * self._fps:
            self.stop()
            raise ValueError(f"a film is at most {LONGEST / 60:.0f} minutes long")

    def stop(self) -> None:
        """Finish the film."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def close(self) -> None:
        """Finish and forget the film."""
        try:
            self.stop()
        finally:
            self.path.unlink(missing_ok=True)

    def _abandon(self) -> None:
        writer, self._writer = self._writer, None
        assert writer is not None
        with suppress(OSError, ValueError):  # it is being told already
            writer.close()
