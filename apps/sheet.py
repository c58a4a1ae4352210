"""`worldsim sheet`: a contact sheet of the maze simulator."""

from pathlib import Path

from worldsim.maze.sheet import world_sheet
from worldsim.streaming.sinks import check_writable

PICTURES_PER_SECOND = 16
SHOWN = 14  # pictures in a row


def run(out: Path, seed: int, rows: int, seconds: float, height: int, width: int) -> None:
    """Render ``rows`` walks of ``seconds`` and write them as one PNG.

    Raises:
        ValueError, OSError: for sizes that cannot be, or a file that cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"a sheet is a PNG file, got {str(out)!r}")
    if rows < 1 or not 0 < seconds <= 600:
        raise ValueError("a sheet needs at least one row and 0–600 seconds")
    check_writable(out)
    latents = 1 + round(seconds * PICTURES_PER_SECOND / 4)
    every = max(1, 4 * (latents - 1) // SHOWN)
    world_sheet(range(seed, seed + rows), latents, height, width, every).save(out)
