"""Saved states taken apart and put together: by lanes, and by layers.

A serial session has all lanes of its schedule and all layers. Of several ranks each has some lanes
with all layers, or in a ring every lane with some layers.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from worldsim.cache.policy import Entry, Mid, Table
from worldsim.cache.pool import layer_axes
from worldsim.saving import Saved
from worldsim.state import Decoding, Moment

Item = TypeVar("Item")
APART = "the ranks' states do not belong together"


def merged(parts: Sequence[Saved]) -> Saved:
    """States that have some lanes each, at the same block, as one of all of these lanes.

    Raises:
        ValueError: where they are at several blocks.
    """
    tables, before = dict[int, tuple[Table, ...]](), 0
    for part in parts:
        for lane, rows in part.tables.items():
            tables[lane] = tuple(table.moved(range(before, 2**62).__getitem__) for table in rows)
        before += len(part.pages)
    return replace(
        parts[0],
        moment=_moment(parts),
        pages=tuple(page for part in parts for page in part.pages),
        tables=tables,
        newest={lane: rows for part in parts for lane, rows in part.newest.items()},
    )


def stacked(parts: Sequence[Saved]) -> Saved:
    """States of the same lanes that have some layers each, in their order, as one of all layers.

    Raises:
        ValueError: where they are of several blocks, or keep other frames.
    """
    pages = []
    for alike in _side_by_side([part.pages for part in parts]):
        kind, tensors = alike[0][0], zip(*(tensors for _, tensors in alike), strict=True)
        joined = zip(tensors, layer_axes(kind), strict=True)
        pages.append((kind, tuple(torch.cat(same, axis) for same, axis in joined)))
    tables = {
        lane: tuple(
            _of_tables(same, torch.cat)
            for same in _side_by_side([part.tables[lane] for part in parts])
        )
        for lane in parts[0].tables
    }
    return replace(parts[0], moment=_moment(parts), pages=tuple(pages), tables=tables)


def portion(saved: Saved, lanes: Container[int], layers: range | None) -> Saved:
    """What a rank has of a serial session's state: these lanes, and these layers (None: all)."""
    here = slice(None) if layers is None else slice(layers.start, layers.stop)
    tables = {lane: rows for lane, rows in saved.tables.items() if lane in lanes}
    used = dict.fromkeys(e.page for rows in tables.values() for table in rows for e in table)
    number, pages = {page: i for i, page in enumerate(used)}, []
    for kind, tensors in (saved.pages[page] for page in used):
        cut = zip(tensors, layer_axes(kind), strict=True)
        pages.append((kind, tuple(x[(slice(None),) * axis + (here,)] for x, axis in cut)))
    return replace(
        saved,
        pages=tuple(pages),
        decoding=Decoding(),  # which another rank does
        tables={
            lane: tuple(
                _of_tables([table.moved(number.__getitem__)], lambda parts: parts[0][here])
                for table in rows
            )
            for lane, rows in tables.items()
        },
        newest={lane: rows for lane, rows in saved.newest.items() if lane in lanes},
    )


def _moment(parts: Sequence[Saved]) -> Moment:
    """The first one heard the player, the last one saw blocks finished."""
    if len({part.moment.block for part in parts}) > 1:
        raise ValueError(f"{APART}: they are of several blocks")
    return replace(parts[0].moment, made=parts[-1].moment.made)


def _of_tables(tables: Sequence[Table], join: Callable[[list[Tensor]], Tensor]) -> Table:
    """Of tables of the same frames one, whose tensors are ``join`` of theirs."""
    first = tables[0]
    if any(table != first for table in tables):
        raise ValueError(f"{APART}: they keep other frames")

    def entries(parts: Sequence[Sequence[Entry]]) -> tuple[Entry, ...]:
        made = []
        for same in _side_by_side(parts):
            means = [entry.summary for entry in same if entry.summary is not None]
            made.append(replace(same[0], summary=join(means) if means else None))
        return tuple(made)

    return replace(
        first,
        sink=entries([table.sink for table in tables]),
        recent=entries([table.recent for table in tables]),
        mid=Mid(
            entries([table.mid.bank for table in tables]),
            entries([table.mid.waiting for table in tables]),
            entries([table.mid.chosen for table in tables]),
        ),
        queries=tuple(
            (same[0][0], join([query for _, query in same]))
            for same in _side_by_side([table.queries for table in tables])
        ),
    )


def _side_by_side(parts: Sequence[Sequence[Item]]) -> list[tuple[Item, ...]]:
    """The first of each, the second of each, and so on."""
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"{APART}: they keep other frames")
    return list(zip(*parts, strict=True))
