"""Runs over ranks: what each schedule makes there is what its serial form makes, bit for bit."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from worldsim.apps.opening import open_share
from worldsim.maze.recipe import TINY
from worldsim.replay import Replay, read_run
from worldsim.share import shares
from worldsim.state import Block
from worldsim.streaming import words
from worldsim.streaming.kept import DECODER, file_of, forget, forget_decoder, gathered, states
from worldsim.streaming.launch import Ranks
from worldsim.streaming.leader import Run
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
            folder, world, name, 3, again_over, resume=resume, fingerprint=mark,
            saves=str(tmp_path / f"over-{again_over}"), every=1,
        ) as spread_out:  # fmt: skip
            for mine, theirs in zip(spread_out.blocks(), expected[4:], strict=True):
                assert torch.equal(mine.latents, theirs.latents), (again_over, mine.index)
                assert (mine.frames == theirs.frames).all()
        with gathered(world, str(tmp_path / f"over-{again_over}" / "block-000005")) as saved:
            assert (saved.block, saved.decoded) == (5, 5)
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


def test_states_of_a_long_ring_are_whole_and_few(folder: str, world: World, tmp_path: Path) -> None:
    """Its last lane comes many blocks after its first."""
    with opened(folder, world, "ring", 4, 3, blocks=60, saves=str(tmp_path), every=1) as running:
        assert len(list(running.blocks())) == 60
    found = [block for block, _ in states(tmp_path, 1 + 3 * 4)]
    assert found == list(range(60, 26, -1))


@pytest.mark.parametrize(("name", "ranks"), [("tpp", 2), ("tpp", 4), ("hiar", 2), ("ring", 3)])
def test_a_live_run_goes_back_as_a_session_does(
    folder: str, world: World, tmp_path: Path, name: str, ranks: int
) -> None:
    recorded, here = tmp_path / "live.wsrun", tmp_path / "here"
    told = {"prompt": "red brick", "controls": None, "scripted": False, "blocks": None}
    told |= {"snapshots": 2, "record": str(recorded), "fingerprint": world.fingerprint}
    with opened(folder, world, name, 3, ranks, **told) as live:
        made = list(islice(live.blocks(), 3))
        live.tell("control", buttons=["KeyW"], prompt="night")
        came(live, made, lambda block: block.applied.prompt == "night")
        came(live, made, lambda block: block.index == 14)
        with pytest.raises(ValueError, match="cannot go back to block 99: the newest is 14"):
            live.rewind(99)
        live.rewind(11)  # from block 8 on
        live.tell("control", buttons=["KeyA"])
        live.tell("cut")
        came(live, made, lambda block: block.index == 11, lambda block: block.applied.cut)
        live.rewind(1)  # from the beginning, under its prompt
        live.tell("control", buttons=["KeyS"])
        came(
            live, made, lambda block: block.index == 1,
            lambda block: "KeyS" in block.applied.keys[-1],
        )  # fmt: skip
        kept = live.snapshot(here)
        came(live, made, lambda _: kept.done())
        made += islice(live.blocks(), 2)
    heard = deque([
        (lambda block: block.applied.prompt == "night", {"buttons": ["KeyW"], "prompt": "night"}),
        (lambda block: "KeyA" in block.applied.keys[-1], {"buttons": ["KeyA"]}),
        (lambda block: block.applied.cut, None),
        (lambda block: "KeyS" in block.applied.keys[-1], {"buttons": ["KeyS"]}),
    ])  # fmt: skip
    with world.session("red brick", 3, 3, CACHE, name, history=2**26) as serial_session:
        for block in made:
            if block.index != serial_session.block:
                serial_session.rewind(block.index)
            while heard and heard[0][0](block):
                control = heard.popleft()[1]
                serial_session.cut() if control is None else serial_session.control(**control)
            theirs = serial_session.step()
            assert torch.equal(block.latents, theirs.latents), block.index
            assert (block.frames == theirs.frames).all() and block.applied == theirs.applied
    assert not heard and kept.result() == here
    with gathered(world, here) as session:
        (theirs,) = (block for block in made[-5:] if block.index == session.block)
        again = session.step()
        assert torch.equal(again.latents, theirs.latents) and again.applied == theirs.applied
    run = read_run(recorded)
    assert [line["rewind"] for line in run.lines if "rewind" in line] == [11, 1]
    assert len(list(Replay(world, run))) >= len(made)


def came(live: Ranks, made: list[Block], *wanted: Callable[[Block], bool]) -> None:
    """Take blocks until there was such a one, and such a one, …"""
    left = list(wanted)
    for block in islice(live.blocks(), 200):
        made.append(block)
        left = [is_one for is_one in left if not is_one(block)]
        if not left:
            return
    raise AssertionError("it did not come")


def test_a_snapshot_that_never_comes_says_so(folder: str, world: World, tmp_path: Path) -> None:
    with (
        opened(folder, world, "tpp", 2, 2, blocks=2) as scripted,
        pytest.raises(ValueError, match="only where it has saves="),
    ):
        scripted.snapshot(tmp_path / "none")
    with opened(folder, world, "tpp", 2, 2, blocks=2, scripted=False) as ranks:
        next(ranks.blocks())
        ranks.stop()
        kept = ranks.snapshot(tmp_path / "late")
        list(ranks.blocks())
    with pytest.raises(ValueError, match="has ended before its state was written"):
        kept.result(0)


def test_states_of_blocks_that_are_made_anew_are_dropped(tmp_path: Path) -> None:
    folders = [tmp_path / f"block-{block:06d}" for block in (8, 12)]
    for folder in folders:
        folder.mkdir()
        for rank, lane in ((1, None), (10, None), (1, 2), (1, 0)):
            file_of(folder, rank, lane).touch()
        (folder / DECODER).touch()
    assert [block for block, _ in states(tmp_path, 5)] == [12, 8]
    forget(str(tmp_path), 8, 1)
    forget(str(tmp_path), 8, 1, 2)
    assert [block for block, _ in states(tmp_path, 5)] == [8], "what others have yet to drop"
    left = sorted(path.name for path in folders[1].iterdir())
    assert left == [DECODER, "rank-1-0.safetensors", "rank-10.safetensors"]
    forget_decoder(str(tmp_path), 8)
    forget_decoder(None, 8)
    assert not (folders[1] / DECODER).exists() and (folders[0] / DECODER).exists()


def test_prompts_are_let_go_of_when_every_rank_has_heard_them(world: World) -> None:
    store, most = HashStore(), words.KEPT
    assert world.text_encoder is not None
    telling = words.Telling(world.text_encoder, store, 3)
    prompts = ["night " + "red " * n for n in range(3 * most)]

    def there() -> list[int]:
        return [n for n, prompt in enumerate(prompts) if store.check([f"words/{prompt}"])]

    for epoch, prompt in enumerate(prompts[:-1]):
        telling.hold([prompt], epoch)
        words.hear(store, 2, epoch)
    assert len(there()) == 3 * most - 1, "rank 1 has heard none of them"
    words.hear(store, 1, most)
    telling.hold(prompts[-1:], len(prompts))
    assert there() == list(range(most + 1, 3 * most))
    words.hear(store, 1, len(prompts))
    words.hear(store, 2, len(prompts))
    telling.hold(prompts[:1], len(prompts) + 1)  # heard of once more
    assert there() == [0, *range(2 * most + 1, 3 * most)]
    told = words.Told(world, store)
    assert torch.equal(told.encode(prompts[0]), world.text_encoder.encode(prompts[0]))


@pytest.mark.parametrize(("name", "ranks"), [("tpp", 3), ("ring", 2)])
def test_a_run_of_many_prompts_keeps_few(folder: str, world: World, name: str, ranks: int) -> None:
    prompts = ["night" + " red" * n for n in range(3 * words.KEPT)]
    told = {"prompt": "red brick", "scripted": False, "blocks": None}
    with opened(folder, world, name, 2, ranks, **told) as live:
        made = [next(live.blocks())]
        for prompt in prompts:
            live.tell("control", prompt=prompt)
            came(live, made, lambda block, prompt=prompt: block.applied.prompt == prompt)
        live.rewind(1)  # under a prompt that is not there any more
        came(live, made, lambda block: block.index == 1)
        came(live, made, lambda block: block.index == 4)
        there = [prompt for prompt in prompts if live._store.check([f"words/{prompt}"])]
    assert made[-1].applied.prompt == "red brick" and len(there) <= words.KEPT


def latents(made: list[Block], expected: list[Block]) -> tuple[list[Tensor], list[Tensor]]:
    return [block.latents for block in made], [block.latents for block in expected]
