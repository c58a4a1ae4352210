"""The family's generators through the public interface, number for number."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from worldsim.models import products
from worldsim.world import World

GOLDEN = Path(__file__).parent / "golden"
BOUND = 8e-6
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def world() -> World:
    return World.from_single_file(GOLDEN / "model_sf.safetensors", preset="self-forcing")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


def noise_of(inputs: dict[str, Tensor], first: int):
    """The reference's noise, whose frames are counted from the first block that is made."""

    def noise(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        frames = slice(3 * (block - first), 3 * (block - first) + shape[2])
        source = inputs["noise"] if step == 0 else inputs["renoise"][step - 1][None]
        return source[:, frames].transpose(1, 2)

    return noise


@pytest.mark.parametrize("faster", [(), (torch.float32,)], ids=["sdpa", "products"])
@pytest.mark.parametrize("text", ["prompt_embeds", "prompt_embeds_padded"])
def test_a_seven_blocks_with_global_attention(
    world, inputs, text: str, faster: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever this processor would choose, both ways have the reference's numbers.
    monkeypatch.setattr(products, "FASTER", faster)
    golden = load_file(GOLDEN / "a_global_7blocks.safetensors")["x0"].transpose(1, 2)
    with world.session(
        prompt_embeds=inputs[text], noise=noise_of(inputs, 0), window=None, **SIZE
    ) as session:
        made = torch.cat([session.step().latents for _ in range(7)], dim=2)
    assert (made - golden).abs().max() <= BOUND


def test_f_three_given_frames(world, inputs) -> None:
    golden = load_file(GOLDEN / "f_initial3.safetensors")["x0"].transpose(1, 2)
    given = inputs["initial_latent"].transpose(1, 2)
    with world.session(
        prompt_embeds=inputs["prompt_embeds"], noise=noise_of(inputs, 1), window=None,
        given=given, **SIZE,
    ) as session:  # fmt: skip
        blocks = [*session.given, *(session.step() for _ in range(3))]
    made = torch.cat([block.latents for block in blocks], dim=2)
    assert torch.equal(made[:, :, :3], given)
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    assert (made - golden).abs().max() <= BOUND
