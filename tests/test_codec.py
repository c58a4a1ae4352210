"""Quantised pages: how far they round, and how many bytes they really take."""

import pytest
import torch

from worldsim.cache.codec import CODECS, LEAST, group_size, hadamard
from worldsim.cache.pool import PageKind, PagePool, PageShape

SHAPE = PageShape(layers=3, heads=2, grid=(4, 8), head_dim=64)


def sample(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("tokens", [16, 24, 7, 1])
def test_rounding_is_at_most_half_a_scale(name: str, tokens: int) -> None:
    codec = CODECS[name]
    x = sample(2, 3, tokens, 32) * 3
    codes, scales = codec.encode(x)
    back = codec.decode(codes, scales, torch.float32)
    turn = hadamard(32) if codec.hadamard else torch.eye(32)
    size = tokens // scales.shape[-2]
    assert size == group_size(tokens) and tokens % size == 0 and size <= 16
    half = scales.float().repeat_interleave(size, dim=-2) / 2
    assert ((back - x) @ turn).abs().le(half * 1.0001 + 1e-6).all()
    assert codec.encode(back)[0].sub(codes).abs().max() <= 1, "what was rounded stays what it is"


@pytest.mark.parametrize("name", CODECS)
def test_nothing_and_very_little_survive(name: str) -> None:
    codec = CODECS[name]
    for x in (torch.zeros(16, 32), torch.full((16, 32), LEAST / 1000)):
        back = codec.decode(*codec.encode(x), torch.float32)
        assert back.isfinite().all() and (back - x).abs().max() <= LEAST / 2


def test_a_rotation_helps_where_one_channel_is_large() -> None:
    x = sample(16, 64)
    x[:, 5] += 40 * sample(16, seed=1)  # an outlier in some tokens of one channel
    x[3] += 30
    errors = {
        name: float((CODECS[name].decode(*CODECS[name].encode(x), torch.float32) - x).norm())
        for name in ("int4", "int4h", "int8")
    }
    assert errors["int8"] < errors["int4h"] < errors["int4"]


@pytest.mark.parametrize("name", CODECS)
def test_very_large_numbers_stay_finite(name: str) -> None:
    x = torch.full((16, 32), 3e6)
    assert CODECS[name].decode(*CODECS[name].encode(x), torch.float32).isfinite().all()


@pytest.mark.parametrize("channels", [8, 24, 40, 64, 128])
def test_hadamard_is_orthogonal_and_its_own_inverse(channels: int) -> None:
    matrix = hadamard(channels)
    assert torch.allclose(matrix @ matrix, torch.eye(channels), atol=1e-6)
    assert torch.allclose(matrix, matrix.T)


@pytest.mark.parametrize(("format_", "per_number"), [("full", 2), ("int8", 1.125), ("int4", 0.625)])
def test_bytes_are_what_is_claimed(format_: str, per_number: float) -> None:
    pool = PagePool(SHAPE, torch.bfloat16, torch.device("cpu"))
    kind = PageKind(SHAPE.tokens, format_)
    pool.reserve({kind: 5})
    numbers = 2 * SHAPE.layers * SHAPE.heads * SHAPE.tokens * SHAPE.head_dim
    assert pool.page_nbytes(kind) == numbers * per_number
    assert pool.nbytes == sum(nbytes for _, nbytes in pool.addresses()) == 5 * numbers * per_number


def test_a_page_is_read_as_it_was_written() -> None:
    pool = PagePool(SHAPE, torch.float32, torch.device("cpu"))
    keys, values = sample(3, 2, 32, 64), sample(3, 2, 32, 64, seed=1)
    for format_, most in (("full", 0.0), ("int8", 0.02), ("int4", 0.3)):
        pages = [pool.acquire(PageKind(32, format_)) for _ in range(3)]
        for page in pages:
            pool.write(page, keys + page, values)
        read = pool.read(pages, slice(1, 2))
        assert read[0].shape == (1, 2, 96, 64)
        expected = torch.cat([keys + page for page in pages], dim=-2)[1:2]
        assert (read[0] - expected).abs().max() <= most * (1 + expected.abs().max() / 4)
        assert torch.equal(pool.read(pages[1:2], tokens=5)[1], pool.values(pages[1])[..., :5, :])
