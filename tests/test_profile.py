"""`worldsim stream --profile`: the trace, its summary, and that it costs nothing when off."""

import io
import json
import signal
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeWorld, command
from rich.console import Console
from test_cli import WAIT, start, video
from torch.autograd import profiler

from worldsim.apps import profiling
from worldsim.apps.profiling import Profile
from worldsim.apps.trace import by_operator, by_part
from worldsim.parts import PARTS

CPU = torch.device("cpu")


def regions(trace: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The events of each part by block number."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for event in json.loads(trace.read_text())["traceEvents"]:
        part, named, block = event["name"].partition(" block ")
        if named:
            assert int(block) not in found[part], f"{event['name']} is there twice"
            found[part][int(block)] = event
    return found


def test_trace_names_every_part_of_consecutive_blocks(
    tmp_path: Path, world_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "BLOCKS", 8)
    arguments = ("--world", world_folder, "--cache", "recent=10", "--threads", "1")
    stream = ("stream", "w.mp4", *arguments, "--seconds", "8", "--profile", "trace.json")
    code, out, err = command(*stream)
    assert code == 0, err
    assert not profiler._is_profiler_enabled
    assert {path.name for path in tmp_path.iterdir()} == {"w.mp4", "trace.json"}
    assert len(video(tmp_path / "w.mp4")[0]) == 128

    found = regions(tmp_path / "trace.json")
    assert set(found) == set(PARTS)
    for part, blocks in found.items():
        numbers = sorted(blocks)
        assert all(b - a == 1 for a, b in pairwise(numbers)), part
        # A dozen blocks warm up and eight are looked at, but stages run ahead of each other.
        assert 12 - 3 <= numbers[0] <= 12 + 3, part
        assert 8 - 3 <= len(numbers) <= 8 + 3, part
    threads = {part: {event["tid"] for event in blocks.values()} for part, blocks in found.items()}
    assert all(len(threads[part]) == 1 for part in PARTS)
    assert threads["denoise"] == threads["commit"]
    assert len(threads["denoise"] | threads["decode"] | threads["encode"]) == 3

    block = sorted(found["denoise"].values(), key=lambda event: event["ts"])[1]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    inside = [
        event["name"]
        for event in events
        if event.get("tid") == block["tid"]
        and block["ts"] <= event.get("ts", -1) < block["ts"] + block["dur"]
    ]
    assert "aten::linear" in inside

    assert out == ""
    for shown in (*PARTS, "ms per block", "aten::", "no operator", "trace.json"):
        assert shown in err


def test_interrupted_stream_leaves_trace_and_pictures(tmp_path: Path, world_folder: Path) -> None:
    (tmp_path / "frames").mkdir()
    process = start(
        tmp_path, "stream", "frames/", "--world", world_folder, "--cache", "recent=3",
        "--seconds", "100000", "--profile", "trace.json",
    )  # fmt: skip
    until = time.monotonic() + WAIT
    while not (tmp_path / "frames" / "00050.png").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err.decode()
    assert b"Traceback" not in err and b"USDT" not in err
    pictures = len(list((tmp_path / "frames").iterdir()))
    assert pictures == int(err.split(b"stopped: ")[1].split()[0])
    assert set(regions(tmp_path / "trace.json")) == set(PARTS)


def test_stopped_before_it_began(tmp_path: Path) -> None:
    said = io.StringIO()
    profile = Profile(tmp_path / "trace.json", CPU, warm_up=13, blocks=100)
    with profile:
        for block in range(12):
            profile.after(block)
    profile.report(Console(file=said))
    assert said.getvalue() == "no trace: stopped before block 13, where it begins\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["cut", "refused"])
def test_trace_is_written_whole_or_not_at_all(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    profile = Profile(path, CPU, warm_up=0, blocks=1)

    def export(target: str) -> None:
        Path(target).write_text('{"traceEvents": [{')
        if how == "refused":
            raise OSError(28, "No space left on device")

    with profile:
        torch.ones(2).sum()
    monkeypatch.setattr(profile._profiler, "export_chrome_trace", export)
    with pytest.raises(OSError, match=r"cannot write .*make room or name another target"):
        profile.report(Console(file=io.StringIO()))
    assert path.read_text() == "an older one" and list(tmp_path.iterdir()) == [path]


def test_a_failing_stream_leaves_no_profiler_behind(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError),
        Profile(tmp_path / "trace.json", CPU, warm_up=0, blocks=1),
    ):
        assert profiler._is_profiler_enabled
        raise KeyError
    assert not profiler._is_profiler_enabled


def test_without_a_profiler_there_are_no_regions(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def region(name: str) -> None:
        raise AssertionError(f"{name} became a region")

    monkeypatch.setattr(profiler, "record_function", region)
    world = make_world()
    blocks = list(world.stream(blocks=3))
    for block in blocks:
        assert block.timings["denoise"] > 0 and block.timings["decode"] > 0
        assert (block.timings["commit"] > 0) == (block.index > 0)
    monkeypatch.setattr(profiler, "_is_profiler_enabled", True)
    with pytest.raises(AssertionError, match="denoise block 0 became a region"):
        list(world.stream(blocks=1))


# --- what a trace says ---------------------------------------------------------------------------


def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur, "args": {}}


def test_time_in_an_operator_is_its_own() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("ProfilerStep#1", 0, 999, "user_annotation"),
        event("denoise block 7", 0, 100, "user_annotation"),
        event("linear", 10, 50),
        event("addmm", 20, 30),
        event("copy", 25, 5),
        event("addmm", 50, 10),  # begins where the other ends
        event("copy", 10, 80, tid=2),  # beside all that, on another thread
        event("denoise block 8", 100, 20, "user_annotation"),
        event("decode block 8", 130, 500, "user_annotation") | {"args": {"finished": False}},
    ]
    operators = by_operator(reversed(events))
    assert {name: (round(1e6 * t.seconds), t.calls) for name, t in operators.items()} == {
        "denoise, no operator": (50 + 20, 2),
        "linear": (10, 1),
        "addmm": (25 + 10, 2),
        "copy": (5 + 80, 2),
    }
    assert {name: (round(1e6 * t.seconds), t.calls) for name, t in by_part(events).items()} == {
        "denoise": (120, 2)
    }
    kernels = [*events, event("gemm", 40, 60, "kernel", tid=7)]
    assert list(by_operator(kernels)) == ["gemm"]
