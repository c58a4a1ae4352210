"""The field's reference, number for number: tests/golden/README.md says how these were made."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context
from worldsim.cache.pool import PagePool, PageShape
from worldsim.models.embedders import time_sinusoid
from worldsim.models.transformer import CausalWanTransformer3DModel, Conditioning
from worldsim.models.view import ContextView
from worldsim.rollout import Making, commit, denoise, publish
from worldsim.schedule import CLEAN, Schedule, levels, shift_table

GOLDEN = Path(__file__).parent / "golden"
STEPS = (1000, 750, 500, 250)


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    config = json.loads((GOLDEN / "d_config.json").read_text())
    model = CausalWanTransformer3DModel.from_config(config)
    model.load_state_dict(load_file(GOLDEN / "d_model_diffusers.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


def rollout(
    model: CausalWanTransformer3DModel, inputs: dict[str, Tensor], blocks: int, cache: CacheConfig
) -> Tensor:
    """Blocks of 3 frames with the reference's own noise; ``[1, C, F, H, W]``."""
    dtype = model.dtype
    pool = PagePool(PageShape(3, 2, (4, 6), 32), dtype, torch.device("cpu"))
    view = ContextView(Context(pool, cache), 3)
    conditioning = Conditioning(*model.encode_prompt(inputs["prompt_embeds_padded"].to(dtype)))

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        frames = slice(3 * block, 3 * block + 3)
        source = inputs["noise"][0] if step == 0 else inputs["renoise"][step - 1]
        return source[None, frames].transpose(1, 2).to(dtype).reshape(shape)

    schedule = Schedule(STEPS, shift=5.0)
    done = []
    with torch.inference_mode():
        for block in range(blocks):
            view.prepare(3 * block, 3)
            cells, last = list(schedule.cells(block)), schedule.commit_cell(block)
            shape, place = (1, 16, 3, 8, 12), torch.device("cpu")
            making = Making(cells, conditioning, noise, shape, place, start=3 * block)
            for cell in cells:
                denoise(model, cell, making, {CLEAN: [view]})
            commit(model.commit, last, making.x, conditioning, {CLEAN: [view]}, 3 * block)
            publish([last], {CLEAN: [view]})
            done.append(making.x)
    return torch.cat(done, dim=2)


def test_a_seven_blocks_with_global_attention(model, inputs) -> None:
    ours = rollout(model, inputs, 7, CacheConfig())
    golden = load_file(GOLDEN / "a_global_7blocks.safetensors")["x0"].transpose(1, 2)
    assert (ours - golden).abs().max() <= 8e-6


def test_a_in_bfloat16(model, inputs) -> None:
    from worldsim.models.weights import cast

    half = CausalWanTransformer3DModel.from_config(model.config)
    half.load_state_dict(model.state_dict())
    cast(half.eval(), torch.bfloat16)
    pool_dtype = rollout(half, inputs, 7, CacheConfig())
    golden = load_file(GOLDEN / "a_global_7blocks.safetensors")["x0"].transpose(1, 2)
    error = (pool_dtype.float() - golden).pow(2).mean().sqrt() / golden.pow(2).mean().sqrt()
    assert error <= 0.02


def test_d_one_forward_equals_diffusers(model, inputs) -> None:
    golden = load_file(GOLDEN / "d_diffusers_forward.safetensors")
    x = inputs["noise"][:, :3].transpose(1, 2)
    conditioning = Conditioning(*model.encode_prompt(inputs["prompt_embeds_padded"]))
    for timestep, bound in ((937.5, 1e-4), (0.0, 8e-6)):
        pool = PagePool(PageShape(3, 2, (4, 6), 32), torch.float32, torch.device("cpu"))
        view = ContextView(Context(pool, CacheConfig()), 3)
        view.prepare(0, 3)
        with torch.inference_mode():
            flow = model(x, torch.full((1, 3), timestep), conditioning, [view])
        assert (flow - golden[f"sample_t{timestep:g}"]).abs().max() <= bound


def test_e_schedule_tables() -> None:
    golden = load_file(GOLDEN / "e_schedule.safetensors")
    sigmas, timesteps = shift_table(5.0)
    assert torch.equal(sigmas, golden["sigmas_table"])
    assert torch.equal(timesteps, golden["timesteps_table"])
    ours_t, ours_sigma = levels(STEPS, 5.0)
    assert list(ours_t) == golden["denoising_timesteps"].tolist()
    assert list(ours_sigma) == golden["denoising_sigmas"].tolist()
    assert Schedule.uniform(4, shift=5.0).steps == STEPS


def test_e_time_sinusoid() -> None:
    golden = load_file(GOLDEN / "e_schedule.safetensors")
    ours = time_sinusoid(golden["sinusoid_ts"].flatten(), 256)
    assert (ours - golden["sinusoid_256"]).abs().max() <= 1e-7
