"""`--compile`: both passes become graphs before anything is shown or timed."""

import time
from collections.abc import Callable

import torch
from rich.console import Console

from worldsim.session import Session
from worldsim.world import World

BLOCKS = 3  # the first may be of another length, and a block is committed when the next is made


def compile_world(world: World, opened: Callable[[], Session], console: Console) -> None:
    """Compile a world, and wait for it here, on a session that nobody sees.

    Args:
        opened: opens a session like those to come.
        console: is told what the wait is for.

    Raises:
        ValueError: for quantised pages, or where this machine cannot compile.
    """
    with opened() as session:
        if session.settings.cache.quantised:
            raise ValueError(
                "--compile is for pages in full: leave it out, or the formats in "
                f"'{session.settings.cache.line()}'"
            )
    world.compile()
    with opened() as session:  # anew: its buffers lie as those of all compiled sessions do
        console.print("compiling: denoise, commit …", end=" ")
        began = time.perf_counter()
        try:
            for _ in range(BLOCKS):
                session.denoise()
            session.settle()
        except torch._dynamo.exc.TorchDynamoException as error:
            console.print("no")
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"cannot compile here ({lines[0]}): leave out --compile") from None
        console.print(f"{time.perf_counter() - began:.1f} s")
