"""`worldsim schedule simulate`: what a run over ranks will be like, before there are any."""

from dataclasses import dataclass
from math import prod

from torch import nn

from worldsim.apps.opening import MADE
from worldsim.apps.report import counted, print_table
from worldsim.apps.schedule_show import ranks_of
from worldsim.blueprint import world_of_folder
from worldsim.bundle import auto_dtype, check_device, locate
from worldsim.cache.context import Context
from worldsim.config import Settings
from worldsim.models.autoencoder import GROUP
from worldsim.quantize import nbytes
from worldsim.share import Share, shares
from worldsim.simulate import Costs, simulate
from worldsim.wavefront import rank_of_step, spread
from worldsim.world import World

FLOAT = 4  # bytes of a float32: latents travel in it
FILLS = 4  # times as many blocks as are in flight: enough to see it flow


@dataclass(frozen=True)
class SimulateOptions:
    """What the command line was given; times in ms."""

    name: str
    world: str
    stage_ms: float
    commit_ms: float | None
    decode_ms: float
    steps: int | None
    ranks: int | None
    link_gbps: float
    latency_us: float
    message_us: float
    batch: float
    cache: str | None = None
    spread: float = 0.0
    cold_ms: float = 0.0


def run(options: SimulateOptions) -> None:
    """Print the forecast.

    Raises:
        ValueError: for what cannot be.
    """
    for name in ("stage_ms", "link_gbps"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")
    at_least_0 = "commit_ms", "decode_ms", "latency_us", "message_us", "batch", "spread", "cold_ms"
    for name in at_least_0:
        if not (getattr(options, name) or 0) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or more")
    world = outline(options.world)
    settings = world.settings(steps=options.steps, cache=options.cache, schedule=options.name)
    schedule = settings.schedule
    ranks = ranks_of(schedule, options.ranks)
    parts = shares(schedule, world.transformer.config.num_layers, ranks)
    flying = len(schedule.steps) * (ranks if schedule.order == "layers" else 1)
    grid = spread(schedule, FILLS * flying + 4, ranks)
    latents = world.latents_of(settings.size, world.config.block_frames)
    told = simulate(grid, costs_of(options, world, latents))
    print_table(
        f"{options.name} over {counted(ranks, 'rank')}: {options.world}, "
        f"{len(schedule.steps)} steps of {options.stage_ms:g} ms, "
        f"links of {options.link_gbps:g} Gbit/s",
        ("figure", "value"),
        [
            ["pictures a second", f"{told.fps:.1f}"],
            ["first pictures after, ms", f"{1e3 * told.first:.1f}"],
            ["control to photon, ms: from the step that takes it up", f"{1e3 * told.delay:.1f}"],
            *(
                [f"rank {part.rank}: busy · weights + context, MiB", line]
                for part, line in zip(
                    parts, _memory(world, settings, parts, told.busy), strict=True
                )
            ),
        ],
    )


def outline(name: str) -> World:
    """A world's sizes, without its weights.

    Raises:
        ValueError: for a world that is not there.
    """
    dtype = auto_dtype(check_device("cpu"))
    if name in MADE:
        from worldsim.apps import medium

        return medium.random_world(medium.MADE[name], dtype, "cpu")
    return world_of_folder(locate(name, only_configs=True), dtype)


def costs_of(options: SimulateOptions, world: World, latents: tuple[int, ...]) -> Costs:
    """What each part of the work costs in a world."""
    config = world.transformer.config
    rows, columns = world.transformer.grid(*latents[-2:])
    width = config.num_attention_heads * config.attention_head_dim
    stage = options.stage_ms / 1e3
    return Costs(
        denoise=stage,
        commit=stage if options.commit_ms is None else options.commit_ms / 1e3,
        decode=options.decode_ms / 1e3,
        batch=options.batch,
        message=options.message_us / 1e6,
        latency=options.latency_us / 1e6,
        rate=options.link_gbps * 1e9 / 8,
        latent=FLOAT * prod(latents),
        hidden=latents[2] * rows * columns * width * world.dtype.itemsize,
        pictures=GROUP * latents[2],
        spread=options.spread,
        cold=options.cold_ms / 1e3,
    )


def _memory(
    world: World, settings: Settings, parts: list[Share], busy: tuple[float, ...]
) -> list[str]:
    layers = world.transformer.config.num_layers
    context = Context(world.pool_of(settings.size), settings.cache, world.actions.camera)
    held = world.memory_of(settings, context, None, 0)
    lanes = len(settings.schedule.lanes)
    each = (held.context + held.scratch + held.summaries) / lanes
    whole = sum(nbytes(tensor) for tensor in world.transformer.parameters())
    in_layers = sum(nbytes(p) for layer in world.transformer.layers for p in layer.parameters())
    lines = []
    for part in parts:
        share = 1.0 if part.layers is None else len(part.layers) / layers
        weights = whole - in_layers * (1 - share) if part.steps else 0.0
        for model, here in ((world.autoencoder, part.decodes), (world.text_encoder, part.reads)):
            if model is not None and here:
                assert isinstance(model, nn.Module)
                weights += sum(nbytes(tensor) for tensor in model.parameters())
        mine = lanes
        if part.layers is None and part.ranks > 1:
            levels = range(len(settings.schedule.steps))
            mine = sum(rank_of_step(settings.schedule, part.ranks, s) == part.rank for s in levels)
        lines.append(
            f"{busy[part.rank]:.0%} · {weights / 2**20:,.1f} + {mine * share * each / 2**20:,.1f}"
        )
    return lines
