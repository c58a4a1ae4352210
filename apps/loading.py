"""Loading what a command runs, once it is asked for."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from worldsim.streaming.processes import context


@contextmanager
def loading(ranks: int | None = None) -> Iterator[None]:
    """Import without collecting garbage: what torch makes while it loads stays for good, and
    walking through it again and again is a sixth of the time until the first picture. What several
    ``ranks`` load is loaded beside it.
    """
    if ranks is not None and ranks > 1 and "RANK" not in os.environ:  # torchrun has started them
        context()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
