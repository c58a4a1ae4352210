"""A world and its sessions: the diffusers call shape, live stepping, forks, and bounded memory."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeWorld
from PIL import Image
from torch import Tensor, nn

from worldsim.controls import IDLE
from worldsim.maze.autoencoder_stage import set_statistics
from worldsim.maze.recipe import TINY
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.schedule import Cell
from worldsim.session import Session
from worldsim.state import Block
from worldsim.world import World

W, L = frozenset({"KeyW"}), frozenset({"KeyL"})
SCRIPT = "W*3 L*2 WA*4"


@pytest.fixture(scope="module")
def world(make_world: MakeWorld) -> World:
    """One latent frame a block, and a window of three: the shipped world in small."""
    made = make_world()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def wide(make_world: MakeWorld) -> World:
    """Three latent frames a block and a window that they do not divide."""
    made = make_world(block_frames=3, cache="sink=1,recent=4,positions=packed", sampler="renoise")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(autouse=True)
def _every_page_comes_back(world: World, wide: World) -> Iterator[None]:
    yield
    assert world.pool.used_pages == 0 and wide.pool.used_pages == 0


def same(ours: Block, theirs: Block) -> bool:
    return (
        (ours.index, ours.start, ours.applied) == (theirs.index, theirs.start, theirs.applied)
        and torch.equal(ours.latents, theirs.latents)
        and np.array_equal(ours.frames, theirs.frames)
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that no file holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def steps(session: Session, count: int) -> list[Block]:
    return list(islice(session, count))


# --- a folder ------------------------------------------------------------------------------------


def test_save_and_load_change_nothing(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(name="other", fps=12.5, block_frames=2, cache="sink=1,recent=3")
    set_statistics(world.autoencoder, torch.randint(256, (2, 9, 32, 48, 3), dtype=torch.uint8))
    world.save_pretrained(tmp_path / "world")
    loaded = World.from_pretrained(tmp_path / "world", torch.float32)
    assert loaded.config == world.config
    for name in ("transformer", "autoencoder", "text_encoder"):
        ours, theirs = (tensors(getattr(some, name)) for some in (world, loaded))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    first, second = (list(w.stream(controls=SCRIPT, seed=2, blocks=4)) for w in (world, loaded))
    assert all(map(same, first, second))


def test_half_precision_folder_keeps_what_must_stay_float32(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    make_world().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = World.from_pretrained(tmp_path, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in loaded.transformer.named_parameters()}
    assert dtypes["proj_out.weight"] == torch.bfloat16 == loaded.dtype
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert loaded.session().settings.dtype == "bfloat16"


def test_parts_that_do_not_fit_are_refused(world: World, make_world: MakeWorld) -> None:
    config, transformer = world.config, world.transformer
    autoencoder, words = world.autoencoder, world.text_encoder
    other_words = make_world(replace(TINY, text_dim=8)).text_encoder
    other_autoencoder = CausalAutoencoder(latent_channels=4, widths=TINY.widths)
    other_config = replace(config, actions=replace(world.actions, periods=(4.0,)))
    for parts, said in (
        ((config, transformer, autoencoder, other_words), "width of a word is 8"),
        ((config, transformer, other_autoencoder, words), "channels of a latent is 4"),
        ((other_config, transformer, autoencoder, words), "length of an action is 12"),
    ):
        with pytest.raises(ValueError, match=f"{said}, but the models take"):
            World(*parts)


# --- a call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 14])
def test_pictures_are_trimmed_to_the_number_asked_for(
    count: int, world: World, wide: World
) -> None:
    for some in (world, wide):  # latent frames hold 1 + 4k pictures
        frames = some("red brick", num_frames=count, controls="W*9", seed=1).frames
        assert frames.shape == (1, count, 32, 48, 3)
        whole = some("red brick", num_frames=25, controls="W*9", seed=1).frames
        assert np.array_equal(frames, whole[:, :count])
    assert wide.blocks_for(count) == -(-(1 + -(-(count - 1) // 4)) // 3)


def test_output_types(wide: World) -> None:
    def ask(kind: str) -> object:
        return wide(num_frames=10, seed=3, output_type=kind).frames

    blocks = list(wide.stream(seed=3, blocks=2))
    frames = np.concatenate([block.frames for block in blocks])[:10]
    array, tensor, images, latents = map(ask, ("np", "pt", "pil", "latent"))
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    assert np.array_equal((array * 255).round().astype(np.uint8)[0], frames)
    assert isinstance(tensor, Tensor) and tensor.shape == (1, 10, 3, 32, 48)
    assert torch.equal(tensor.permute(0, 1, 3, 4, 2), torch.from_numpy(array))
    assert isinstance(images, list) and len(images) == 1 and len(images[0]) == 10
    assert isinstance(images[0][0], Image.Image) and np.array_equal(images[0][4], frames[4])
    assert isinstance(latents, Tensor) and latents.shape == (1, 8, 6, 4, 6)
    assert torch.equal(latents, torch.cat([block.latents for block in blocks], dim=2))
    with pytest.raises(ValueError, match="output_type must be one of"):
        ask("mp4")


def test_generator_draws_the_seed(world: World) -> None:
    def ask(generator: torch.Generator | None, seed: int = 0) -> np.ndarray:
        return world(num_frames=5, generator=generator, seed=seed).frames

    generator = torch.Generator().manual_seed(4)
    first, second = ask(generator), ask(generator)
    assert not np.array_equal(first, second)
    generator.manual_seed(4)
    assert np.array_equal(ask(generator), first)
    drawn = int(torch.randint(2**63 - 1, (1,), generator=generator.manual_seed(4)))
    assert np.array_equal(ask(None, drawn), first)


def test_callback_sees_every_step(world: World) -> None:
    seen: list[tuple[int, float, Tensor]] = []

    def note(caller: World, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        assert caller is world
        seen.append((step, timestep, tensors["latents"].clone()))

    asked = {"num_frames": 9, "seed": 5, "num_inference_steps": 3}
    latents = world(**asked, output_type="latent", callback_on_step_end=note).frames
    assert [step for step, _, _ in seen] == [0, 1, 2] * 3
    assert seen[0][1] == 1000.0 and seen[0][1] > seen[1][1] > seen[2][1]
    assert torch.equal(torch.cat([x0 for _, _, x0 in seen[2::3]], dim=2), latents)


def test_progress_bar_stays_off_stdout_and_can_be_turned_off(
    make_world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world()
    world(num_frames=1)
    shown = capsys.readouterr()
    assert shown.out == "" and "blocks" in shown.err
    world.set_progress_bar_config(disable=True)
    world(num_frames=1)
    assert capsys.readouterr() == ("", "")


# --- a stream ------------------------------------------------------------------------------------


def test_stepping_iterating_and_streaming_are_one(world: World) -> None:
    streamed = list(world.stream("red brick", controls=[W] * 8, seed=6, blocks=9))
    for way in ("step", "iterate", "later"):
        with world.session("red brick", seed=6) as session:
            session.control(buttons=["KeyW"])
            if way == "iterate":
                made = steps(session, 9)
            elif way == "step":
                made = [session.step() for _ in range(9)]
            else:  # decode all, once all are made
                made = [session.denoise() for _ in range(9)]
                made = [session.decode(block) for block in made]
        assert all(map(same, made, streamed))
    undecoded = world.stream("red brick", controls=[W] * 8, seed=6, blocks=9, decoding=False)
    assert all(map(same, world.decoded(undecoded), streamed))


def test_receipts_say_what_a_block_was_made_under(world: World, wide: World) -> None:
    for some in (world, wide):
        blocks = list(some.stream("night", controls=SCRIPT, blocks=6))
        track = [keys for block in blocks for keys in block.applied.keys]
        wanted = (IDLE, *(s.buttons for s in some.actions.parse(SCRIPT)), *[IDLE] * 20)
        assert tuple(track) == wanted[: len(track)]
        assert {block.applied.prompt for block in blocks} == {"night"}
        assert [block.index for block in blocks] == list(range(6))
        assert [block.start for block in blocks] == [i * len(track) // 6 for i in range(6)]
        assert all(block.timings.keys() == {"commit", "denoise", "decode"} for block in blocks)
        assert all(seconds >= 0 for block in blocks for seconds in block.timings.values())


def test_keys_change_the_world_and_aliases_are_resolved(world: World) -> None:
    idle, forward, arrow = (
        list(world.stream(controls=controls, blocks=3))
        for controls in (".", "W*2", [frozenset({"ArrowUp"})] * 2)
    )
    assert torch.equal(idle[0].latents, forward[0].latents)
    assert not torch.equal(idle[1].latents, forward[1].latents)
    assert all(map(same, forward, arrow))
    with pytest.raises(ValueError, match="unknown key 'KeyQ'"):
        world.stream(controls=[frozenset({"KeyQ"})])
    with world.session() as session:
        for refused in ({"buttons": ["KeyQ"]}, {"prompt": "zebra"}):
            with pytest.raises(ValueError, match="this world"):
                session.control(**refused)
        with pytest.raises(ValueError, match="unknown key 'KeyQ'"):
            session.step([frozenset({"KeyQ"})])
        with pytest.raises(ValueError, match="1 latent frames, got keys for 2"):
            session.step([W, W])
        assert session.block == 0 and session.held == IDLE


def test_without_controls_the_world_plays_its_own_script_over_and_over(
    make_world: MakeWorld,
) -> None:
    world = make_world(controls="W*2 L")
    track = [block.applied.keys[0] for block in world.stream(blocks=8)]
    assert track == [IDLE, W, W, L, W, W, L, W]


def test_prompts_over_time(world: World, wide: World) -> None:
    for some, block_frames in ((world, 1), (wide, 3)):
        prompt = "red brick, day[1s] | hedge, night[2s]"  # four latent frames a second
        blocks = list(some.stream(prompt, controls="W*20", seed=7, blocks=6))
        wanted = ["hedge, night" if i * block_frames >= 4 else "red brick, day" for i in range(6)]
        assert [block.applied.prompt for block in blocks] == wanted
        with some.session("red brick, day", seed=7) as session:
            for block, text in zip(blocks, wanted, strict=True):
                session.control(prompt=text)
                assert same(session.step(block.applied.keys), block)
        plain = list(some.stream("red brick, day", controls="W*20", seed=7, blocks=6))
        assert [same(a, b) for a, b in zip(blocks, plain, strict=True)] == [
            text == "red brick, day" for text in wanted
        ]


def test_everything_is_checked_before_the_first_block(world: World) -> None:
    for wrong in (
        {"prompt": "red brick[1s] | zebra"},
        {"controls": "Q"},
        {"seed": -1},
        {"blocks": 0},
        {"steps": 0},
        {"cache": "recent=x"},
    ):
        with pytest.raises(ValueError):
            world.stream(**wrong)


def test_seeds_name_noise(world: World) -> None:
    one, again, other = (next(world.stream(seed=seed)) for seed in (2**64 - 1, 2**64 - 1, 0))
    assert same(one, again) and not torch.equal(one.latents, other.latents)


# --- a session -----------------------------------------------------------------------------------


def test_a_fork_goes_on_alike_and_then_its_own_way(world: World, wide: World) -> None:
    for some in (world, wide):
        with some.session("red brick", seed=8) as session:
            session.control(buttons={"KeyW"})
            before = steps(session, 5)
            with session.fork() as twin:
                assert (twin.block, twin.frame, twin.held) == (5, session.frame, W)
                for _ in range(4):  # in turns: neither may see the other's work
                    assert same(twin.step(), session.step())
                twin.control(buttons={"KeyL"}, prompt="night")
                apart = steps(twin, 6)
            after = steps(session, 6)
        assert not torch.equal(apart[0].latents, after[0].latents)
        straight = list(some.stream("red brick", [W] * 60, seed=8, blocks=15))
        assert all(map(same, before, straight)) and all(map(same, after, straight[9:]))


def test_a_fork_outlives_what_it_was_forked_from(world: World) -> None:
    session = world.session(seed=9)
    steps(session, 3)
    twin = session.fork()
    session.close()
    with twin, world.session(seed=1) as stranger:  # takes the pages that came free
        steps(stranger, 4)
        ours = steps(twin, 4)
    assert all(map(same, ours, list(world.stream(controls="", seed=9, blocks=7))[3:]))


def test_given_blocks_count_and_draw_no_noise(wide: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import worldsim.maker as home

    drawn: list[tuple[int, int]] = []
    noise = home.noise

    def spy(seed: int, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        drawn.append((block, step))
        return noise(seed, block, step, shape)

    made = list(wide.stream(controls="W*5", seed=10, blocks=4))
    monkeypatch.setattr(home, "noise", spy)
    with wide.session(seed=10) as session:
        for block in made[:2]:
            given = session.decode(session.give(block.latents, block.applied.keys))
            assert same(given, block)
        assert drawn == []
        for block in made[2:]:
            assert same(session.step(block.applied.keys), block)
        with pytest.raises(ValueError, match="a given block must be"):
            session.give(made[0].latents[:, :, :1])
    assert drawn == [(block, step) for block in (2, 3) for step in range(wide.config.steps)]


def test_on_step_tells_the_cells(world: World) -> None:
    cells: list[Cell] = []
    with world.session(steps=2) as session:
        for _ in range(3):
            session.step(on_step=lambda cell, _: cells.append(cell))
    assert [(cell.block, cell.level) for cell in cells] == [
        (b, s) for b in range(3) for s in (0, 1)
    ]


def test_memory_stays_where_it_is(world: World, wide: World) -> None:
    for some, cache in ((world, "recent=3"), (wide, "sink=1,recent=4"), (wide, None)):
        with some.session(cache=cache) as session:
            steps(session, 8)
            pool, view = some.pool.addresses(), [x.data_ptr() for x in session.view.keys]
            used, size = some.pool.used_pages, session.view.nbytes
            for _ in range(60):
                session.step()
            assert some.pool.addresses() == pool
            assert [x.data_ptr() for x in session.view.keys] == view
            assert (some.pool.used_pages, session.view.nbytes) == (used, size)
            assert len(session.context.table) == session.settings.cache.capacity


def test_a_window_forgets(make_world: MakeWorld) -> None:
    """What left the window has no influence any more, and what is in it has."""
    world = make_world(block_frames=1)
    made = list(world.stream(controls="W*9", blocks=4, cache="recent=2"))

    def last(changed: int) -> Tensor:
        with world.session(cache="recent=2") as session:
            for i, block in enumerate(made[:3]):
                session.give(block.latents + (i == changed), block.applied.keys)
            return session.denoise(made[3].applied.keys).latents

    assert torch.equal(last(-1), made[3].latents)
    assert not torch.equal(last(1), made[3].latents)


def test_sessions_side_by_side_find_their_pages_ready(make_world: MakeWorld) -> None:
    world = make_world()
    first, second = world.session(seed=1), world.session(seed=2)
    twin = first.fork()
    assert twin.lanes, "a fork has its pages promised when it first needs them"
    pool = world.pool.addresses()
    for _ in range(10):
        for session in (first, second, twin):
            session.step()
    assert world.pool.addresses() == pool
    for session in (first, second, twin):
        session.close()
    assert world.pool.used_pages == 0
    with world.session() as later:  # opening and closing for ever takes no more either
        steps(later, 5)
    assert world.pool.addresses() == pool
