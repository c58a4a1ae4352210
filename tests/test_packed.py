"""Linears in oneDNN's order, and norms in few passes: torch's own numbers, on any thread count."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from conftest import MakeWorld
from torch import Tensor, nn
from torch.nn import functional as F

from worldsim.models import packed
from worldsim.models.norms import (
    AffineNorm,
    RMSNorm,
    add_gated,
    add_gated_plainly,
    few_passes,
    modulated_norm,
    modulated_norm_plainly,
)
from worldsim.models.packed import Linear
from worldsim.models.weights import cast

KINDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3}  # relative, of a whole result
dtypes = pytest.mark.parametrize("dtype", KINDS, ids=str)


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packed, "SMALL", 0)  # small ones are quicker to test
    with torch.inference_mode():
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 64, outputs: int = 96, dtype: torch.dtype = torch.float32) -> Linear:
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(1)
        return cast(Linear(inputs, outputs).requires_grad_(False), dtype)


def apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def exact(layer: Linear, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return F.linear(x.double(), layer.weight.double(), layer.bias.double())


# --- linears ----------------------------------------------------------------------------------
@dtypes
@pytest.mark.parametrize("rows", [1, 16, 48, 336])
def test_a_packed_product_is_the_product(dtype: torch.dtype, rows: int) -> None:
    layer, x = linear(256, 192, dtype), randn(2, rows, 256).to(dtype)
    assert apart(layer(x), exact(layer, x)) < KINDS[dtype]
    gelu = F.gelu(exact(layer, x), approximate="tanh")
    assert apart(layer.with_gelu(x), gelu) < KINDS[dtype]
    assert layer._copy is not None
    with torch.enable_grad():  # torch's own
        assert apart(layer.with_gelu(x), gelu) < KINDS[dtype]


@pytest.mark.usefixtures("threads")
@dtypes
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 1024), (1024, 256), (384, 384)])
def test_threads_change_no_bit(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    layer = linear(inputs, outputs, dtype)
    for rows in (1, 2, 3, 16, 48, 100, 336):
        x, found = randn(rows, inputs).to(dtype), []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((layer(x), layer.with_gelu(x)))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True)), rows


def test_a_copy_follows_its_weight() -> None:
    layer, x = linear(), randn(40, 64)

    def follows() -> bool:
        return apart(layer(x.to(layer.weight.dtype)), exact(layer, x)) < 6e-3

    assert follows()
    with torch.inference_mode(False), torch.no_grad():
        layer.weight.mul_(2.0)  # an optimiser's step
    assert follows()
    layer.load_state_dict({name: -value for name, value in layer.state_dict().items()})
    assert follows()
    layer.weight.data = 3 * layer.weight.data
    assert follows()
    for dtype in (torch.bfloat16, torch.float32):
        cast(layer, dtype)
        assert follows()
    layer.to(torch.float64)
    assert follows() and layer._copy is None
    layer.to(torch.float32)
    assert follows() and layer._copy is not None
    layer.weight.data.mul_(5.0)  # behind torch's back
    packed.unpack(layer)
    assert follows()


def test_a_cast_back_and_forth_leaves_no_old_copy() -> None:
    """The second float32 weight may lie where the first one lay, with other numbers."""
    for _ in range(20):
        layer, x = linear(64, 64), randn(40, 64)
        layer(x)
        for dtype in (torch.bfloat16, torch.float32):
            cast(layer, dtype)
        assert torch.equal(layer.weight, layer.weight.bfloat16().float())
        assert apart(layer(x), exact(layer, x)) < 1e-6


def test_a_copy_is_nobody_elses() -> None:
    layer, x = linear(), randn(40, 64)
    wanted = layer(x)
    assert layer._copy is not None and list(layer.state_dict()) == ["weight", "bias"]
    with torch.inference_mode(False):
        twin = copy.deepcopy(layer)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
    for other in (twin, read):
        assert other._copy is None
        assert torch.equal(other(x), wanted)


def test_who_goes_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(40, 64)
    with torch.enable_grad():
        layer = linear()
        layer(x)
        assert layer._copy is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and layer._copy is None
    monkeypatch.setattr(packed, "PACKED", 64 * 96 - 1)
    assert packed.packed_nbytes(layer) == 0
    layer(x)
    assert layer._copy is None
    monkeypatch.setattr(packed, "PACKED", 64 * 96)
    assert packed.packed_nbytes(layer) == layer.weight.nbytes
    monkeypatch.setattr(packed, "SMALL", 64 * 96)
    assert packed.packed_nbytes(layer) == 0 < packed.packed_nbytes(linear(dtype=torch.bfloat16))
    monkeypatch.setattr(packed, "SMALL", 0)
    monkeypatch.setattr(packed, "DTYPES", ())
    layer(x)
    assert layer._copy is None


@pytest.mark.usefixtures("threads")
@dtypes
def test_a_world_is_the_same_on_one_thread_and_on_two(
    make_world: MakeWorld, dtype: torch.dtype
) -> None:
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        world = make_world(block_frames=2, steps=2, cache="sink=1,recent=3").to(dtype)
        with world.session("brick", seed=3) as session:
            made.append(torch.cat([session.step().latents for _ in range(4)]))
    assert torch.equal(*made)


def test_a_world_packed_is_the_world(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for kinds in ((), packed.DTYPES):
        monkeypatch.setattr(packed, "DTYPES", kinds)
        world = make_world(block_frames=2, steps=2, cache="sink=1,recent=3")
        with world.session("brick", seed=3) as session:
            made.append(torch.cat([session.step().latents for _ in range(6)]))
    plain, fast = made
    assert 0 < (plain - fast).abs().max() <= 1e-5 * plain.std()


# --- norms ------------------------------------------------------------------------------------
@dtypes
@pytest.mark.parametrize("rows", [1, 2])
def test_few_passes_give_what_the_formula_gives(dtype: torch.dtype, rows: int) -> None:
    x, y = (randn(rows, 30, 48, seed=seed).to(dtype) for seed in (1, 2))
    shift, scale, gate = (randn(rows, 3, 48, seed=seed) for seed in (3, 4, 5))
    assert few_passes(x)
    normed = modulated_norm_plainly(x.double(), shift.double(), scale.double(), 1e-6)
    added = add_gated_plainly(x.double(), y.double(), gate.double())
    for ours, wanted in (
        (modulated_norm(x, shift, scale, 1e-6), normed),
        (modulated_norm_plainly(x, shift, scale, 1e-6), normed),
        (add_gated(x, y, gate), added),
        (add_gated_plainly(x, y, gate), added),
    ):
        assert ours.dtype == dtype and ours.shape == x.shape
        assert apart(ours, wanted) < KINDS[dtype]


@dtypes
def test_norms_with_and_without_gradients_agree(dtype: torch.dtype) -> None:
    x = 3 * randn(2, 30, 48).to(dtype)
    with torch.inference_mode(False):
        norms: list[nn.Module] = [RMSNorm(48, 1e-6).to(dtype), AffineNorm(48, 1e-6)]
        for norm in norms:
            nn.init.normal_(norm.weight)
    for norm in norms:
        ours = norm(x)
        with torch.enable_grad():
            assert not few_passes(x)
            plain = norm(x.clone())
        assert ours.dtype == plain.dtype == dtype
        assert apart(ours, plain) < KINDS[dtype]
