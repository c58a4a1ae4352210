"""Saved sessions go on bit for bit, in another process as well; bad files are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_world
from safetensors.torch import load_file, save_file
from test_events import LINES
from test_state import roam, same

from worldsim.saving import HEADER
from worldsim.world import World


@pytest.mark.parametrize("line", LINES)
def test_a_saved_session_goes_on_in_another_world_of_the_same_weights(
    world: World, tmp_path: Path, line: str
) -> None:
    cache = f"{line},prompt=recache"
    with world.session("red brick", seed=3, cache=cache, guidance=1.5) as session:
        roam(session, 9)
        session.control(buttons={"KeyL"}, prompt="night")  # asked for, not applied yet
        session.save(tmp_path / "s.safetensors")
        straight = [session.step(), *roam(session, 11)]
    elsewhere = random_world()
    with elsewhere.load_session(tmp_path / "s.safetensors") as later:
        assert later.block == 9
        assert same([later.step(), *roam(later, 11)], straight)
        later.rewind(12)
        assert same(roam(later, 3), straight[3:6])
        with pytest.raises(ValueError, match="the way is known from 9 on"):
            later.rewind(8)
    assert sum(p.name.endswith(".part") for p in tmp_path.iterdir()) == 0


CODE = """
import sys, torch
from worldsim import World
torch.set_num_threads(int(sys.argv[3]))
world = World.from_pretrained(sys.argv[1], torch.float32)
session = world.load_session(sys.argv[2])
print(torch.cat([session.step().latents for _ in range(3)]).double().abs().sum().item().hex())
"""


def test_another_process_on_two_threads(world_folder: Path, tmp_path: Path) -> None:
    world, path = World.from_pretrained(world_folder, torch.float32), tmp_path / "s.safetensors"
    with world.session(seed=5) as session:
        roam(session, 5)
        session.save(path)
        wanted = torch.cat([session.step().latents for _ in range(3)]).double().abs().sum().item()
    told = subprocess.run(
        [sys.executable, "-c", CODE, world_folder, path, "2"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    ).stdout  # fmt: skip
    assert told.split()[-1] == wanted.hex()


def test_embeds_and_given_blocks_are_saved(tmp_path: Path) -> None:
    wide, path = random_world(block_frames=3), tmp_path / "s.safetensors"
    given = torch.randn(wide.latents_of((32, 48), 6), generator=torch.Generator().manual_seed(1))
    embeds = wide.text_encoder.encode("night")
    with wide.session(prompt_embeds=embeds, given=given) as session:
        session.save(path)
        straight = [session.step() for _ in range(3)]
    with wide.load_session(path) as later:
        assert same([later.step() for _ in range(3)], straight)


def test_what_cannot_be_saved_or_loaded_says_so(world: World, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    own = world.session(noise=lambda *at: torch.zeros(at[-1]))
    with own as session, pytest.raises(ValueError, match="noise= of its own cannot be saved"):
        session.save(path)
    with world.session() as session:
        session.step()
        session.save(path)
        with pytest.raises(OSError, match="cannot write"):
            session.save(tmp_path / "no" / "s.safetensors")
    with pytest.raises(ValueError, match="there is no file"):
        world.load_session(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or no session"):
        world.load_session(cut)
    other = random_world(fps=8.0)
    with pytest.raises(ValueError, match=r"of a world 'maze.*' with other weights or another"):
        other.load_session(path)
    with pytest.raises(ValueError, match=r"was saved in float32: load the world in it"):
        random_world().to(torch.bfloat16).load_session(path)
    save_file(load_file(path), cut)
    with pytest.raises(ValueError, match="holds no session that this version reads"):
        world.load_session(cut)


def test_a_file_that_was_tampered_with_opens_nothing(world: World, tmp_path: Path) -> None:
    path, bad = tmp_path / "s.safetensors", tmp_path / "bad.safetensors"
    with world.session() as session:
        session.step()
        session.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()[HEADER])
    told["moment"]["is"] = "Popen"
    save_file(load_file(path), bad, {HEADER: json.dumps(told)})
    used = world.pool.used_pages
    with pytest.raises(ValueError, match="damaged or no session"):
        world.load_session(bad)
    assert world.pool.used_pages == used


def test_going_back_to_where_it_was_loaded_keeps_what_was_held(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    with world.session(seed=2) as session:
        roam(session, 4)
        session.control(buttons={"KeyW"})
        session.save(path)
    with world.load_session(path) as later:
        first = later.step()
        assert first.applied.keys == (frozenset({"KeyW"}),) * world.config.block_frames
        later.rewind(4)
        assert same([later.step()], [first])


def test_a_file_that_fails_late_gives_its_pages_back(world: World, tmp_path: Path) -> None:
    path, bad = tmp_path / "s.safetensors", tmp_path / "bad.safetensors"
    with world.session(cache="sink=1,recent=3") as session:
        roam(session, 6)
        session.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()[HEADER])
    del told["decoding"]
    save_file(load_file(path), bad, {HEADER: json.dumps(told)})
    used = world.pool.used_pages
    with pytest.raises(ValueError, match="damaged or no session"):
        world.load_session(bad)
    assert world.pool.used_pages == used
