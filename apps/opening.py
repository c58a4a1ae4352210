"""Opening a world the way the command line asks for it."""

import torch

from worldsim.share import Share
from worldsim.world import World

SHOWN_LINES = 256
MADE = ("medium", "tiny")  # worlds that are made, not loaded: see `worldsim.apps.medium`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_world(
    name: str, dtype: str, device: str, threads: int | None, preset: str | None = None
) -> World:
    """Load a world in a dtype, on a device, with a number of threads, or make it here.

    Raises:
        ValueError: for a dtype, a device or a number of threads that cannot be.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    # Denoising and decoding run side by side: half of the cores each, of those that torch may use
    # (it heeds OMP_NUM_THREADS and pinning). On two cores that is 1.6 times as fast as two each.
    torch.set_num_threads(threads or max(1, torch.get_num_threads() // 2))
    kind = DTYPES.get(dtype, "auto")
    if name in MADE:
        from worldsim.apps import medium

        return medium.random_world(medium.MADE[name], kind, device)
    return World.from_pretrained(name, kind, device, preset)


def shown_scale(world: World) -> int:
    """How often to repeat the pixels of a small world, so that people can see it."""
    return max(1, SHOWN_LINES // world.config.height)


def open_share(name: str, dtype: str, device: str, preset: str | None, share: Share) -> World:
    """The same of what one of several ranks needs; on GPUs each rank has one of its own."""
    if device == "cuda":
        device = f"cuda:{share.rank % max(1, torch.cuda.device_count())}"
    kind = DTYPES.get(dtype, "auto")
    if name in MADE:
        from worldsim.apps import medium

        return part_of(medium.random_world(medium.MADE[name], kind, device), share)
    return World.from_pretrained(name, kind, device, preset, share=share)


def part_of(world: World, share: Share) -> World:
    """A world that is there whole, without what a rank does not need."""
    if share.layers is not None:
        world.transformer.keep_layers(share.layers)
    decoder = world.autoencoder if share.decodes else None
    return World(world.config, world.transformer, decoder, world.text_encoder)
