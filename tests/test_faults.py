"""What goes wrong on ranks: all end, one line says who it was, and what was made is there."""

import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import command
from torch.distributed import HashStore

from worldsim.apps.opening import open_share
from worldsim.replay import Replay, read_run
from worldsim.share import Share, shares
from worldsim.state import Block
from worldsim.streaming import faults, launch
from worldsim.streaming.faults import RankFailed, Watch
from worldsim.streaming.launch import Ranks
from worldsim.streaming.leader import Run
from worldsim.streaming.sinks import open_sink
from worldsim.streaming.video_sinks import kept_pictures
from worldsim.world import World

pytestmark = pytest.mark.filterwarnings("ignore:.* was trained to read")
LIMIT = 15.0  # seconds in which everybody has to be gone
STEPS = RANKS = 3


def failing(share: Share, folder: str, rank: int, error: Exception) -> World:
    """A world whose third block fails on one rank."""
    world, passes = open_share(folder, "float32", "cpu", None, share), 0
    forward = world.forward

    def fails(*told: object) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if share.rank == rank and passes == 3:
            raise error
        return forward(*told)

    world.forward = fails
    return world


def opened(
    folder: Path, blocks: int | None = 12, sleep: float | None = 0.05, **others: object
) -> Ranks:
    told = {"seed": 3, "steps": STEPS, "schedule": "tpp"}
    opener = partial(open_share, str(folder), "float32", "cpu", None)
    run = replace(Run(opener, RANKS, told, blocks=blocks, rehearse=sleep), **others)  # type: ignore[arg-type]
    world = World.from_pretrained(folder, torch.float32)
    return Ranks(run, shares(world.settings(**told).schedule, 2, RANKS), world)  # type: ignore[arg-type]


def gone(pids: Sequence[int | None]) -> bool:
    """Whether none of these processes is there any more, or soon."""
    until = time.monotonic() + 5
    while there := [pid for pid in pids if pid is not None and Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return not there


def failed(ranks: Ranks, made: list[Block], after: float | None = None) -> str:
    """Take what comes until it fails; everybody is gone then, in time."""
    told = ended(ranks, made, after)
    assert told, "it did not fail"
    return told


def ended(ranks: Ranks, made: list[Block], after: float | None = None) -> str:
    """Take what comes until it ends: nothing, or why it failed. Everybody is gone then, in time."""
    told = ""
    try:
        for block in ranks.blocks():
            made.append(block)
    except RankFailed as error:
        told = str(error)
    assert time.monotonic() - (after or time.monotonic()) < LIMIT
    assert gone(ranks.pids)
    assert "\n" not in told
    assert [block.index for block in made] == list(range(len(made))), "in order, none missing"
    assert all(len(block.frames) for block in made)
    return told


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("when", ("fill", "steady", "drain"))
def test_a_killed_rank_ends_the_run_with_one_line(world_folder: Path, rank: int, when: str) -> None:
    with opened(world_folder) as ranks:
        made: list[Block] = []
        blocks = ranks.blocks()
        if when == "fill":
            while not ranks.heard(0):
                time.sleep(0.01)
        else:
            count = 5 if when == "steady" else 10
            made += [next(blocks) for _ in range(count)]
        killed = ranks.pids[rank]
        assert killed is not None
        with suppress(ProcessLookupError):
            os.kill(killed, signal.SIGKILL)
        told = ended(ranks, made, time.monotonic())
        if ranks._processes[rank].exitcode == 0:
            assert when == "drain", "in the end, who has nothing left to do is gone before"
            assert not told and len(made) == 12
        else:
            assert re.match(rf"rank {rank} was killed \(SIGKILL\) at block \d+; ", told), told


def test_a_stopped_rank_is_noticed(world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "SILENT", 1.5)  # 10 s, of which nobody wants to wait here
    with opened(world_folder, blocks=None) as ranks:
        made = [next(ranks.blocks())]
        pid = ranks.pids[1]
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        told = failed(ranks, made, time.monotonic())
        assert re.match(r"rank 1 hangs: no heartbeat for \d+ s at block \d+; the run has", told)


def test_a_rank_that_never_wakes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(faults, "time", SimpleNamespace(monotonic=lambda: now))
    store = HashStore()
    watch = Watch(store, 2)
    store.set("beat/0", "1 0")
    assert watch.listen() is None
    now += faults.WAKING
    store.set("beat/0", "2 0")
    assert watch.listen() is None
    now += 1
    assert watch.listen() == 1
    assert str(watch.silent(1)).startswith("rank 1 hangs: no heartbeat for 60 s at block 0")
    store.set("beat/1", "1 0")
    assert watch.listen() is None
    now += faults.SILENT + 1
    assert watch.listen() in (0, 1)
    assert str(watch.silent(1)).startswith("rank 1 hangs: no heartbeat for 10 s at block 0")


@pytest.mark.parametrize(
    ("rank", "error", "words"),
    [
        (0, KeyError("oops"), "failed"),
        (
            1,
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"),
            "ran out of memory",
        ),
        (2, MemoryError(), "ran out of memory"),
    ],
)
def test_who_fails_says_so(world_folder: Path, rank: int, error: Exception, words: str) -> None:
    opener = partial(failing, folder=str(world_folder), rank=rank, error=error)
    with opened(world_folder, sleep=None, opener=opener) as ranks:
        told = failed(ranks, [])
    assert re.match(rf"rank {rank} {words} \(.*\) at block 2; the run has ended", told), told


def test_what_cannot_be_is_no_failure(world_folder: Path) -> None:
    with opened(world_folder, prompt="zebra") as ranks:
        with pytest.raises(ValueError, match="zebra"):
            list(ranks.blocks())
        assert gone(ranks.pids)


def test_stopped_in_the_middle_blocks_on_their_way_still_come(world_folder: Path) -> None:
    with opened(world_folder, blocks=None) as ranks:
        blocks = ranks.blocks()
        made = [next(blocks) for _ in range(3)]
        ranks.stop()
        made += blocks
        assert [block.index for block in made] == list(range(len(made)))
    assert gone(ranks.pids)
    with opened(world_folder, blocks=None) as ranks:
        next(ranks.blocks())  # and closed without a word, too
    assert gone(ranks.pids)


def test_closing_ends_whatever_hangs(world_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "SILENT", 1e6)  # nobody notices
    monkeypatch.setattr(launch, "STOPPING", 0.5)
    ranks = opened(world_folder, blocks=None)
    try:
        next(ranks.blocks())
        pid = ranks.pids[1]
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        closing = Thread(target=ranks.close, daemon=True)
        closing.start()
        closing.join(LIMIT)
        assert not closing.is_alive() and gone(ranks.pids)
    finally:
        for process in ranks._processes:
            process.kill()


def test_controls_from_outside_hold_from_their_block_on(world_folder: Path) -> None:
    with opened(world_folder, blocks=None, sleep=None, scripted=False) as ranks:
        blocks = ranks.blocks()
        first = next(blocks)
        for wrong in ({"prompt": "x y zebra"}, {"buttons": ["KeyQ"]}, {"prompt": 900 * "brick "}):
            with pytest.raises(ValueError, match=r"zebra|KeyQ|at most 4096 bytes"):
                ranks.tell("control", **wrong)
        ranks.tell("control", buttons=["KeyW"], prompt="blue tiles")
        ranks.tell("cut")
        made = [next(blocks) for _ in range(12)]
        assert not first.applied.keys[0]
        at = next(b.index for b in made if b.applied.keys[0])
        changed = made[at - 1]
        assert changed.applied.prompt == "blue tiles" and changed.applied.cut
        with pytest.raises(ValueError, match="ranks know no 'close'"):
            ranks.tell("close")
        for _ in range(200):  # before one block: the last one counts
            ranks.tell("control", prompt="red brick, night")
        later = next(block for block in blocks if block.index > made[-1].index + 4)
        assert later.applied.prompt == "red brick, night"
    world = World.from_pretrained(world_folder, torch.float32)
    with world.session(seed=3, steps=STEPS, schedule="tpp") as serial:
        for block in (first, *made):
            if block.index == at:
                serial.control(buttons=["KeyW"], prompt="blue tiles")
                serial.cut()
            expected = serial.step()
            assert torch.equal(expected.latents, block.latents), block.index
            assert expected.applied == block.applied and block.applied.event == (block.index >= at)


# --- the command -----------------------------------------------------------------------------
WORLDSIM = Path(sysconfig.get_path("scripts"), "worldsim")


def streaming(folder: Path, out: Path) -> list[str]:
    return [
        "stream", str(out), "--world", str(folder), "--schedule", "tpp", "--steps", "2",
        "--dtype", "float32", "--threads", "1",
    ]  # fmt: skip


def started(
    folder: Path, out: Path, *more: str, before: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, str(WORLDSIM), *streaming(folder, out), *more],
        stderr=subprocess.PIPE, text=True, cwd=folder.parent, start_new_session=True,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """Of a process and of its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(told[1]) == pid:
            mine = int(path.parent.name)
            found += [mine, *children(mine)]
    return found


def frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def pictures(path: Path) -> int:
    return len(frames(path))


def test_ctrl_c_ends_every_rank_and_the_file_plays(world_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "walk.mp4"
    process = started(world_folder, out, "--ranks", "2", "--seconds", "100000")
    while not (out.exists() and out.stat().st_size):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    family = children(process.pid)
    assert len(family) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and "stopped: " in told and "Traceback" not in told
    assert gone(list(family))
    assert pictures(out) > 0


def test_a_killed_rank_under_the_command(world_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "walk.mp4"
    more = ("--ranks", "2", "--seconds", "100000", "--save-every", "4")
    process = started(world_folder, out, *more)
    while not (out.exists() and out.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    family = children(process.pid)
    ranks = [p for p in family if b"forkserver" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(max(ranks), signal.SIGKILL)  # started last
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert re.search(r"^worldsim: rank \d was killed \(SIGKILL\) at block \d+; the run", told, re.M)
    assert gone(list(family)) and "Traceback" not in told
    assert re.search(
        r"^stopped: \d+ pictures .*the same command with --resume goes on$", told, re.M
    )
    assert pictures(out) > 0
    states = sorted(Path(f"{out}.state").iterdir())
    assert states, "it had saved by then"
    shown = frames(out)
    seconds = str((len(shown) + 9) / 16)
    resumed = ("--ranks", "2", "--seconds", seconds, "--resume")
    done = command(*streaming(world_folder, out), *resumed)
    assert done.code == 0, done.err
    again = frames(out)
    assert len(again) == len(shown) + 9
    kept = 1 + 4 * (int(states[0].name[-6:]) - 1)  # at least so many are the very same
    assert all((a == b).all() for a, b in zip(again[:kept], shown, strict=False))
    assert not out.with_name(f".{out.name}.before").exists()


def test_what_resume_does_not_go_on_with(world_folder: Path, tmp_path: Path) -> None:
    """Nothing of the film is lost, and states of another film are not taken."""
    out = tmp_path / "walk.mp4"
    stream = (*streaming(world_folder, out), "--ranks", "2", "--save-every", "16")
    assert command(*stream, "--seconds", "16").code == 0
    film, kept = out.read_bytes(), {path.name for path in Path(f"{out}.state").iterdir()}
    assert kept == {"block-000032", "block-000048", "block-000064"}, "the newest ones"
    for more, said in (
        (("--seconds", "18", "--seed", "5"), "under other settings: seed 0 (not 5); give the same"),
        (("--seconds", "3"), "has 256 pictures already, and 48 are asked for"),
        (("--seconds", "18", "--save-every", "-2"), "--save-every must be 1 or more"),
        (("--seconds", "16"), "has all its 256 pictures already"),
    ):
        done = command(*stream, "--resume", *more)
        assert done.code == 2 * ("already" not in said or "asked" in said), done.err
        assert said in done.err and out.read_bytes() == film and len(list(tmp_path.iterdir())) == 2
    again = (*streaming(world_folder, out), "--ranks", "2", "--prompt", "night", "--seconds")
    assert command(*again, "2", "--ranks", "1").code == 0
    assert not Path(f"{out}.state").exists(), "they were of another film"
    assert command(*again, "3", "--resume").code == 0
    whole = tmp_path / "whole.mp4"
    assert command(*streaming(world_folder, whole), "--prompt", "night", "--seconds", "3").code == 0
    assert out.read_bytes() == whole.read_bytes()
    done = command(*streaming(world_folder, out), "--record", out)
    assert done.code == 2 and "each want a file of their own" in done.err


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_it_as_well(world_folder: Path, tmp_path: Path, nodes: int) -> None:
    """Two ranks: of one agent, or of two that meet as those of two machines do."""
    out, whole = tmp_path / "walk.mp4", tmp_path / "whole.mp4"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = (
        str(Path(sys.executable).with_name("torchrun")), "--no-python", "--nnodes", str(nodes),
        "--nproc-per-node", str(2 // nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", meet,
        "--local-addr", "127.0.0.1",
    )  # fmt: skip
    agents = [started(world_folder, out, "--seconds", "1", before=torchrun) for _ in range(nodes)]
    assert command(*streaming(world_folder, whole), "--seconds", "1").code == 0
    for process in agents:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("name", "steps"), [("tpp", "2"), ("hiar", "2"), ("ring", "1")])
def test_ranks_record_what_one_rank_does(
    world_folder: Path, tmp_path: Path, name: str, steps: str
) -> None:
    recorded = [tmp_path / "one.wsrun", tmp_path / "two.wsrun"]
    prompts = ("--prompt", "red brick[0.5s] | night[0.5s#] | blue tiles")
    for ranks, path in enumerate(recorded, 1):
        done = command(
            *streaming(world_folder, tmp_path / f"{ranks}.mp4"), "--schedule", name,
            "--steps", steps, "--seconds", "1.5", "--ranks", ranks, "--record", path, *prompts,
        )  # fmt: skip
        assert done.code == 0, done.err
    one, two = (path.read_bytes() for path in recorded)
    assert one == two and b'"event": "cut"' in one and one.count(b'"hash"') == 7
    world = World.from_pretrained(world_folder, torch.float32)
    assert len(list(Replay(world, read_run(recorded[1]), verify=True))) == 7


def test_a_video_goes_on_after_its_first_pictures(tmp_path: Path) -> None:
    rng, out = np.random.default_rng(0), tmp_path / "walk.mp4"
    shown = rng.integers(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    with open_sink(out, 16) as sink:
        sink.write(shown)
    before = frames(out)
    assert kept_pictures(out) == 40
    with open_sink(out, 16, keep=21) as sink:
        sink.write(shown[21:30])
    after = frames(out)
    assert len(after) == 30
    assert all((a == b).all() for a, b in zip(after[:21], before, strict=False))
    close = [
        np.abs(a.astype(int) - b).mean() for a, b in zip(after[21:], before[21:], strict=False)
    ]
    assert max(close) < 12, "the pictures that were written after them"
    assert kept_pictures(tmp_path / "none.mp4") == 0
