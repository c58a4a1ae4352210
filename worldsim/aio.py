"""Blocks for code that must not wait: an iterator as an async one, on a thread of its own."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


async def asynchronous(source: Iterator[Item]) -> AsyncIterator[Item]:
    """The items of ``source``, which runs on one thread of its own, one at a time: the next item is
    begun when it is asked for. Closing it, or cancelling who waits for it, closes the source."""
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, "worldsim-stream")
    try:
        while True:
            item = await loop.run_in_executor(thread, next, source, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]  # the end has been taken out
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            thread.submit(close)  # after the item that is being made, and nobody waits for it
        thread.shutdown(wait=False)
