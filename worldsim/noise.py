"""Noise as a pure function of (seed, block, step): no generator, no state, no order."""

import numpy as np
import torch
from torch import Tensor


def noise(seed: int, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 tensor of ``shape``, on the CPU.

    Counter-based (Philox, keyed by the seed), so that the order of execution, the number of ranks,
    pausing and forking never change it. Step 0 is a block's first noise; step s ≥ 1 is what is
    added before pass s.
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, step, block])
    return torch.from_numpy(np.random.Generator(philox).standard_normal(shape, dtype=np.float32))
