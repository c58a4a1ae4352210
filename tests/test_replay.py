"""Recorded runs: made again to the bit in another process, and told where they are not."""

import json
import random
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from conftest import command, random_world

from worldsim.replay import Differs, Replay, Run, parse_run, read_run
from worldsim.session import Session
from worldsim.world import World

KEYS = ("KeyW", "KeyA", "KeyL", "KeyJ")


def played(session: Session, blocks: int = 200, changes: int = 50) -> Session:
    """A long run with everything in it; returns its fork."""
    dice = random.Random(3)
    at = set(dice.sample(range(1, blocks), changes))
    twin = None
    for block in range(blocks):
        if block in at:
            session.control(buttons={key for key in KEYS if dice.random() < 0.4})
        if block in (blocks // 4, blocks // 2):
            session.control(prompt=("night", "red brick")[block == blocks // 2])
        if block == blocks // 3:
            session.pause()
            session.resume()
        if block == 2 * blocks // 3:
            session.rewind(session.block - 7)
        if block == 3 * blocks // 4:
            twin = session.fork()
        session.step()
        if twin is not None and block % 3 == 0:
            twin.control(buttons={dice.choice(KEYS)})
            twin.step()
    assert twin is not None
    return twin


CODE = """
import sys, torch
from worldsim import World
from worldsim.replay import Replay, read_run
torch.set_num_threads(int(sys.argv[3]))
run = read_run(sys.argv[2])
made = list(Replay(World.from_pretrained(sys.argv[1], torch.float32), run))
print(len(made), {branch for branch, _ in made})
"""


def test_a_long_run_is_made_again_elsewhere(world_folder: Path, tmp_path: Path) -> None:
    world, path = World.from_pretrained(world_folder, torch.float32), tmp_path / "run.wsrun"
    with world.session(seed=7, cache="sink=1,recent=3,prompt=recache", history=2**22) as session:
        session.record(path)
        played(session).close()
    for threads in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", CODE, world_folder, path, threads],
            capture_output=True, text=True, cwd=tmp_path, check=True,
        ).stdout  # fmt: skip
        assert told.split(maxsplit=1) == [str(read_run(path).blocks), "{0, 1}\n"]


def record(world: World, path: Path, **options: object) -> None:
    with world.session("red brick", seed=7, **options) as session:  # type: ignore[arg-type]
        session.record(path)
        for block in range(6):
            session.control(buttons={KEYS[block % 4]})
            session.step()


def verify(world: World, path: Path) -> int:
    return len(list(Replay(world, read_run(path))))


def test_what_was_changed_is_told_at_the_first_block_that_differs(
    world: World, tmp_path: Path
) -> None:
    path, other = tmp_path / "run.wsrun", tmp_path / "other.wsrun"
    record(world, path)
    assert verify(world, path) == 6
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]

    def tampered(**fields: object) -> Path:
        settings = {**head["settings"]["fields"], **fields}
        told = {**head, "settings": {**head["settings"], "fields": settings}}
        other.write_text("\n".join(map(json.dumps, (told, *lines))) + "\n")
        return other

    with pytest.raises(Differs, match=r"block 0 differs: .* is made here \(the file, or"):
        verify(world, tampered(seed=8))
    lines[3]["controls"] = [{"buttons": ["KeyS"]}]
    with pytest.raises(Differs, match=r"^block 3 differs"):
        verify(world, tampered())
    changed = random_world()
    changed.transformer.proj_out.bias.data += 1
    with pytest.raises(Differs, match=r"block 0 differs.*had other weights or another world"):
        verify(changed, path)


def test_blocks_that_are_dropped_and_forks_are_in_it(world: World, tmp_path: Path) -> None:
    path = tmp_path / "run.wsrun"
    with world.session(seed=1) as session:
        session.record(path)
        session.step()
        before = session.snapshot()
        session.step()
        session.restore(before)  # it was made, and nobody saw it
        session.control(buttons={"KeyL"})
        with session.fork() as twin:
            twin.step()
            session.step()
            with pytest.raises(ValueError, match="can only go back along its own way"):
                session.restore(twin.snapshot())
    run = read_run(path)
    assert [next(iter(line)) for line in run.lines] == [
        "block", "block", "rewind", "fork", "block", "block"
    ]  # fmt: skip
    assert [branch for branch, _ in Replay(world, run)] == [0, 0, 1, 0]
    assert (run.way(), run.way(1)) == ([0, 3], [0, 2])
    with pytest.raises(ValueError, match=r"no branch 2: this recording has \[0, 1\]"):
        run.way(2)


def test_forks_that_are_gone_keep_their_numbers(world: World, tmp_path: Path) -> None:
    path = tmp_path / "run.wsrun"
    with world.session(seed=1) as session:
        session.record(path)
        for _ in range(2):
            session.step()
            session.fork().close()
    run = read_run(path)
    assert [line["fork"] for line in run.lines if "fork" in line] == [1, 2]
    assert len(list(Replay(world, run))) == 2
    assert world.pool.used_pages == 0


def ways(lines: list[dict[str, int]]) -> dict[int, list[int]]:
    """Of every branch, as it was done."""
    ways: dict[int, list[int]] = {0: []}
    made = -1
    for line in lines:
        own = ways.setdefault(line.get("branch", 0), [])
        if "fork" in line:
            ways[line["fork"]] = list(own)
        elif "rewind" in line:
            del own[line["rewind"] :]
        else:
            own.append(made := made + 1)
    return ways


def test_the_way_to_the_end_of_any_branch() -> None:
    dice = random.Random(5)
    for _ in range(300):
        lines = []
        for _ in range(dice.randrange(60)):
            line = dice.choice(({"block": 0},) * 5 + (
                {"rewind": dice.randrange(9)}, {"fork": dice.randrange(4)}
            ))  # fmt: skip
            lines.append({**line, "branch": dice.randrange(4)})
        run = Run({}, tuple(lines))
        for branch, way in ways(lines).items():
            assert run.way(branch) == way


def test_very_many_forks_take_no_more_than_their_lines() -> None:
    forks = [{"fork": number} for number in range(1, 20_001)]
    run = Run({}, tuple([{"block": 0}] * 20_000 + forks))
    tracemalloc.start()
    try:
        assert run.way(20_000) == list(range(20_000))
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_given_blocks_are_in_it(tmp_path: Path) -> None:
    wide, path = random_world(block_frames=3), tmp_path / "run.wsrun"
    given = torch.randn(wide.latents_of((32, 48), 6), generator=torch.Generator().manual_seed(1))
    with wide.session(given=given, guidance=2.0) as session:
        session.record(path)
        session.step()
    blocks = [block for _, block in Replay(wide, read_run(path))]
    assert torch.equal(torch.cat([b.latents for b in blocks[:2]], dim=2), given)


def test_a_file_that_was_cut_off_is_good_up_to_its_last_line(world: World, tmp_path: Path) -> None:
    path = tmp_path / "run.wsrun"
    record(world, path)
    data = path.read_bytes()
    for cut in (1, 40, 300):
        run = parse_run(data[:-cut])
        assert run.blocks == data[:-cut].count(b"\n") - 1 < 6 and run.cut
        assert len(list(Replay(world, run))) == run.blocks


def test_a_full_disk_ends_the_recording_and_not_the_session(world: World) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with world.session() as session, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recorder = session.record("/dev/full")
        for _ in range(3):
            session.step()
    assert [str(w.message) for w in said] == [recorder.error]
    assert recorder.error == "recording to /dev/full has ended: No space left on device"


@pytest.mark.parametrize(
    ("data", "said"),
    (
        (b"", "is no recording"),
        (b"{}\n", "is no recording"),
        (b"\x00\xff\n", "line 1 is damaged"),
        (b'{"wsrun": 1}\n[]\n', "line 2 is damaged"),
        (b"[" * 10_000 + b"\n", "line 1 is damaged"),
    ),
)
def test_bad_files_are_one_line(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_run(data)


@pytest.mark.parametrize(
    "line",
    (
        {"block": 1}, {"block": 0}, {"block": 0, "controls": [{"x": 1}], "hash": ""},
        {"rewind": 5}, {"block": 0, "branch": 2}, {"rewind": "x"}, {"rewind": []},
        {"block": 0, "controls": [{}], "hash": "", "changes": [{"event": "explode"}]},
        {"block": 0, "controls": 3, "hash": ""}, {"fork": {}},
        {"block": 0, "controls": [{}], "hash": "", "given": "AAAA"},
        {"block": 0, "controls": [{}], "hash": "", "given": 4},
    ),
)  # fmt: skip
def test_lines_that_make_no_sense_are_one_line(world: World, tmp_path: Path, line: dict) -> None:  # type: ignore[type-arg]
    path = tmp_path / "run.wsrun"
    record(world, path)
    head = path.read_bytes().partition(b"\n")[0]
    with pytest.raises(ValueError):
        list(Replay(world, parse_run(head + b"\n" + json.dumps(line).encode() + b"\n")))
    assert world.pool.used_pages == 0
    with pytest.raises(ValueError):
        Replay(world, parse_run(json.dumps({"wsrun": 1, "settings": line}).encode() + b"\n"))


def test_what_cannot_be_recorded_says_so(world: World, tmp_path: Path) -> None:
    path = tmp_path / "run.wsrun"
    with world.session() as session:
        session.step()
        with pytest.raises(ValueError, match="record before the first block"):
            session.record(path)
    own = world.session(noise=lambda *at: torch.zeros(at[-1]))
    with own as session, pytest.raises(ValueError, match="noise= of its own"):
        session.record(path)
    with (
        world.session(
            prompt_embeds=torch.zeros(1, 2, 256)[..., : world.transformer.config.text_dim]
        ) as s,
        pytest.raises(ValueError, match="prompt_embeds cannot be recorded"),
    ):
        s.record(path)
    assert not path.exists()


def test_the_command_line_records_and_replays(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def told(*args: object, code: int = 0) -> str:
        done = command(*args)
        assert done.code == code, done.err
        return done.err

    told("stream", "a.gif", "--world", world_folder, "--seconds", 1, "--record", "run.wsrun")
    assert "bit for bit" in told("replay", "run.wsrun", "--verify", "--out", "b.gif")
    assert (tmp_path / "b.gif").stat().st_size > 0
    text = (tmp_path / "run.wsrun").read_text()
    (tmp_path / "run.wsrun").write_text(text.replace('"KeyW"', '"KeyS"', 1))
    assert "differs: " in told("replay", "run.wsrun", "--verify", code=1)
    (tmp_path / "run.wsrun").write_text(text.replace(str(world_folder), "some/world"))
    assert "which is not here: name it by --world" in told("replay", "run.wsrun", code=2)
    (tmp_path / "run.wsrun").write_text(text.partition("\n")[0] + "\n")
    assert "run.wsrun holds no block" in told("replay", "run.wsrun", "--verify", code=2)
