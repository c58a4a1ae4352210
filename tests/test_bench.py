"""`worldsim bench`: what the roofline counts, the world for measuring, and what is printed."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeWorld, command
from torch import nn
from torch.nn import functional as F

from worldsim.apps import bench, medium
from worldsim.apps.fastest import fastest, ways
from worldsim.apps.opening import open_world
from worldsim.apps.roofline import Call, Roofline, _Recorder
from worldsim.apps.setting import Setting
from worldsim.models.embedders import FIXED_ROWS
from worldsim.models.products import by_products
from worldsim.session import Session
from worldsim.world import World

SMALL = replace(
    medium.MEDIUM, height=32, width=48, window=5, steps=2, layers=2, heads=2, head_dim=16,
    ffn_dim=64, text_dim=16, text_length=8, widths=(16, 16, 16),
)  # fmt: skip


def dit_flops(world: World, kept: int, commit: bool) -> int:
    """One pass by formula, with ``kept`` latent frames in the context."""
    config = world.transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    frame = world.grid[0] * world.grid[1]
    own = world.config.block_frames * frame
    keys, text = own + kept * frame, world.text_encoder.length
    levels = FIXED_ROWS * (config.freq_dim * dim + dim**2 + 6 * dim**2)
    if config.action_dim:
        levels += FIXED_ROWS * (config.action_dim * dim + dim**2)
    columns = world.config.block_frames * world.grid[1]
    levels += -(-columns // FIXED_ROWS) * FIXED_ROWS * config.ray_dim * dim
    patch = own * config.in_channels * 4 * dim
    layer = own * (4 * dim**2 + 2 * dim**2 + 2 * dim * config.ffn_dim)  # self, text, feed-forward
    layer += 2 * own * keys * dim + 2 * own * text * dim  # scores and sums of both attentions
    if commit:  # ends after the last layer's keys and values
        rest = own * 2 * dim**2
        return 2 * (levels + patch + (config.num_layers - 1) * layer + rest)
    return 2 * (levels + patch + config.num_layers * layer + patch)  # out is as large as in


def decode_flops(world: World) -> int:
    """The decoder's convolutions by formula, for a block."""
    config = world.autoencoder.config
    deep, middle, fine = config.widths
    pixels = world.latent_shape[3] * world.latent_shape[4]
    memory = [
        count * 9 * 3 * width**2  # of the own and the previous frame, then of the own
        for count, width in zip(config.depths, config.widths, strict=True)
    ]
    frame = pixels * (9 * config.latent_channels * deep + memory[0] + deep * 4 * middle)
    frame += 4 * pixels * (memory[1] + middle * 4 * fine)
    frame += 16 * pixels * (memory[2] + 9 * fine * 3 * 4 * 4)
    return 2 * world.config.block_frames * frame


def sessions(make_world: MakeWorld) -> Iterator[Session]:
    """A world of blocks of one latent frame, with actions, and one of blocks of three, without."""
    for world in (
        make_world(cache="sink=1,recent=3"),
        medium.random_world(SMALL, torch.float32, "cpu"),
    ):
        with world.session(steps=2) as session:
            yield session


def test_roofline_counts_what_the_formulas_say(make_world: MakeWorld) -> None:
    for session in sessions(make_world):
        world, roofline = session.world, Roofline()
        kept, capacity = 0, session.settings.cache.capacity
        for block in range(7):
            with roofline.record("commit"):
                session.settle()
            if block:
                assert roofline.flops("commit") == dit_flops(world, kept, commit=True)
                kept = min(capacity, kept + world.config.block_frames)
            else:
                assert roofline.flops("commit") == 0
            with roofline.record("denoise"):
                made = session.denoise()
            assert roofline.flops("denoise") == 2 * dit_flops(world, kept, commit=False)
            with roofline.record("decode"):
                session.decode(made)
            assert roofline.flops("decode") == decode_flops(world)
        assert kept == capacity


def test_medium_is_of_the_size_that_its_text_says() -> None:
    assert "112 GFLOP a block" in medium.__doc__
    world = medium.random_world(medium.MEDIUM, "auto", "cpu")
    kept = world.config.cache_config().capacity
    block = 4 * dit_flops(world, kept, commit=False) + dit_flops(world, kept, commit=True)
    assert round(block / 1e9) == 112
    assert world.grid[0] * world.grid[1] == 112


def layouts(calls: list[Call]) -> list[tuple[object, ...]]:
    """Everything about calls but addresses."""
    return [
        (
            call.kernel,
            *(
                (arg.size, arg.stride, arg.dtype) if hasattr(arg, "address") else arg
                for arg in call.args
            ),
            *call.options.items(),
        )
        for call in calls
    ]


def memories(calls: list[Call]) -> list[int]:
    """For each argument, the number of its place: equal where two share their memory."""
    numbers: dict[tuple[object, ...], int] = {}
    places = [arg for call in calls for arg in call.args if hasattr(arg, "address")]
    return [
        numbers.setdefault((place.address, place.size, place.stride, place.dtype), len(numbers))
        for place in places
    ]


def test_roofline_runs_the_same_kernels_on_memory_laid_out_alike(make_world: MakeWorld) -> None:
    world = make_world(cache="recent=3").to(torch.bfloat16)
    roofline, real, alone = Roofline(), _Recorder(), _Recorder()
    with world.session(steps=2) as session:
        for _ in range(5):
            session.denoise()
        session.settle()
        with roofline.record("denoise"), real:
            session.denoise()
    with alone:
        roofline.run("denoise")
    assert len(real.calls) > 2 * world.transformer.config.num_layers * 9
    assert layouts(alone.calls) == layouts(real.calls)
    assert memories(alone.calls) == memories(real.calls)
    weights = {call.args[1].address for call in alone.calls if call.kernel is F.linear}
    linears = sum(isinstance(module, nn.Linear) for module in world.transformer.modules())
    # Each has its own. The patches are embedded by one more; text takes 2 and 2 a layer before.
    assert len(weights) == linears + 1 - 2 - 2 * world.transformer.config.num_layers
    own = {parameter.data_ptr() for parameter in world.transformer.parameters()}
    used = {arg.address for call in alone.calls for arg in call.args if hasattr(arg, "address")}
    assert not own & used


def test_recording_changes_nothing(make_world: MakeWorld) -> None:
    world = make_world()
    made = []
    for recording in (True, False):
        with ExitStack() as stack:
            if recording:
                stack.enter_context(Roofline().record("all"))
            made.append(list(world.stream(seed=3, blocks=3)))
    for one, two in zip(*made, strict=True):
        assert torch.equal(one.latents, two.latents) and np.array_equal(one.frames, two.frames)


@pytest.mark.parametrize("cache", ["recent=0", "recent=2", "sink=1,recent=4", "window=9"])
def test_after_the_warm_up_every_block_is_the_same_work(cache: str) -> None:
    world = medium.random_world(SMALL, torch.float32, "cpu")
    warm_up = Setting(cache=cache).warm_up(world)
    assert warm_up is not None
    flops, roofline = [], Roofline()
    with world.session(steps=1, cache=cache) as session:
        for _ in range(warm_up + 2):
            with roofline.record("block"):
                session.denoise()  # and the commit of the block before
            flops.append(roofline.flops("block"))
    assert len(set(flops[warm_up - 1 :])) == 1
    assert warm_up == 2 or flops[warm_up - 3] < flops[-1]  # not longer than it has to be
    assert Setting(cache="recent=all").warm_up(world) is None


def test_medium_is_made_alike_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(medium.MADE, "medium", SMALL)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    worlds = [open_world("medium", dtype, "cpu", 1) for dtype in ("float32", "bfloat16")]
    assert torch.equal(torch.rand(3), expected)  # nobody else's random numbers are touched
    one, two = (world.transformer.layers[1].attn1.to_q.weight for world in worlds)
    assert one.dtype == torch.float32 and two.dtype == torch.bfloat16
    assert torch.equal(one.bfloat16(), two) and one.std() > 0
    for world in worlds:
        for block in world.stream(blocks=6):
            assert block.latents.isfinite().all() and 0.1 < block.latents.std() < 10
            assert block.frames.std() > 0
        assert block.frames.shape == (12, 32, 48, 3)


def test_figures_are_printed_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def first_byte(arguments: list[str]) -> float:
        started.append(arguments)
        return 1.25

    monkeypatch.setattr(bench, "_until_first_byte", first_byte)
    monkeypatch.setitem(medium.MADE, "medium", SMALL)
    path = tmp_path / "figures.json"
    options = ("--schedule", "euler:1000,500,250", "--threads", "1", "--dtype", "float32")
    arguments = ("bench", "--model", "medium", "--blocks", "10", "--json", path, *options)
    code, printed, _ = command(*arguments)
    assert code == 0
    figures = json.loads(path.read_text())

    world = medium.random_world(SMALL, torch.float32, "cpu")
    gflop = {
        "denoise": 3 * dit_flops(world, 2, commit=False) / 1e9,
        "commit": dit_flops(world, 2, commit=True) / 1e9,
        "decode": decode_flops(world) / 1e9,
    }
    assert set(figures["roofline"]) == set(gflop)
    for part, alone in figures["roofline"].items():
        assert alone["gflop"] == pytest.approx(gflop[part])
        assert alone["ratio"] == pytest.approx(figures["ms"][part] / alone["ms"])
        row = next(line for line in printed.splitlines() if part in line)
        assert f" {alone['ms']:.2f} " in row and f" {alone['ratio']:.2f} " in row
    dit = ("denoise", "commit")
    taken = sum(figures["ms"][part] for part in dit)
    alone = sum(figures["roofline"][part]["ms"] for part in dit)
    assert figures["dit_ratio"] == pytest.approx(taken / alone)
    rate = 1e3 * (gflop["denoise"] + gflop["commit"]) / taken
    assert figures["gflops_per_core"] == pytest.approx(rate)
    single, half = (figures["dtype_ms"][dtype] for dtype in ("float32", "bfloat16"))
    assert f"= {single / half:.2f}" in printed and f"{rate:.0f}; its" in printed
    assert figures["ms"]["encode"] > 0 and figures["fps"] > 0 and figures["peak_mib"] > 10
    assert (figures["steps"], figures["sampler"], figures["warm_up"]) == (3, "euler", 3)
    assert figures["pictures_per_block"] == 12

    # The first picture is that of a process with the very same options.
    assert figures["first_picture_s"] == 1.25 and len(started) == 3
    code, out, err = command(*started[0][1:])
    assert code == 0 and "8 pictures (0.5 s)" in err and len(out) > 0


def test_the_fastest_ways_do_the_same_work() -> None:
    x, weight, bias = torch.randn(2, 48, 64), torch.randn(96, 64), torch.randn(96)
    q, k, v = (torch.randn(1, 2, rows, 32) for rows in (40, 200, 200))
    for kernel, args, count in (
        (F.linear, (x, weight, bias), 2),
        (F.scaled_dot_product_attention, (q, k, v), 3),
        (by_products, (q, k, v), 3),
    ):
        makers = ways(kernel, args, {})
        assert len(makers) == count
        plain, *others = (make()() for make in makers)
        for other in others:
            if other is not None:  # the written-out one leaves its result in a buffer
                assert (plain - other).abs().max() < 1e-4
        number, seconds = fastest(makers)
        assert number in range(count) and seconds > 0
    assert len(ways(F.conv2d, (x,), {})) == 1


def test_sharpening_changes_kernels_and_not_the_work(make_world: MakeWorld) -> None:
    world, roofline = make_world(cache="recent=3"), Roofline()
    with world.session(steps=2) as session:
        for _ in range(3):
            session.denoise()
        with roofline.record("denoise"):
            session.denoise()
    flops = roofline.flops("denoise")
    assert roofline.gemm == 0
    roofline.sharpen()
    roofline.run("denoise")
    assert roofline.flops("denoise") == flops and roofline.gemm > 0
