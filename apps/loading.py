"""Loading what a command runs, once it is asked for."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Import without collecting garbage: what torch makes while it loads stays for good, and
    walking through it again and again is a sixth of the time until the first picture.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
