"""What changes the pixels of a world from the outside, as one short text: `steps=2 cache=recent=9`.

The commands that run a world once, and those that set several runs side by side, all mean this.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from worldsim.apps.opening import open_world
from worldsim.session import Session
from worldsim.world import World

DEFAULT = "default"  # how the setting is written in which nothing is given


@dataclass(frozen=True)
class Setting:
    """One way to run a world; None means the world's own.

    Attributes:
        world: ``maze``, a folder or a hub id.
        steps: denoising steps of a block.
        cache: what the context keeps, see `worldsim.cache.config.CacheConfig.parse`.
        schedule: sampler and step list, see `worldsim.config.WorldConfig.sampling`.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        preset: how a folder is run that does not say so, see `worldsim.presets`.
    """

    world: str = "maze"
    steps: int | None = None
    cache: str | None = None
    schedule: str | None = None
    dtype: str = "auto"
    preset: str | None = None

    @classmethod
    def parse(cls, line: str) -> "Setting":
        """Read ``steps=2 cache=sink=3,recent=8 dtype=float32``; spaces separate, order is free.
        ``default``, or nothing at all, is the default setting.

        Raises:
            ValueError: for an unknown name, one given twice, or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, str] = {}
        for part in () if line.strip() == DEFAULT else line.split():
            name, equals, value = part.partition("=")
            if name not in known or not equals or not value:
                raise ValueError(
                    f"setting: {part!r} must be NAME=VALUE with one of {', '.join(known)}"
                )
            if name in values:
                raise ValueError(f"setting: {name} is given twice in {line!r}")
            values[name] = value
        steps = values.pop("steps", None)
        if steps is not None and not steps.isdecimal():
            raise ValueError(f"setting: steps must be a whole number, got {steps!r}")
        return cls(steps=None if steps is None else int(steps), **values)

    def __str__(self) -> str:
        """The text that `parse` reads back; the default setting is ``default``."""
        default = Setting()
        given = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return " ".join(given) or DEFAULT

    def open(self, device: str, threads: int | None) -> World:
        """Load its world, see `open_world`."""
        return open_world(self.world, self.dtype, device, threads, self.preset)

    def session(
        self, world: World, prompt: str | None = None, seed: int = 0, **others: Any
    ) -> Session:
        """Open a session of ``world`` with these settings; ``others`` go to `World.session`."""
        return world.session(prompt, seed, self.steps, self.cache, self.schedule, **others)

    def warm_up(self, world: World) -> int | None:
        """Blocks until the context of ``world`` is full and a slot has been taken again: from then
        on every block is the same work. None where nothing is ever evicted.
        """
        full = world.config.cache_config(self.cache).full_after
        return None if full is None else -(-full // world.config.block_frames) + 2


def every(
    worlds: Iterable[str],
    steps: Iterable[int | None],
    caches: Iterable[str | None],
    schedules: Iterable[str | None],
    dtypes: Iterable[str],
) -> list[Setting]:
    """All combinations, the last named changing fastest."""
    return [Setting(*values) for values in product(worlds, steps, caches, schedules, dtypes)]
