"""`worldsim soak`: stream for ever, and fail where memory grows or moves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from worldsim.apps.report import machine, print_table, write_json
from worldsim.apps.resident import resident_mib
from worldsim.apps.setting import Setting
from worldsim.streaming.sinks import check_writable
from worldsim.world import World

WARM = 0.1  # share of the blocks after which nothing may grow any more
ALLOWED_MIB = 16.0
LOOKS = 200  # times that the resident size is read


@dataclass(frozen=True)
class SoakOptions:
    """What the command line was given."""

    setting: Setting
    blocks: int
    device: str
    json: Path | None


def run(options: SoakOptions) -> None:
    """Stream, look, and print.

    Raises:
        ValueError: for options that cannot be.
        SystemExit: if memory grew by more than 16 MiB over the last 90 % of the blocks, or if
            pages or their rotated copies did not stay where they were.
    """
    if options.blocks < 100:
        raise ValueError(f"--blocks must be 100 or more to mean anything, got {options.blocks}")
    if options.json is not None:
        check_writable(options.json)
    setting = options.setting
    world = setting.open(options.device, 1)
    figures = soak(world, setting, options.blocks)
    print_table(
        f"{options.blocks} blocks, cache {figures['cache']}",
        ("figure", "value"),
        [
            ["resident size after a tenth, MiB", f"{figures['resident_mib'][0]:.1f}"],
            ["grown since, MiB", f"{figures['grown_mib']:+.2f}"],
            ["pages moved or resized", "yes" if figures["moved"] else "no"],
            ["a session, as promised, KiB", f"{figures['memory']['session'] / 1024:.0f}"],
        ],
    )
    write_json(options.json, figures)
    if figures["moved"]:
        raise SystemExit("worldsim: pages or rotated copies moved while the stream ran")
    if figures["grown_mib"] > ALLOWED_MIB:
        grown = f"{figures['grown_mib']:.1f} MiB, more than {ALLOWED_MIB:.0f}"
        raise SystemExit(f"worldsim: memory grew by {grown}")


def soak(world: World, setting: Setting, blocks: int) -> dict[str, Any]:
    """Resident sizes after a tenth of the blocks and at the end, and whether pages stayed.

    Raises:
        ValueError: for a context that keeps everything.
    """
    if (warm_up := setting.warm_up(world)) is None:
        raise ValueError("a context that keeps everything must grow; give it --cache recent=21")
    first = max(int(blocks * WARM), warm_up)
    if blocks <= first:
        raise ValueError(f"--blocks must be above {first}: until then the context fills")
    sizes: list[float] = []
    with setting.session(world) as session:
        config = session.settings.cache
        promised, places = session.memory_report(), None
        for block in track(range(blocks), "soak", console=Console(stderr=True)):
            session.step()
            if block >= first and (block - first) % max(1, blocks // LOOKS) == 0:
                sizes.append(resident_mib())
                now = (world.pool.addresses(), session.view.addresses())
                places = places or now
                if places != now:
                    break
        moved = places != (world.pool.addresses(), session.view.addresses())
    return {
        "cache": config.line(),
        "blocks": blocks,
        "resident_mib": [sizes[0], sizes[-1]],
        "grown_mib": sizes[-1] - sizes[0],
        "moved": moved,
        "memory": promised.figures(),
        "machine": machine(),
    }
