"""The parts of a block's work: each is timed, and has a name where a profiler looks on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch.autograd import profiler

COMPUTED = ("denoise", "commit", "decode")  # the model's work
PARTS = (*COMPUTED, "encode")  # the last is the sink's


@contextmanager
def part(name: str, block: int, timings: dict[str, float]) -> Iterator[None]:
    """Note the seconds of what is done inside as ``timings[name]``.

    A running profiler sees it as the region ``denoise block 12``; without one there is no region.
    Waits for no device: on one that works on its own, these are the seconds of giving it the work.
    """
    seen = profiler._is_profiler_enabled  # on any thread, unlike torch's public question
    with profiler.record_function(f"{name} block {block}") if seen else nullcontext():
        began = time.perf_counter()
        yield
        timings[name] = time.perf_counter() - began
