"""What a browser may send as a file, bounded and parsed with care."""

import io
from dataclasses import replace

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from worldsim.config import Settings
from worldsim.replay import Replay, parse_run
from worldsim.world import World

UPLOADS = ("/picture", "/run")  # how the paths end that take files
FILE_BYTES = 8 * 2**20
PIXELS = 2**23  # of a picture that is read, which takes a few bytes for each
LINES = 2**16  # of a replay file: two hours of eight blocks a second
KINDS = ("PNG", "JPEG", "WEBP")


async def body(request: Request) -> bytes:
    """A request's body.

    Raises:
        ValueError: as soon as it is too large, whatever its header says.
    """
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > FILE_BYTES:
            raise ValueError(f"a file is at most {FILE_BYTES // 2**20} MiB")
    return bytes(data)


def opening_picture(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture in a file, cut to the middle and scaled to (height, width): uint8 ``[H, W, 3]``.

    Raises:
        ValueError: for what is no picture, or too large a one.
    """
    height, width = size
    try:
        with Image.open(io.BytesIO(data), formats=KINDS) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"a picture has at most {PIXELS // 2**20} million pixels")
            whole = image.convert("RGB")
    except ValueError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"no picture that can be read: give {', '.join(KINDS)}") from None
    scale = min(whole.width / width, whole.height / height)
    across, down = width * scale, height * scale
    left, top = (whole.width - across) / 2, (whole.height - down) / 2
    box = (left, top, left + across, top + down)
    return np.asarray(whole.resize((width, height), Image.Resampling.LANCZOS, box))


def recorded(data: bytes, world: World, wanted: Settings) -> Replay:
    """The run in a replay file, straight to the end of its last branch.

    Raises:
        ValueError: for what is no such file, or one that was recorded under other settings than
            ``wanted``: the memory and the time that a player may take are counted for those.
    """
    if data.count(b"\n") > LINES:
        raise ValueError(f"a replay file has at most {LINES:,} lines")
    run = parse_run(data, "this file")
    try:
        straight = run.straight(run.newest)
    except (LookupError, TypeError, AttributeError):
        raise ValueError("this file makes no sense") from None
    replay = Replay(world, straight)
    # A run that began with a picture has that as a block of its own, which costs no more.
    own, alone = replay.settings, wanted.independent_first_frame
    if replace(own, seed=wanted.seed, independent_first_frame=alone) != wanted:
        raise ValueError(
            "this run was recorded under other settings (steps, cache, schedule or dtype): start "
            "worldsim play with the same"
        )
    if not straight.lines:
        raise ValueError("this run has no blocks")
    return replay
