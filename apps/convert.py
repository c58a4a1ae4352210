"""`worldsim convert`: a generator as training code saves it becomes a folder to load."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from worldsim.apps.opening import DTYPES
from worldsim.blueprint import check_base
from worldsim.bundle import locate
from worldsim.folder import TRANSFORMER, write_folder
from worldsim.single_file import read_single_file
from worldsim.world import World


def run(
    source: Path,
    out: Path,
    preset: str,
    base: str | None,
    config: Path | None,
    dtype: str | None,
    size: tuple[int | None, int | None],
) -> None:
    """Write ``out``; it is there whole or not at all.

    Args:
        source: ``.pt`` or ``.safetensors``.
        preset: how the folder is to be run, see `worldsim.presets`.
        base: a Wan2.1 folder or hub id, whose decoder and text encoder are copied.
        config: sizes of the model, where the file does not tell them.
        dtype: of the weights; None keeps the file's own.
        size: height and width of a picture; None is the preset's.

    Raises:
        ValueError: for what cannot be read, a base that lacks a part or does not fit, or an
            ``out`` that is there already.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: name a new folder")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    folder = None if base is None else locate(base)
    settings, transformer, *_ = read_single_file(
        source, preset, None, config, None if dtype is None else DTYPES[dtype]
    )
    height, width = (a or b for a, b in zip(size, (settings.height, settings.width), strict=True))
    settings = replace(settings, height=height, width=width)
    World(settings, transformer)  # refuses a size that the model cannot make
    if folder is not None:
        check_base(settings, transformer, folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        written = Path(scratch) / out.name
        write_folder(written, settings, {TRANSFORMER: transformer}, folder)
        written.replace(out)
    numbers = sum(p.numel() for p in transformer.parameters())
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(f"{out}: {numbers / 1e6:.1f} M parameters, preset {preset}")
    if folder is None:
        console.print("without --base it has no decoder and no text encoder: latents only")
