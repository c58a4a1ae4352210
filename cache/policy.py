"""Which frames a context keeps and at which temporal position they are read.

Pure functions over host metadata; no tensor, no model. A table is a tuple of entries in *slot*
order: softmax does not care in which order its keys come, so an evicted frame's slot is simply
taken by the new one and nothing is ever moved.
"""

from dataclasses import dataclass

from worldsim.cache.config import CacheConfig


@dataclass(frozen=True)
class Entry:
    """One committed latent frame: its absolute index and the page that holds its K/V."""

    frame: int
    page: int


Table = tuple[Entry, ...]


@dataclass(frozen=True)
class ReadPlan:
    """What the cells of one block read: pages in slot order, with temporal positions.

    Attributes:
        pages: page of each slot.
        key_positions: temporal position of each slot's frame.
        query_positions: temporal positions of the block's own frames, for queries and keys alike.
    """

    pages: tuple[int, ...]
    key_positions: tuple[int, ...]
    query_positions: tuple[int, ...]


def admit(table: Table, new: Table, config: CacheConfig) -> tuple[Table, Table]:
    """Add a finished block's frames; returns the new table and the entries that left it.

    The first ``config.sink`` frames ever admitted stay; after them the oldest leaves first. Frames
    of a block may leave singly where the window is no multiple of the block.
    """
    slots = list(table)
    evicted: list[Entry] = []
    for entry in new:
        if config.capacity is None or len(slots) < config.capacity:
            slots.append(entry)
        elif config.recent == 0:
            evicted.append(entry)
        else:
            oldest = min(range(config.sink, len(slots)), key=lambda slot: slots[slot].frame)
            evicted.append(slots[oldest])
            slots[oldest] = entry
    return tuple(slots), tuple(evicted)


def plan(table: Table, start: int, frames: int, config: CacheConfig) -> ReadPlan:
    """Positions for a block of ``frames`` latent frames whose first has absolute index ``start``.

    Recent frames keep their absolute index (only differences matter, so it never has to change);
    ``packed`` moves the sink to end right before the oldest recent frame.
    """
    position = {entry.frame: entry.frame for entry in table}
    if config.positions == "packed":
        cursor = start
        for frame in sorted(position, reverse=True):
            cursor -= 1
            position[frame] = cursor
    return ReadPlan(
        pages=tuple(entry.page for entry in table),
        key_positions=tuple(position[entry.frame] for entry in table),
        query_positions=tuple(range(start, start + frames)),
    )
