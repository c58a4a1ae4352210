"""The settings of the tables in README and docs, by the names that `worldsim evaluate` takes."""

from collections.abc import Mapping
from dataclasses import replace

from worldsim.apps.setting import Setting

PLAIN = "recent=11"  # what a plain window of the same length is: nothing but the newest frames
CACHES = (  # each reads eleven latent frames, or as many tokens as those have; but the second
    PLAIN,
    "sink=3,recent=4,positions=packed",
    "sink=3,recent=8",
    "sink=3,recent=8,positions=packed",
    "window=12,sink=50%",
    "window=12,sink=50%,positions=packed",
    "sink=3,mid=8:pool,recent=7",
    "sink=3,mid=8:pool,recent=7,positions=packed",
    "sink=3,mid=3:participative,recent=5",
    "sink=3,mid=3:participative,recent=5,positions=packed",
    "sink=3,mid=3:topk,bank=48,recent=5",
    "sink=3,mid=3:topk,bank=48,recent=5,positions=packed",
    "sink=3,mid=3:pose,bank=48,recent=5",
    "sink=3,mid=3:pose,bank=48,recent=5,positions=packed",
    "sink=3:int8,recent=8:int8,positions=packed",
    "sink=3:int4,recent=8:int4,positions=packed",
    "sink=3:int4h,recent=8:int4h,positions=packed",
)
SCHEDULES = ("serial", "reuse", "tpp", "lag1", "hiar", "diagonal")
TABLES: Mapping[str, tuple[Setting, ...]] = {
    "settings": (
        Setting(),
        *(Setting(steps=steps) for steps in (1, 4, 8)),
        Setting(cache=PLAIN),
        Setting(cache="sink=3,recent=4,positions=packed"),
        Setting(dtype="float32"),
    ),
    "steps": tuple(Setting(steps=steps) for steps in (1, 2, 3, 4, 8, 16)),
    "caches": tuple(Setting(cache=cache) for cache in CACHES),
    "schedules": (
        *(Setting(schedule=name) for name in SCHEDULES),
        *(Setting(steps=4, schedule=name) for name in ("serial", "tpp", "lag1")),
    ),
}


def table(name: str, world: str | None) -> tuple[Setting, ...]:
    """One of `TABLES`, of a world (None: the bundled maze).

    Raises:
        ValueError: for a table that does not exist.
    """
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}: choose from {', '.join(TABLES)}")
    return tuple(replace(row, world=world or row.world) for row in TABLES[name])
