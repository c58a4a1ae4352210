"""Every case that tests/golden/README.md describes and holds no numbers of, against the oracle."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from restated import Reference, Setup, schedule
from safetensors.torch import load_file
from torch import Tensor

from worldsim.models.transformer import Conditioning
from worldsim.presets import PRESETS
from worldsim.rollout import Known
from worldsim.world import World

GOLDEN = Path(__file__).parent / "golden"
BOUND = 8e-6
SIZE = {"height": 64, "width": 96}


@pytest.fixture
def world() -> World:  # its config is changed
    return World.from_single_file(GOLDEN / "model_sf.safetensors", preset="self-forcing")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "model_sf.safetensors")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


def drawn(inputs, first: int, count: int, step: int) -> Tensor:
    """The noise of some frames, counted from the first that is made."""
    source = inputs["noise"] if step == 0 else inputs["renoise"][step - 1][None]
    return source[:, first : first + count].transpose(1, 2)


def restated(weights, inputs, setup: Setup, blocks: int, given: Tensor | None = None) -> Tensor:
    reference = Reference(weights, setup, inputs["prompt_embeds"])
    with torch.inference_mode():
        return reference.rollout(partial(drawn, inputs), blocks, given)


def opened(world, inputs, setup: Setup, given_blocks: int = 0, given: Tensor | None = None):
    """A session of ours with the same setup and noise."""

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        first = 3 * (block - given_blocks)
        if setup.alone and not given_blocks and block:
            first -= 2
        return drawn(inputs, first, shape[2], step)

    world.config = replace(PRESETS["self-forcing"], text_length=16, shift=setup.shift)
    return world.session(
        schedule="renoise:" + ",".join(map(str, setup.steps)),
        prompt_embeds=inputs["prompt_embeds"], noise=noise, window=setup.window, sink=setup.sink,
        positions="packed" if setup.packed else "absolute", given=given,
        independent_first_frame=setup.alone, context_noise=setup.context_noise, **SIZE,
    )  # fmt: skip


def test_the_oracle_gives_the_golden_numbers(weights, inputs) -> None:
    made = restated(weights, inputs, Setup(), 7)
    golden = load_file(GOLDEN / "a_global_7blocks.safetensors")["x0"].transpose(1, 2)
    assert (made - golden).abs().max() <= BOUND
    given = inputs["initial_latent"].transpose(1, 2)
    made = restated(weights, inputs, Setup(), 3, given)
    golden = load_file(GOLDEN / "f_initial3.safetensors")["x0"].transpose(1, 2)
    assert (made - golden).abs().max() <= BOUND


CASES = {
    "window 6": (Setup(window=6), 6),
    "window 7, no multiple of the block": (Setup(window=7), 6),
    "window 4": (Setup(window=4), 4),
    "window 3, the block alone": (Setup(window=3), 3),
    "window 9, sink 3": (Setup(window=9, sink=3), 7),
    "window 6, sink 1": (Setup(window=6, sink=1), 6),
    "window 8, sink 2": (Setup(window=8, sink=2), 6),
    "window 9, a sink larger than the block": (Setup(window=9, sink=5), 6),
    "window 6, sink 3 and nothing else": (Setup(window=6, sink=3), 5),
    "packed, no sink": (Setup(window=6, packed=True), 6),
    "packed, window 9, sink 3": (Setup(window=9, sink=3, packed=True), 8),
    "packed, window 6, sink 1": (Setup(window=6, sink=1, packed=True), 7),
    "packed, window 8, sink 2": (Setup(window=8, sink=2, packed=True), 6),
    "packed, everything": (Setup(packed=True), 5),
    "context noise": (Setup(context_noise=50.0), 4),
    "context noise, window 9, sink 3": (Setup(window=9, sink=3, context_noise=7.5), 6),
    "first frame alone": (Setup(alone=True), 5),
    "first frame alone, window 6": (Setup(alone=True, window=6), 6),
    "first frame alone, window 9, sink 3": (Setup(alone=True, window=9, sink=3), 7),
    "first frame alone, packed": (Setup(alone=True, window=8, sink=1, packed=True), 7),
    "a step of 0": (Setup(window=6, steps=(1000, 500, 0)), 3),
    "another shift": (Setup(window=6, shift=8.0), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_that_are_made(world, weights, inputs, case: str) -> None:
    setup, blocks = CASES[case]
    wanted = restated(weights, inputs, setup, blocks)
    with opened(world, inputs, setup) as session:
        made = torch.cat([session.step().latents for _ in range(blocks)], dim=2)
    assert (made - wanted).abs().max() <= BOUND


@pytest.mark.parametrize("frames", [1, 3, 4, 6, 7, 9])
@pytest.mark.parametrize("case", ["everything", "window 6", "window 9, sink 3", "packed"])
def test_blocks_that_are_given(world, weights, inputs, frames: int, case: str) -> None:
    """Whole blocks, or a single frame and whole blocks, also more than a window holds. They are
    clean: the context noise is not for them."""
    alone, noise = frames % 3 == 1, 25.0
    setup = {
        "everything": Setup(alone=alone, context_noise=noise),
        "window 6": Setup(window=6, alone=alone, context_noise=noise),
        "window 9, sink 3": Setup(window=9, sink=3, alone=alone, context_noise=noise),
        "packed": Setup(window=8, sink=1, packed=True, alone=alone, context_noise=noise),
    }[case]
    given = inputs["noise"][:, 18 : 18 + frames].transpose(1, 2)
    wanted = restated(weights, inputs, setup, 3, given)
    before = (frames + 2) // 3  # blocks that are given
    with opened(world, inputs, setup, before, given) as session:
        blocks = [*session.given, *(session.step() for _ in range(3))]
    made = torch.cat([block.latents for block in blocks], dim=2)
    assert torch.equal(made[:, :, :frames], given)
    assert (made - wanted).abs().max() <= BOUND


def test_one_given_frame_needs_no_further_word(world, weights, inputs) -> None:
    given = inputs["initial_latent"][:, :1].transpose(1, 2)
    wanted = restated(weights, inputs, Setup(alone=True), 2, given)

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return drawn(inputs, 3 * (block - 1), shape[2], step)

    with world.session(
        prompt_embeds=inputs["prompt_embeds_padded"], noise=noise, window=None, given=given, **SIZE
    ) as session:
        made = torch.cat([session.step().latents for _ in range(2)], dim=2)
    assert (made - wanted[:, :, 1:]).abs().max() <= BOUND


def test_a_timestep_of_its_own_for_each_frame(world, weights, inputs) -> None:
    x = inputs["noise"][:, :3].transpose(1, 2)
    levels = [0.0, 937.5, 500.25]
    reference = Reference(weights, Setup(), inputs["prompt_embeds"])
    with torch.inference_mode(), world.session(
        prompt_embeds=inputs["prompt_embeds"], window=None, **SIZE
    ) as session:  # fmt: skip
        session.view.prepare(0, 3)
        told = Conditioning(session.asked.keys, session.asked.values)
        flow = world.transformer(x, torch.tensor([levels]), told, [session.view])
        assert (flow - reference.net(x, levels, 0)).abs().max() <= BOUND


@pytest.mark.parametrize("known_at", [0.0, 30.5])
def test_frames_that_are_known(world, weights, inputs, known_at: float) -> None:
    """The first and the last frame of a block are given: each pass is told them at a timestep of
    their own, and the context pass sees them as the block has them."""
    reference = Reference(weights, Setup(), inputs["prompt_embeds"])
    which = torch.tensor([True, False, True])
    target = inputs["initial_latent"].transpose(1, 2)

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return drawn(inputs, 3 * block, shape[2], step)

    wanted = []
    sigmas, timesteps = schedule(5.0)
    for block in range(2):
        x = drawn(inputs, 3 * block, 3, 0)
        for k, entry in enumerate((0, 250, 500, 750)):
            x = torch.where(which[:, None, None], target, x)
            levels = [known_at if known else float(timesteps[entry]) for known in which]
            x0 = x - sigmas[entry] * reference.net(x, levels, 3 * block)
            if k < 3:
                after = sigmas[entry + 250]
                x = (1 - after) * x0 + after * drawn(inputs, 3 * block, 3, k + 1)
        wanted.append(torch.where(which[:, None, None], target, x0))
        reference.net(wanted[-1], [0.0] * 3, 3 * block)
    with world.session(
        prompt_embeds=inputs["prompt_embeds"], noise=noise, window=None, **SIZE
    ) as session:
        known = Known(which, target, known_at)
        made = [session.step(known=known).latents for _ in range(2)]
    assert (torch.cat(made, dim=2) - torch.cat(wanted, dim=2)).abs().max() <= BOUND


def test_bfloat16_stays_within_the_reference_s_own_distance(weights, inputs) -> None:
    world = World.from_single_file(
        GOLDEN / "model_sf.safetensors", preset="self-forcing", torch_dtype=torch.bfloat16
    )
    for case in ("window 9, sink 3", "packed, window 9, sink 3"):
        setup, blocks = CASES[case]
        wanted = restated(weights, inputs, setup, blocks)
        with opened(world, inputs, setup) as session:
            made = torch.cat([session.step().latents for _ in range(blocks)], dim=2)
        assert (made - wanted).pow(2).mean().sqrt() <= 0.02 * wanted.pow(2).mean().sqrt()
