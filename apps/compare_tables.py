"""What `worldsim compare` prints of its figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worldsim.apps.report import print_table

SHOWN = (
    10  # seconds at the beginning of a long stream, and between those that are shown of the rest
)
MIB = 2**20
NONE = "–"  # what a stream is too short for
Figures = Mapping[str, Any]


def print_figures(figures: Figures) -> None:
    """Two tables and a line: B against A by second, each by itself, and whether they differ."""
    seconds = figures["seconds"]
    print_table(
        "B against A",
        ("second", "PSNR, dB", "SSIM"),
        [
            [f"{row['second']:g}", f"{row['psnr']:.2f}", f"{row['ssim']:.3f}"]
            for row in (seconds[i] for i in shown(len(seconds)))
        ],
    )
    sides = (figures["A"], figures["B"])
    ends = f"{sides[0]['drift']['ends_s']:g} s"
    print_table(
        f"{figures['pictures']} pictures, seed {figures['seed']}",
        ("figure", *(f"{name}: {side['setting']}" for name, side in zip("AB", sides, strict=True))),
        [[name.format(ends=ends), *map(said, sides)] for name, said in ROWS.items()],
    )
    print(_difference(figures["first_difference"], figures["pictures"]))


def _difference(first: int | None, pictures: int) -> str:
    """``first`` is the index of the first picture that is not the same in both."""
    if first is None:
        return f"all {pictures} pictures are bit-identical"
    if first == 0:
        return "not bit-identical, from the first picture on"
    return f"bit-identical until picture {first + 1} of {pictures}"


def shown(count: int) -> list[int]:
    """Indices of the seconds that a table shows: the first ten, then every tenth, and the last."""
    if count <= 2 * SHOWN:
        return list(range(count))
    return sorted({*range(SHOWN), *range(2 * SHOWN - 1, count, SHOWN), count - 1})


def _change(name: str) -> Callable[[Figures], str]:
    """First and last value of a figure of drift, and their ratio."""

    def said(side: Figures) -> str:
        ends: Sequence[float] | None = side["drift"][name]
        if ends is None:
            return NONE
        ratio = f" (× {ends[1] / ends[0]:.2f})" if ends[0] else ""
        return f"{ends[0]:.2f} → {ends[1]:.2f}{ratio}"

    return said


def _times(side: Figures) -> str:
    return " · ".join(f"{ms:.1f}" for ms in side["ms"].values()) if side["ms"] else NONE


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


ROWS: Mapping[str, Callable[[Figures], str]] = {
    "sharpness, first → last {ends}": _change("sharpness"),
    "motion, first → last {ends}": _change("motion"),
    "colour, first to last {ends}": lambda side: _number(side["drift"]["colour"]),
    "sharpness, VDE": lambda side: _number(side["drift"]["vde"]),
    "ms: denoise · commit · decode": _times,
    "fps, one part at a time": lambda side: _number(side["fps"]),
    "pages, MiB": lambda side: f"{side['bytes']['context'] / MIB:.2f}",
    "rotated copies, MiB": lambda side: f"{side['bytes']['scratch'] / MIB:.2f}",
    "decoder's carry, MiB": lambda side: f"{side['bytes']['carry'] / MIB:.2f}",
}
