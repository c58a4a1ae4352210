"""Every attention kernel against the formula, and rotations against plain arithmetic."""

import math
from decimal import Decimal, getcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from worldsim.models import products
from worldsim.models.attention import attention, check_backend, softmax_attention
from worldsim.models.products import by_products
from worldsim.models.rope import axis_pairs, rotate, rotate_pairs, rotation, token_positions

GOLDEN = Path(__file__).parent / "golden" / "e_schedule.safetensors"
CPU_BACKENDS = ("flex", "_native_math", "_native_flash")  # diffusers' own that need no GPU
DOUBLE = torch.float64


def randn(seed: int, *shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, *rotation(positions, x.shape[-1], x.dtype))


# --- attention --------------------------------------------------------------------------------
@pytest.mark.parametrize("keys", [7, 40])
def test_native_is_the_formula(keys: int) -> None:
    q, k, v = randn(0, 2, 3, 7, 16), randn(1, 2, 3, keys, 16), randn(2, 2, 3, keys, 16)
    assert (attention(q, k, v) - softmax_attention(q, k, v)).abs().max() <= 1e-12
    mask = randn(3, 2, 1, 7, keys) > 0
    mask[..., 0] = True  # every query sees something
    masked = attention(q, k, v, mask=mask)
    assert (masked - softmax_attention(q, k, v, mask=mask)).abs().max() <= 1e-12
    assert (masked - softmax_attention(q, k, v)).abs().max() > 0.1


def test_the_formula_is_a_softmax() -> None:
    # One head of size 4, so scores are halved: weights 1/(1+e) and e/(1+e) by hand.
    q = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]], dtype=DOUBLE)
    k = torch.tensor([[[[0.0, 0, 0, 0], [1.0, 0, 0, 0]]]], dtype=DOUBLE)
    v = torch.tensor([[[[0.0, 1, 0, 0], [1.0, 0, 0, 0]]]], dtype=DOUBLE)
    share = math.e / (1 + math.e)
    expected = torch.tensor([share, 1 - share, 0.0, 0.0], dtype=DOUBLE)
    assert (softmax_attention(q, k, v)[0, 0, 0] - expected).abs().max() <= 1e-15


def test_a_mask_equals_a_slice() -> None:
    q, k, v = randn(0, 1, 2, 5, 16), randn(1, 1, 2, 12, 16), randn(2, 1, 2, 12, 16)
    mask = torch.arange(12) < 8
    sliced = attention(q, k[:, :, :8], v[:, :, :8])
    assert (attention(q, k, v, mask=mask.expand(5, 12)) - sliced).abs().max() <= 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_other_kernels_equal_native(backend: str) -> None:
    assert check_backend(backend) == backend
    q, k, v = (randn(i, 2, 3, n, 64, dtype=torch.float32) for i, n in enumerate((24, 72, 72)))
    assert (attention(q, k, v, backend=backend) - attention(q, k, v)).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("piece", [1, 3000, 1 << 20])  # a query, a few, several heads at a time
@torch.inference_mode()
def test_products_one_by_one_are_the_formula(
    dtype: torch.dtype, bound: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PIECE", piece)
    rows_last = [randn(i, 2, n, 3, 16, dtype=dtype) for i, n in enumerate((40, 72, 72))]
    for q, k, v in (
        [x.transpose(1, 2) for x in rows_last],
        [x.transpose(1, 2).contiguous() for x in rows_last],
    ):
        expected = softmax_attention(q.double(), k.double(), v.double())
        assert (by_products(q, k, v) - expected).abs().max() <= bound
    loud = by_products(80 * q, k, v)
    assert loud.isfinite().all()


@torch.inference_mode()
def test_native_is_products_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(i, 1, 2, n, 16, dtype=torch.float32) for i, n in enumerate((40, 72, 72)))
    seen: list[int] = []
    monkeypatch.setattr(products, "FASTER", (torch.float32,))

    def noted(q: Tensor, *_: Tensor) -> Tensor:
        seen.append(q.shape[-2])
        return q

    monkeypatch.setattr("worldsim.models.attention.by_products", noted)
    attention(q, k, v)
    attention(q, k, v, mask=torch.ones(40, 72, dtype=torch.bool))
    attention(q[..., :8, :], k, v)  # a few queries
    attention(*(x.double() for x in (q, k, v)))
    with torch.inference_mode(False), torch.enable_grad():
        attention(*(x.clone() for x in (q, k, v)))
    monkeypatch.setattr(products, "SUMMED", 71)
    attention(q, k, v)
    assert seen == [40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_products_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    q, k, v = (randn(i, 1, 2, n, 64, dtype=dtype) for i, n in enumerate((112, 2352, 2352)))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(by_products(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


def test_an_unknown_kernel_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="unknown attention backend 'fast'; choose one of") as told:
        check_backend("fast")
    assert "_native_math" in str(told.value)
    assert "\n" not in str(told.value)
    assert check_backend("native") == "native"


@pytest.mark.parametrize("backend", ["_native_npu", "_native_efficient"])
def test_a_kernel_that_does_not_run_here_is_one_clear_line(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend!r} does not run here .* use 'native'") as told:
        check_backend(backend)
    assert "\n" not in str(told.value)
    assert "NoneType" not in str(told.value)  # what a missing package looks like from inside


# --- rotation ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head_dim", "split"), [(32, (6, 5, 5)), (128, (22, 21, 21)), (6, (1,) * 3)]
)
def test_split_of_a_head(head_dim: int, split: tuple[int, int, int]) -> None:
    assert axis_pairs(head_dim) == split


@pytest.mark.parametrize("head_dim", [4, 7])
def test_heads_that_cannot_be_split(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"even and at least 6, got {head_dim}"):
        axis_pairs(head_dim)


@pytest.mark.parametrize(("table", "head_dim"), [("rope128", 128), ("rope_freqs_hd32", 32)])
def test_rotations_are_the_reference_tables(table: str, head_dim: int) -> None:
    golden = load_file(GOLDEN)
    rows = golden.get(f"{table}_positions", torch.arange(len(golden[f"{table}_cos"])))
    positions = rows.double()[:, None].expand(-1, 3)  # t = h = w, as in the tables
    cos, sin = rotation(positions, head_dim, torch.float32)
    assert torch.equal(cos, golden[f"{table}_cos"])
    assert torch.equal(sin, golden[f"{table}_sin"])


def test_each_axis_turns_its_own_channels() -> None:
    # 6/5/5 pairs: a wrong split or order would let one axis turn another's channels.
    x = randn(0, 1, 32)
    home = torch.zeros(1, 3, dtype=DOUBLE)
    parts = (slice(0, 12), slice(12, 22), slice(22, 32))
    for axis, own in enumerate(parts):
        moved = home.clone()
        moved[:, axis] = 5
        turned = rotated(x, moved)
        for part in parts:
            # Bit for bit: a page that is re-aligned in time keeps its place in space exactly.
            assert torch.equal(turned[:, part], x[:, part]) == (part is not own)


def test_token_order_is_frame_row_column() -> None:
    positions = token_positions(torch.tensor([7, 4]), 2, 3)
    expected = [[t, h, w] for t in (7, 4) for h in range(2) for w in range(3)]
    assert positions.tolist() == expected
    assert positions.dtype == DOUBLE


def test_pairs_are_interleaved_complex_numbers() -> None:
    x, positions = randn(0, 3, 5, 32), 9 * randn(1, 5, 3)
    cos, sin = rotation(positions, 32, DOUBLE)
    expected = torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    ).flatten(-2)
    assert (rotate(x, cos, sin) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_one_pass_has_the_bits_of_the_formula(dtype: torch.dtype) -> None:
    # Rows before heads in memory, as a projection leaves them.
    x = randn(0, 1, 6, 2, 32, dtype=dtype).transpose(1, 2)
    turn = rotation(token_positions(torch.tensor([5]), 2, 3), 32, dtype)
    assert torch.equal(rotate(x, *turn), rotate_pairs(x, *turn))


def test_turning_twice_is_turning_by_the_sum() -> None:
    x, here = randn(0, 4, 6, 32), token_positions(torch.tensor([3]), 2, 3)
    shift = torch.tensor([17.0, 0.0, 0.0], dtype=DOUBLE)
    twice = rotated(rotated(x, here), shift.expand(6, 3))
    assert (twice - rotated(x, here + shift)).abs().max() <= 1e-12


def test_logits_depend_on_differences_only() -> None:
    q, k = randn(0, 2, 6, 32), randn(1, 2, 18, 32)
    at_q, at_k = token_positions(torch.tensor([9]), 2, 3), token_positions(torch.arange(3), 2, 3)

    def logits(shift: float) -> Tensor:
        move = torch.tensor([shift, 0.0, 0.0], dtype=DOUBLE)
        return rotated(q, at_q + move) @ rotated(k, at_k + move).transpose(-1, -2)

    for shift in (1.0, 21.0, 1000.0):
        assert (logits(shift) - logits(0.0)).abs().max() <= 1e-12
    # On differences they do depend: moving the keys alone is something else.
    later = at_k + torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE)
    moved = rotated(q, at_q) @ rotated(k, later).transpose(-1, -2)
    assert (moved - logits(0.0)).abs().max() > 0.1


def cosine_and_sine(position: int, exponent: Decimal) -> tuple[float, float]:
    """Of ``position · 10000^-exponent``, the angle held in 50 decimal digits."""
    getcontext().prec = 50
    two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097")
    angle = position * Decimal(10_000) ** -exponent
    rest = float(angle % two_pi)
    return math.cos(rest), math.sin(rest)


def test_a_position_of_a_million_is_exact() -> None:
    # 69 hours at four latent frames a second; any table would have ended, and float32 angles too.
    position, pairs = 1_000_000, axis_pairs(128)[0]
    at = torch.tensor([[float(position), 0.0, 0.0]], dtype=DOUBLE)
    exact = [cosine_and_sine(position, Decimal(j) / pairs) for j in range(pairs)]
    cos, sin = (torch.tensor(side, dtype=DOUBLE) for side in zip(*exact, strict=True))
    for dtype, bound in ((DOUBLE, 1e-9), (torch.float32, 1e-7)):
        ours = rotation(at, 128, dtype)
        assert all(side.dtype == dtype and bool(side.isfinite().all()) for side in ours)
        assert (ours[0][0, :pairs] - cos).abs().max() <= bound
        assert (ours[1][0, :pairs] - sin).abs().max() <= bound
    single = (torch.tensor(float(position)) * 10_000 ** (-torch.arange(pairs) / pairs)).cos()
    assert (single - cos).abs().max() > 1e-3  # what float32 angles would have given


def test_half_precision_keys_are_turned_in_float32() -> None:
    x, positions = (
        randn(0, 2, 6, 32, dtype=torch.bfloat16),
        token_positions(torch.tensor([5]), 2, 3),
    )
    cos, sin = rotation(positions, 32, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), cos, sin).bfloat16())
