"""Saved states taken apart over ranks and put together again: to the bit, whatever pages hold."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_world

from worldsim.maze.recipe import TINY
from worldsim.saving import Saved, opened, read
from worldsim.session import Session
from worldsim.streaming.split import merged, portion, stacked
from worldsim.world import World

pytestmark = pytest.mark.filterwarnings("ignore:.* was trained to read")
CACHES = (
    "sink=1,recent=2,positions=packed",
    "sink=1,mid=4:pool,recent=2,positions=packed",
    "sink=1,mid=4:participative,recent=2,positions=packed",
    "sink=1,mid=2:topk,bank=4,recent=2,positions=packed",
    "sink=1:int8,recent=2:int8,positions=packed",
)


@pytest.fixture(scope="module")
def deep() -> World:
    return random_world(replace(TINY, layers=3))


def tensors(saved: Saved) -> Iterator[torch.Tensor]:
    for _, held in saved.pages:
        yield from held
    for rows in saved.tables.values():
        for table in rows:
            yield from (x.summary for x in (*table, *table.mid.chosen) if x.summary is not None)
            yield from (query for _, query in table.queries)


@pytest.mark.parametrize("cache", CACHES)
def test_apart_and_together_again(deep: World, cache: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with deep.session(seed=3, steps=2, cache=cache, schedule="ring") as session:
        for _ in range(8):
            session.step()
        session.save(path)
        saved = read(deep, path)
        lanes = saved.settings.schedule.lanes
        shares = [
            [portion(saved, (lane,), layers) for layers in (range(1), range(1, 3))]
            for lane in lanes
        ]
        assert all(x.shape[1] == 1 for _, (x, *_) in shares[0][0].pages)
        parts_alone = merged([stacked(parts) for parts in shares])
        assert not parts_alone.decoding.decoded, "the decoder is on a rank of its own"
        whole = replace(parts_alone, decoding=saved.decoding)
        assert whole.tables.keys() == saved.tables.keys() and len(lanes) == 2
        for mine, theirs in zip(tensors(whole), tensors(saved), strict=True):
            assert torch.equal(mine, theirs)
        with opened(whole, lambda *told: Session(deep, *told), path) as again:
            for _ in range(3):
                assert torch.equal(again.step().latents, session.step().latents)


def test_what_does_not_belong_together_is_refused(deep: World, tmp_path: Path) -> None:
    states = []
    with deep.session(seed=3, steps=2, schedule="ring") as session:
        for block in range(2):
            session.step()
            session.save(tmp_path / f"{block}.safetensors")
            states.append(read(deep, tmp_path / f"{block}.safetensors"))
    early, late = (portion(state, (0,), range(1)) for state in states)
    with pytest.raises(ValueError, match="of several blocks"):
        merged([early, late])
    with pytest.raises(ValueError, match="they keep other frames"):
        stacked([early, replace(late, moment=early.moment)])
