"""`worldsim doctor`: what a world will take here, before its weights are loaded."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from worldsim.apps.opening import DTYPES, MADE
from worldsim.apps.report import machine, print_table, write_json
from worldsim.blueprint import world_of_file, world_of_folder
from worldsim.bundle import auto_dtype, check_device, locate
from worldsim.cache.config import FULL, CacheConfig
from worldsim.folder import DEFAULT_PRESET
from worldsim.forecast import Forecast, forecast
from worldsim.models.checkpoints import PICKLED
from worldsim.streaming.sinks import check_writable
from worldsim.world import World

UNITS = {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
WORTH = 0.01  # of all that is needed; what saves less is not told
TOLD = 4  # remedies, the best ones

Size = tuple[int | None, int | None]  # height and width of a picture; None is the world's own
Remedy = tuple[str, int]  # what to change, bytes that it saves


@dataclass(frozen=True)
class DoctorOptions:
    """What the command line was given."""

    world: str
    cache: str | None
    size: Size
    dtype: str
    preset: str | None
    device: str
    memory: str | None
    json: Path | None
    base: str | None = None
    decoder: Path | None = None


def run(options: DoctorOptions) -> None:
    """Foretell, compare with what is there, and print.

    Raises:
        ValueError: for options that cannot be.
        SystemExit: where it does not fit (exit code 1), saying what would help most.
    """
    if options.json is not None:
        check_writable(options.json)
    there = room(options.memory, options.device)
    dtype = chosen_dtype(options)
    world = opened(options, dtype)
    own = world.config.size
    height, width = (b if a is None else a for a, b in zip(options.size, own, strict=True))
    size = (height, width)
    needed = forecast(world, options.cache, size, options.device)
    fits = needed.total <= there
    helps = [] if fits else remedies(world, needed, options, size)
    cache = world.config.cache_config(options.cache).line()
    kind = str(world.dtype).removeprefix("torch.")
    print_table(
        f"{options.world}: pictures of {size[0]}×{size[1]}, {kind}, cache {cache}",
        ("what", "MiB"),
        [[what, f"{count / UNITS['MiB']:,.2f}"] for what, count in rows(needed, there)],
    )
    write_json(
        options.json,
        {
            "world": options.world,
            "size": size,
            "dtype": kind,
            "device": options.device,
            "cache": cache,
            "forecast": needed.figures(),
            "there": there,
            "fits": fits,
            "remedies": [{"change": change, "saves": saved} for change, saved in helps],
            "machine": machine(),
        },
    )
    if not fits:
        told = " · ".join(f"{change} (−{readable(saved)})" for change, saved in helps)
        raise SystemExit(
            f"worldsim: does not fit: {readable(needed.total)} needed, {readable(there)} there\n"
            f"what saves most: {told or 'smaller pictures (--height, --width)'}"
        )


def rows(needed: Forecast, there: int) -> Iterator[tuple[str, int]]:
    """What is printed: names and bytes."""
    kept, passes = needed.kept, needed.passes
    yield from ((f"weights: {model}", count) for model, count in needed.weights.items())
    if needed.packed:
        yield "weights: in the order of this CPU's products", needed.packed
    yield "the world, which its sessions share", needed.world
    parts = {
        "context: sink": kept.sink,
        "context: mid": kept.mid,
        "context: recent": kept.recent,
        "context: spare": kept.spare,
        "summaries": kept.summaries,
        "scratch: rotated copies, staging": kept.scratch,
        "carry of the decoder": kept.carry,
        "latents": kept.latents,
        "keys and values of the prompt": kept.prompt,
        "pictures of a block": needed.pictures,
    }
    yield from ((part, count) for part, count in parts.items() if count)
    yield "a session", needed.session
    yield "making a block: gather, denoise or commit", needed.making
    if passes["decode"]:
        yield "decoding a block beside it", passes["decode"]
    yield "all together", needed.total
    yield "there is", there
    if kept.growth:
        yield "and each further block adds", kept.growth


# --- what is there ----------------------------------------------------------------------------
def room(memory: str | None, device: str) -> int:
    """Bytes that are free on a device, or what ``memory`` says that there are (``24GiB``).

    Raises:
        ValueError: for a device that is not there, unless ``memory`` stands for it; for a
            ``memory`` that cannot be read.
    """
    if memory is not None:
        if device.partition(":")[0] != "cuda":
            check_device(device)
        read = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", memory.strip())
        if read is None or not float(read[1]):
            raise ValueError(f"--memory is a size such as 24GiB or 512MiB, got {memory!r}")
        return int(float(read[1]) * UNITS[read[2]])
    place = check_device(device)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    info = Path("/proc/meminfo")
    if info.exists() and (line := re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.M)):
        return int(line[1]) * UNITS["KiB"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def readable(count: int) -> str:
    """``3.25 GiB``."""
    unit = next((unit for unit in ("GiB", "MiB") if count >= UNITS[unit]), "KiB")
    return f"{count / UNITS[unit]:,.2f} {unit}"


# --- the world --------------------------------------------------------------------------------
def chosen_dtype(options: DoctorOptions) -> torch.dtype | None:
    """Of the weights; None is a generator's own.

    Raises:
        ValueError: for an unknown dtype.
    """
    if options.dtype != "auto":
        if options.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {options.dtype!r}: choose auto, {', '.join(DTYPES)}")
        return DTYPES[options.dtype]
    if _is_generator(options.world):
        return None
    if options.memory is not None and options.device != "cpu":
        return torch.bfloat16  # of a GPU elsewhere: all of today's compute in it
    return auto_dtype(check_device(options.device))


def opened(options: DoctorOptions, dtype: torch.dtype | None) -> World:
    """The world that is meant, without weights where there are many.

    Raises:
        ValueError: for a world or a preset that is not there.
    """
    if options.base is not None and not _is_generator(options.world):
        raise ValueError("--base is for a generator's file: a folder has its own")
    if options.world in MADE:
        from worldsim.apps import medium

        for name in ("preset", "decoder"):
            if getattr(options, name) is not None:
                raise ValueError(f"{options.world!r} is made, not loaded: leave out --{name}")
        return medium.random_world(medium.MADE[options.world], dtype or "auto", "cpu")
    if _is_generator(options.world):
        base = None if options.base is None else locate(options.base, only_configs=True)
        preset = options.preset or DEFAULT_PRESET
        return world_of_file(Path(options.world), preset, dtype, base, options.decoder)
    assert dtype is not None
    folder = locate(options.world, only_configs=True)
    return world_of_folder(folder, dtype, options.preset, options.decoder)


def _is_generator(name: str) -> bool:
    return Path(name).suffix in (".safetensors", *PICKLED) and not Path(name).is_dir()


# --- what would help --------------------------------------------------------------------------
def remedies(
    world: World, needed: Forecast, options: DoctorOptions, size: tuple[int, int]
) -> list[Remedy]:
    """Changes that each save something worth it, the best first."""

    def saved(other: World, line: str | None = options.cache) -> int:
        return needed.total - forecast(other, line, size, options.device).total

    found = [
        (f"--cache '{line}'", saved(world, line))
        for line in _smaller(world.config.cache_config(options.cache), world.config.block_frames)
    ]
    if world.dtype.itemsize > torch.bfloat16.itemsize:
        found.append(("--dtype bfloat16", saved(opened(options, torch.bfloat16))))
    if (small := _with_tiny_decoder(world)) is not None:
        found.append(("--decoder taew2_1.pth, a tiny one", saved(small)))
    text = needed.weights.get("text encoder", 0)
    if options.device != "cpu":
        layers = [sum(x.nbytes for x in layer.parameters()) for layer in world.transformer.layers]
        away = sum(layers) - max(layers) + text
        found.append(("world.enable_group_offload()", away))
    found.append(("prompt_embeds= and no folder text_encoder", text))
    worth = [remedy for remedy in found if remedy[1] > WORTH * needed.total]
    return sorted(worth, key=lambda remedy: -remedy[1])[:TOLD]


def _smaller(cache: CacheConfig, block_frames: int) -> Iterator[str]:
    """Cache lines that take less: half of the recent frames, and pages of fewer bits."""
    if cache.recent is not None and cache.recent > block_frames:
        yield replace(cache, recent=max(block_frames, cache.recent // 2)).line()
    if cache.quantised:
        return
    for format_ in ("int8", "int4"):
        # Told only of pages that there are, and that are not participative.
        sink = format_ if cache.sink else FULL
        mid = format_ if cache.mid and cache.form != "participative" else FULL
        recent = format_ if cache.recent != 0 else FULL
        yield replace(cache, formats=(sink, mid, recent)).line()


def _with_tiny_decoder(world: World) -> World | None:
    """The same with a tiny decoder in place of Wan's, where there is one for its latents."""
    from worldsim.models.tiny_decoder import TinyDecoder
    from worldsim.models.wan_vae import WanAutoencoder

    with torch.device("meta"):
        tiny = TinyDecoder().to(world.dtype)
    large, alike = world.autoencoder, ("latent_channels", "group", "space")
    if not isinstance(large, WanAutoencoder):
        return None
    if any(getattr(large, name) != getattr(tiny, name) for name in alike):
        return None
    return World(world.config, world.transformer, tiny, world.text_encoder)
