"""What this process takes of the memory, as the system counts it."""

import os
import sys
from pathlib import Path

import torch

MIB = 2**20


def resident_mib() -> float:
    """Now; where the system does not say, the most so far, which shows growth as well."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    return peak_mib(torch.device("cpu"))


def peak_mib(device: torch.device) -> float:
    """The most so far: of the process, or of what torch has on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)
