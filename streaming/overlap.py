"""A stream through its stages at once: blocks are denoised, decoded and written side by side."""

import contextlib
from collections.abc import Generator, Iterator

from worldsim.state import Block
from worldsim.streaming.pipeline import Writer, prefetch
from worldsim.world import World


def overlapped(
    world: World, blocks: Iterator[Block], writer: Writer, pictures: int | None = None
) -> Generator[Block, None, None]:
    """Yields each block once its frames are handed to ``writer``; decodes on the caller's thread.

    Args:
        blocks: of a stream that does not decode (``world.stream(…, decoding=False)``); they are
            made on a thread of their own, which is gone when the generator is closed.
        pictures: frames to write in all; those of the last block beyond them are cut off.
    """
    written = 0
    with contextlib.closing(prefetch(blocks)) as ahead:
        for block in world.decoded(ahead):
            if pictures is not None:
                block.frames = block.frames[: pictures - written]
            writer.write(block.frames)
            written += len(block.frames)
            yield block
