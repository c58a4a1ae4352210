"""What to do where memory ends, in one line; knows torch's words for it, and loads no torch."""

import re

# Of CUDA's allocator, of the CPU's, of cuBLAS and cuDNN; they come as several types of error.
WORDS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")


def advice(error: Exception) -> str | None:
    """What can be changed; None for an error that says something else."""
    said = str(error)
    if not isinstance(error, MemoryError) and not any(word in said for word in WORDS):
        return None
    wanted = re.search(r"tried to allocate ([\d.]+) (\w+)", said, re.IGNORECASE)
    room = ""
    if wanted is not None:
        size, unit = float(wanted[1]), wanted[2]
        room = f" (no room for {size:g} {unit})"
        if unit == "bytes":
            room = f" (no room for {size / 2**30:.2f} GiB)"
    return (
        f"out of memory{room}: take a shorter window (--cache recent=6), pages in int8 "
        "(--cache recent=9:int8), --dtype bfloat16, or a smaller world; `worldsim doctor` tells "
        "how much there is"
    )
