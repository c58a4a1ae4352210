"""`worldsim train`: recipes that make a world from nothing."""

from pathlib import Path

from rich.console import Console

from worldsim.bundle import check_device
from worldsim.maze.recipe import PRESETS
from worldsim.maze.train import WORLD, train


def run(what: str, out: Path | None, preset: str | None, device: str, ranks: int) -> None:
    """Train or resume; see `worldsim.maze.train`.

    Raises:
        ValueError: for a recipe, preset, device or number of ranks that cannot be.
    """
    if what not in PRESETS:
        raise ValueError(f"unknown recipe {what!r}: there is {', '.join(PRESETS)}")
    name = preset or ("gpu" if device.startswith("cuda") else "cpu")
    if name not in PRESETS[what]:
        raise ValueError(f"unknown preset {name!r}: choose {', '.join(PRESETS[what])}")
    place = check_device(device)
    if ranks < 1 or (ranks > 1 and place.type != "cpu"):
        raise ValueError(f"--ranks must be 1 or more, and is for the CPU only; got {ranks}")
    folder = out or Path("runs", what)
    train(PRESETS[what][name], folder, device, ranks)
    world = folder / WORLD
    Console(stderr=True).print(
        f"done: the world is in {world} (worldsim stream walk.mp4 --world {world}), "
        f"curves and sheets in {folder}"
    )
