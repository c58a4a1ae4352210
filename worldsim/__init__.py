"""worldsim: an autoregressive block-diffusion video model as a live, controllable world.

The public names load on first use, so that importing one small module never pulls in the rest.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldsim.session import Session
    from worldsim.state import Block
    from worldsim.world import World

_HOME = {
    "World": "worldsim.world",
    "Session": "worldsim.session",
    "Block": "worldsim.state",
}

__all__ = ["Block", "Session", "World"]

# One seed, one result, on any number of threads: on Intel's processors MKL would else share out the
# terms of a product's sums among its threads. It reads this at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'worldsim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
