"""Runs over ranks: what each schedule makes there is what its serial form makes, bit for bit."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worldsim.apps.opening import open_share
from worldsim.maze.recipe import TINY
from worldsim.share import shares
from worldsim.state import Block
from worldsim.streaming.kept import gathered
from worldsim.streaming.launch import Ranks
from worldsim.streaming.ranks import Run
from worldsim.wavefront import spread
from worldsim.world import World

CACHE = "sink=1,recent=2,positions=packed"
SCRIPT = "W*2 L A WJ*2 S*2"
PROMPTS = "red brick[0.5s] | night[0.5s#] | blue tiles"  # in 2 latent frames, and 2 more


pytestmark = pytest.mark.filterwarnings("ignore:.* was trained to read")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_world) -> str:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("ranks") / "world"
    # Sixteen tokens a block: products of fewer rows differ in bits when they are batched.
    recipe = replace(TINY, layers=3)  # which two ranks cannot share evenly
    make_world(recipe, height=64, width=64, sampler="renoise").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def world(folder: str) -> World:
    return World.from_pretrained(folder, torch.float32)


def opened(
    folder: str, world: World, name: str, steps: int, ranks: int, dtype: str = "float32",
    **others: object,
) -> Ranks:  # fmt: skip
    told = {"seed": 3, "steps": steps, "cache": CACHE, "schedule": name}
    given = {"prompt": PROMPTS, "controls": SCRIPT, "blocks": 6, "log": True} | others
    run = Run(partial(open_share, folder, dtype, "cpu", None), ranks, told, **given)  # type: ignore[arg-type]
    layers = world.transformer.config.num_layers
    return Ranks(run, shares(world.settings(**told).schedule, layers, ranks), world)  # type: ignore[arg-type]


def serial(world: World, name: str, steps: int, blocks: int = 6) -> list[Block]:
    return list(world.stream(PROMPTS, SCRIPT, 3, blocks, steps, CACHE, schedule=name))


def alike(made: list[Block], expected: list[Block]) -> None:
    assert [block.index for block in made] == list(range(len(expected)))
    for mine, theirs in zip(made, expected, strict=True):
        assert torch.equal(mine.latents, theirs.latents), mine.index
        assert (mine.frames == theirs.frames).all() and mine.start == theirs.start
        assert mine.applied == theirs.applied


MATRIX = [
    *(("tpp", steps, ranks) for steps, ranks in ((1, 2), (2, 2), (3, 4), (4, 2), (4, 3), (4, 4))),
    *(("hiar", steps, ranks) for steps, ranks in ((1, 1), (2, 3), (3, 2), (4, 4))),
    *(("ring", steps, ranks) for steps, ranks in ((1, 2), (2, 2), (3, 3), (4, 2), (4, 3))),
]


@pytest.mark.parametrize(("name", "steps", "ranks"), MATRIX)
def test_over_ranks_it_is_its_own_serial_form_bit_for_bit(
    folder: str, world: World, name: str, steps: int, ranks: int
) -> None:
    with opened(folder, world, name, steps, ranks) as running:
        made = list(running.blocks())
        alike(made, serial(world, name, steps))
        schedule = world.settings(steps=steps, schedule=name).schedule
        grid = spread(schedule, 6, ranks)
        # What ran on each rank is what the grid says, each cell once.
        for rank in range(ranks):
            declared = [
                (c.name.kind, c.name.block, c.name.level)
                for c in grid.cells
                if c.rank == rank and c.name.kind != "decode"
            ]
            assert sorted(running.ran[rank]) == sorted(declared), rank
        sent = [running.messages[rank] for rank in range(ranks)]
        if name != "ring":  # a message for each block and edge, whatever the history is
            expected = [(6 * (rank < ranks - 1), 6 * (rank > 0)) for rank in range(ranks)]
            assert sent == expected


def test_in_bfloat16_too(folder: str, world: World) -> None:
    half = World.from_pretrained(folder, torch.bfloat16)
    for name in ("tpp", "hiar"):
        with opened(folder, world, name, 2, 2, "bfloat16") as running:
            alike(list(running.blocks()), serial(half, name, 2))


@pytest.mark.parametrize(("name", "ranks"), [("tpp", 2), ("tpp", 4), ("hiar", 3), ("ring", 2)])
def test_a_run_goes_on_from_its_saved_state(
    folder: str, world: World, tmp_path: Path, name: str, ranks: int
) -> None:
    expected, saves = serial(world, name, 3), str(tmp_path)
    with opened(folder, world, name, 3, ranks, blocks=5, saves=saves, every=2) as first:
        assert all(map(torch.equal, *latents(list(first.blocks()), expected[:5])))
    states = sorted(path.name for path in tmp_path.iterdir())
    assert states == ["block-000002", "block-000004"]
    state = str(tmp_path / "block-000002")
    with opened(folder, world, name, 3, ranks, resume=state) as again:
        made = list(again.blocks())
    assert [block.index for block in made] == [2, 3, 4, 5]
    for mine, theirs in zip(made, expected[2:], strict=True):
        assert torch.equal(mine.latents, theirs.latents) and (mine.frames == theirs.frames).all()
    with gathered(world, state) as session:  # and one process can do it as well
        assert (session.block, session.decoded) == (2, 2)
        script = world.script(PROMPTS, SCRIPT)
        for theirs in expected[2:]:
            block = session.decode(session.denoise(session.follow(script)))
            assert torch.equal(block.latents, theirs.latents)
            assert (block.frames == theirs.frames).all()
            if session.block == 4:  # and any number of ranks what one process has saved
                session.save(serial_state := tmp_path / "serial.safetensors")
    for again_over in (1, 2, 3):
        resume, mark = str(serial_state), world.fingerprint
        with opened(
            folder, world, name, 3, again_over, resume=resume, fingerprint=mark
        ) as spread_out:
            for mine, theirs in zip(spread_out.blocks(), expected[4:], strict=True):
                assert torch.equal(mine.latents, theirs.latents), (again_over, mine.index)
                assert (mine.frames == theirs.frames).all()
    with (
        opened(folder, world, name, 3, 2, resume=resume, fingerprint="another") as other,
        pytest.raises(ValueError, match="with other weights"),
    ):
        list(other.blocks())
    promised = dict(world.pool_of(session.settings.size)._promised)
    next(Path(state).glob("rank-1*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lacks the state of some ranks|do not belong together"):
        gathered(world, state)
    assert world.pool_of(session.settings.size)._promised == promised, "no page stays promised"
    with pytest.raises(ValueError, match="holds no complete state"):
        gathered(world, str(tmp_path))


def latents(made: list[Block], expected: list[Block]) -> tuple[list[Tensor], list[Tensor]]:
    return [block.latents for block in made], [block.latents for block in expected]
