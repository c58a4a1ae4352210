"""A block in float32 beside the same block in bfloat16, in turns: both meet the same machine."""

import statistics
import time
from contextlib import ExitStack
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track

from worldsim.apps.setting import Setting
from worldsim.session import Session

DTYPES = ("float32", "bfloat16")


def dtype_times(setting: Setting, warm_up: int, blocks: int) -> dict[str, float]:
    """Milliseconds of denoising and committing a block on a CPU in each dtype, median; on as many
    threads as there are now."""
    threads = torch.get_num_threads()
    ms: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    with ExitStack() as stack:
        worlds = {kind: replace(setting, dtype=kind).open("cpu", threads) for kind in DTYPES}
        opened = {d: stack.enter_context(setting.session(world)) for d, world in worlds.items()}
        for i in track(range(warm_up + blocks), "dtypes", console=Console(stderr=True)):
            for dtype, session in opened.items():
                taken = _block(session)
                ms[dtype] += [taken] if i >= warm_up else []
    return {dtype: statistics.median(taken) for dtype, taken in ms.items()}


def _block(session: Session) -> float:
    began = time.perf_counter()
    session.settle()
    session.denoise()
    return 1e3 * (time.perf_counter() - began)
