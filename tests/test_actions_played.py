"""Worlds with other controls, played: what a control changes, and what is heard of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_actions import CAMERA, MATRIX, SPECS, did

from worldsim.actions import ActionSpec
from worldsim.controls import IDLE, Control, ControlState
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.session import Session
from worldsim.state import Block
from worldsim.world import World

Playing = Callable[..., World]


@pytest.fixture
def playing(make_world: Callable[..., World]) -> Playing:
    """Makes a tiny random world with other controls."""

    def made(spec: ActionSpec, **config: object) -> World:
        some = make_world(block_frames=2, steps=1, **config)
        kept = dict(some.transformer.config)
        sizes = {name: value for name, value in kept.items() if not name.startswith("_")}
        with torch.random.fork_rng():
            torch.manual_seed(7)
            dit = CausalWanTransformer3DModel(
                **sizes | {"action_dim": spec.dim, "ray_dim": spec.ray_dim}
            )
        dit.eval().requires_grad_(False)
        return World(replace(some.config, actions=spec), dit, some.autoencoder, some.text_encoder)

    return made


def latents(blocks: Sequence[Block]) -> list[bytes]:
    return [block.latents.numpy().tobytes() for block in blocks]


def streamed(world: World, controls: Sequence[Control] | str, blocks: int = 5) -> list[bytes]:
    return latents(list(world.stream(controls=controls, blocks=blocks, decoding=False)))


CHANGES = {
    "matrix": [did("KeyW"), did("Mouse0"), did(look=(2.0, 0.0)), did(look=(0.0, 2.0))],
    "oasis": [did("KeyQ"), did("Digit4"), did(look=(1.0, 0.0)), did(look=(0.0, -1.0))],
    "camera": [did("KeyW"), did(look=(9.0, 0.0)), did(move=(1.0, 0.0, 0.0)), did("Space")],
}


@pytest.mark.parametrize("name", SPECS)
def test_a_control_changes_its_block_and_none_before(name: str, playing: Playing) -> None:
    world = playing(SPECS[name])
    still = streamed(world, [did()] * 9)
    seen = set()
    for change in CHANGES[name]:
        track = [did()] * 9
        track[4] = change  # of latent frame 5: the second one of block 2
        made = streamed(world, track)
        assert made[:2] == still[:2]
        assert all(a != b for a, b in zip(made[2:], still[2:], strict=True))
        seen.add(made[2])
    assert len(seen) == len(CHANGES[name])


def test_keys_and_states_are_the_same_control(playing: Playing) -> None:
    world = playing(MATRIX)
    keys = [frozenset({"KeyW"})] * 3 + [IDLE] * 2 + [frozenset({"KeyA", "Space"})] * 4
    states = [ControlState(held, t_client=float(i), event_id=i) for i, held in enumerate(keys)]
    as_keys, as_states = (
        list(world.stream(controls=controls, blocks=5)) for controls in (keys, states)
    )
    assert latents(as_keys) == latents(as_states) == streamed(world, "W*3 .*2 A+Space*4")
    assert [b.applied for b in as_keys] == [b.applied for b in as_states]
    assert [b.applied.event for b in as_states] == [0, 2, 4, 6, 8]
    assert [keys for b in as_states for keys in b.applied.keys] == [IDLE, *keys]
    with world.session() as session:
        given = [IDLE, *keys]
        stepped = [session.denoise(given[i : i + 2]) for i in range(0, 10, 2)]
    assert latents(stepped) == latents(as_keys)


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_world_plays_the_same(name: str, playing: Playing, tmp_path: Path) -> None:
    world = playing(SPECS[name])
    world.save_pretrained(tmp_path / "world")
    loaded = World.from_pretrained(tmp_path / "world", torch.float32)
    assert loaded.actions == SPECS[name]
    track = CHANGES[name] * 2
    assert streamed(loaded, track) == streamed(world, track)


def lived(session: Session, *blocks: Sequence[ControlState]) -> list[Block]:
    """Each block after some snapshots."""
    made = []
    for states in blocks:
        for state in states:
            session.control(state=state)
        made.append(session.denoise())
    return made


def test_what_is_played_live_is_what_a_script_says(playing: Playing) -> None:
    world = playing(MATRIX)
    with world.session() as session:
        made = lived(
            session,
            [did("KeyW", look=(1.0, 0.0))],  # the first picture is moved by nothing
            [did("KeyW", "KeyS")],  # the newer one counts
            [did("KeyW"), did("KeyW", "Space"), did(look=(4.0, 2.0)), did(look=(2.0, 0.0))],
            [],
            [did("KeyA")],
        )
    assert latents(made) == streamed(
        world, "W+look(1,0) S*2 W+Space+look(3,1)*2 .*2 A*2".replace("W+Space", "Space"), 5
    )
    assert [b.applied.event for b in made] == [1, 2, 6, 6, 7]


def test_receipts_say_which_block_heeds(playing: Playing) -> None:
    world = playing(MATRIX)
    with world.session() as session:
        receipts = [session.control({"KeyW"}), session.control(set(), prompt="night")]
        assert [(r.event_id, r.block) for r in receipts] == [(1, 0), (2, 0)]
        assert session.denoise().applied.keys == (IDLE, frozenset({"KeyW"}))  # it was a tap
        receipt = session.control(state=did("KeyA", prompt="red brick", event_id=40))
        assert (receipt.event_id, receipt.block) == (40, 1)
        block = session.denoise()
        assert block.applied.keys == (frozenset({"KeyA"}),) * 2
        assert (block.applied.event, block.applied.prompt) == (40, "red brick")
        assert session.control(prompt="night").event_id == 41
        assert session.held == {"KeyA"}  # a prompt lets go of nothing
        for wrong, message in (
            ({"state": did("KeyX")}, "unknown key 'KeyX'; this world has W forward"),
            ({"state": did(scroll=1.0)}, "unknown control 'scroll'; this world has W forward"),
            ({"state": did("KeyD", prompt="elephants")}, "no word that this world knows"),
            ({"state": did(), "prompt": "night"}, "give buttons and a prompt, or a state"),
            ({"buttons": "KeyW"}, "buttons is a set of codes"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                session.control(**wrong)  # type: ignore[arg-type]
            assert "\n" not in str(error.value)
            assert (session.held, session.prompt) == ({"KeyA"}, "night")
        with pytest.raises(ValueError, match="a prompt is asked for by"):
            session.step([did(prompt="night")] * 2)
        with pytest.raises(ValueError, match="KeyW and KeyS cannot be held at once"):
            session.step([did("KeyW", "KeyS")] * 2)
        assert session.block == 2


def test_a_tap_survives_a_fork_a_file_a_restore_and_an_aborted_block(
    playing: Playing, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    world = playing(CAMERA)
    with world.session() as session:
        session.step()
        session.control({"KeyW"})
        session.control(state=did(look=(6.0, 0.0)))
        here = session.snapshot()
        session.save(tmp_path / "tapped.safetensors")
        with session.fork() as twin:
            wanted = twin.step()
        with world.load_session(tmp_path / "tapped.safetensors") as loaded:
            assert latents([loaded.step()]) == latents([wanted])
        assert wanted.applied.controls == (did("KeyW", look=(3.0, 0.0)),) * 2
        with pytest.raises(Stop):
            session.step(on_step=stop)
        assert latents([session.step()]) == latents([wanted])
        assert session.step().applied.controls == (did(),) * 2
        session.restore(here)
        assert latents([session.step()]) == latents([wanted])
        session.rewind(1)
        assert session.pose == here.moment.pose
        assert session.step().applied.controls == (did(),) * 2


def test_places_are_found_again_in_three_dimensions(playing: Playing) -> None:
    seeing = replace(CAMERA, field_of_view=1.2, periods=(8.0,))
    assert seeing.camera is not None and seeing.ray_dim == 8 + 4
    world = playing(seeing, cache="sink=1,mid=2:pose,bank=8,recent=2,positions=packed")
    script = "W*4 W+look(40,-5)*4 S*4 A*3"
    blocks = list(world.stream(controls=script, blocks=9, decoding=False))
    with world.session() as session:
        again = [session.denoise(block.applied.controls) for block in blocks]
    assert latents(again) == latents(blocks)
    assert all(bool(block.latents.isfinite().all()) for block in blocks)
