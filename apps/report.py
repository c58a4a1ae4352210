"""Figures for people and for machines: a table on the terminal, the same as JSON."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console | None = None,
) -> None:
    """A table, to stdout unless to ``console``; the first column is words, the rest figures."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    (console or Console(highlight=False)).print(table)


def counted(number: float, what: str) -> str:
    """``1 block``, ``2.5 blocks``."""
    return f"{number:.3g} {what}" + ("" if number == 1 else "s")


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures, whole or not at all; None writes nothing."""
    if path is None:
        return
    unfinished = path.with_suffix(path.suffix + ".tmp")
    unfinished.write_text(json.dumps(figures, indent=2) + "\n")
    unfinished.replace(path)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
