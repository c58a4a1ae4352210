"""Two settings side by side: likeness, drift, bytes, a video; every mistake in one line."""

import json
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import MakeWorld

from worldsim.apps import compare, setting
from worldsim.apps.compare import CompareOptions, run
from worldsim.apps.compare_tables import shown
from worldsim.apps.drift import Drift
from worldsim.apps.setting import Setting
from worldsim.apps.side import Side
from worldsim.metrics import psnr
from worldsim.models.autoencoder import GROUP
from worldsim.world import World

SCRIPT = "W*3 L*2"
WAIT = 120.0  # seconds; a limit for what must happen, never a pause
CAP = 48.13  # dB: what `psnr` gives for equal clips


def options(a: str, b: str, **given: object) -> CompareOptions:
    """Options of a short run; ``given`` overrides them."""
    usual = {
        "prompt": "red brick", "controls": SCRIPT, "seconds": 1.25, "seed": 3, "out": None,
        "scale": 0, "device": "cpu", "threads": 1, "json": None,
    }  # fmt: skip
    return CompareOptions(a, b, **{**usual, **given})


def compared(tmp_path: Path, a: str, b: str, **given: object) -> dict:
    """What the run writes as JSON."""
    path = tmp_path / "compare.json"
    run(options(a, b, json=path, **given))
    return json.loads(path.read_text())


@pytest.fixture
def tiny(world_folder: Path) -> str:
    return f"world={world_folder} dtype=float32"


# --- figures -------------------------------------------------------------------------------------


def test_equal_settings_give_equal_pictures(tmp_path: Path, tiny: str, capsys) -> None:
    own = World.from_pretrained(Setting.parse(tiny).world).config.steps
    figures = compared(tmp_path, tiny, f"{tiny} steps={own}")
    assert figures["identical"] and figures["first_difference"] is None
    assert figures["pictures"] == 20
    assert [row["second"] for row in figures["seconds"]] == [1, 1.25]
    for row in figures["seconds"]:
        assert row["psnr"] == pytest.approx(CAP, abs=0.01)
        assert row["ssim"] == pytest.approx(1, abs=1e-9)
        assert row["A"] == row["B"]
    assert figures["A"]["drift"] == figures["B"]["drift"]
    assert figures["A"]["bytes"] == figures["B"]["bytes"]
    out = capsys.readouterr().out
    assert "all 20 pictures are bit-identical" in out and "48.13" in out


def test_other_settings_differ(tmp_path: Path, tiny: str, capsys) -> None:
    a, b = f"{tiny} cache=recent=2 steps=1", f"{tiny} schedule=renoise:1000,500"
    figures = compared(tmp_path, a, b)
    assert figures["first_difference"] == 0 and not figures["identical"]
    assert max(row["psnr"] for row in figures["seconds"]) < CAP - 1
    assert max(row["ssim"] for row in figures["seconds"]) < 0.99
    one, two = figures["A"], figures["B"]
    assert (one["steps"], two["steps"]) == ([1000], [1000, 500])
    assert (one["sampler"], two["sampler"]) == ("euler", "renoise")
    assert one["cache"] == "sink=0,recent=2,positions=absolute" != two["cache"]
    assert one["bytes"]["context"] < two["bytes"]["context"]
    assert one["bytes"]["carry"] == two["bytes"]["carry"] > 0
    for side, given in ((one, a), (two, b)):
        assert Setting.parse(side["setting"]) == Setting.parse(given)
        assert set(side["ms"]) == {"denoise", "commit", "decode"} and side["fps"] > 0
        assert side["dtype"] == "float32" and side["timed_blocks"] == 5
        assert len(side["drift"]["sharpness"]) == len(side["drift"]["motion"]) == 2
        assert side["drift"]["vde"] >= 0 and side["drift"]["colour"] >= 0
    assert figures["size"] == [32, 48] and figures["fps"] == 16
    told = [figures[name] for name in ("seed", "prompt", "controls")]
    assert told == [3, "red brick", SCRIPT]
    assert {"processor", "torch", "threads"} <= set(figures["machine"])
    assert "not bit-identical, from the first picture on" in capsys.readouterr().out


def test_pictures_are_those_of_a_stream(make_world: MakeWorld) -> None:
    """Beside a twin of another setting on the same world, with a prompt that changes."""
    world = make_world()
    script = world.script("red brick[0.5s] | night", "W*2 L*4")
    sides = [
        Side(Setting.parse(line), world, script, 7)
        for line in ("steps=2 cache=recent=3", "steps=3 cache=recent=1")
    ]
    for _ in range(6):
        for side in sides:
            side.step()
    frames = sides[0].take(21)
    stream = world.stream(
        "red brick[0.5s] | night", "W*2 L*4", 7, blocks=6, steps=2, cache="recent=3"
    )
    assert np.array_equal(frames, np.concatenate([block.frames for block in stream]))


def test_one_world_is_loaded_once(tmp_path: Path, tiny: str, monkeypatch) -> None:
    opened = []

    def noting(*arguments: object) -> World:
        opened.append(arguments)
        return open_world(*arguments)

    open_world = setting.open_world
    monkeypatch.setattr(setting, "open_world", noting)
    compared(tmp_path, tiny, f"{tiny} steps=1", seconds=0.2)
    assert len(opened) == 1
    compared(tmp_path, tiny, tiny.replace("float32", "bfloat16"), seconds=0.2)
    assert len(opened) == 3


def test_the_script_is_the_length_unless_told(tmp_path: Path, tiny: str) -> None:
    assert compared(tmp_path, tiny, tiny, seconds=None)["pictures"] == 1 + GROUP * 5


def test_worlds_of_other_blocks_compare(tmp_path: Path, tiny: str, make_world: MakeWorld) -> None:
    make_world(block_frames=3).save_pretrained(tmp_path / "wide")
    figures = compared(tmp_path, tiny, f"world={tmp_path / 'wide'} dtype=float32")
    assert figures["pictures"] == 20 and len(figures["seconds"]) == 2


def test_bytes_are_what_the_pool_gave(make_world: MakeWorld) -> None:
    world = make_world()
    session = Setting(cache="recent=4").session(world)
    assert session.memory_report().context == world.pool.nbytes
    endless = Setting(cache="recent=all").session(make_world())
    for _ in range(5):
        endless.step()
    endless.settle()
    report = endless.memory_report()
    page = endless.context.pool.page_nbytes(endless.context.pool.frame)
    assert report.recent == 5 * page and report.growth > page


# --- drift ---------------------------------------------------------------------------------------


def test_drift_of_a_video_that_fades() -> None:
    drift = Drift(fps=2)
    stripes = np.zeros((1, 8, 8, 3), np.uint8)
    stripes[:, :, ::2] = 1
    for level in range(200, 0, -2):  # 100 pictures, 50 seconds, fading evenly to black
        drift.add(level * stripes)
    figures = drift.figures()
    assert figures["ends_s"] == 10
    first, last = figures["sharpness"]
    assert first == pytest.approx(np.mean(range(200, 160, -2)) / 2)
    assert last == pytest.approx(np.mean(range(2, 42, 2)) / 2)
    assert figures["motion"] == pytest.approx([1, 1])
    parts = [np.mean(range(200 - 20 * i, 180 - 20 * i, -2)) for i in range(10)]
    wanted = sum((9 - i) * abs(part - parts[0]) / parts[0] for i, part in enumerate(parts[1:]))
    assert figures["vde"] == pytest.approx(wanted)
    assert figures["colour"] > 60
    seconds = drift.by_second()
    assert len(seconds) == 50
    assert seconds[0] == pytest.approx({"sharpness": 99.5, "motion": 1})


def test_drift_of_what_is_too_short_or_flat() -> None:
    drift = Drift(fps=16)
    drift.add(np.zeros((1, 8, 8, 3), np.uint8))
    figures = drift.figures()
    assert figures["motion"] is None and figures["vde"] is None and figures["colour"] == 0
    assert drift.by_second() == [{"sharpness": 0, "motion": None}]
    drift.add(np.zeros((49, 8, 8, 3), np.uint8))
    figures = drift.figures()
    assert figures["ends_s"] == 5 / 16  # a tenth of 50 pictures
    assert figures["vde"] is None and figures["motion"] == [0, 0]


def test_a_long_table_is_thinned() -> None:
    assert shown(20) == list(range(20))
    assert shown(45) == [*range(10), 19, 29, 39, 44]
    assert shown(60) == [*range(10), 19, 29, 39, 49, 59]


def test_default_is_the_setting_of_nothing() -> None:
    assert Setting.parse("default") == Setting.parse(" ") == Setting()
    assert str(Setting()) == "default"
    with pytest.raises(ValueError, match="'default' must be NAME=VALUE"):
        Setting.parse("default steps=2")


# --- the video -----------------------------------------------------------------------------------


def video(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([p.to_ndarray(format="rgb24") for p in container.decode(video=0)])


def test_the_video_shows_both(tmp_path: Path, tiny: str, world_folder: Path) -> None:
    path = tmp_path / "side.mp4"
    schedules = ("euler:1000,500", "renoise:1000,500")  # random weights: steps hardly change them
    a, b = (f"{tiny} schedule={line}" for line in schedules)
    run(options(a, b, out=str(path), scale=4))
    pictures = video(path)
    assert pictures.shape == (20, 4 * 32, 4 * (2 * 48 + compare.GAP), 3)
    world = World.from_pretrained(world_folder, torch.float32)
    halves = (pictures[:, :, : 4 * 48], pictures[:, :, -4 * 48 :])
    for i, line in enumerate(schedules):
        stream = world.stream("red brick", SCRIPT, 3, world.blocks_for(20), schedule=line)
        made = np.concatenate([block.frames for block in stream])[:20]
        enlarged = made.repeat(4, axis=1).repeat(4, axis=2)
        assert psnr(enlarged, halves[i]) > max(30, psnr(enlarged, halves[1 - i]))


def test_interrupt_leaves_a_video_and_figures(tmp_path: Path, tiny: str) -> None:
    path, figures = tmp_path / "side.mp4", tmp_path / "compare.json"
    script = Path(sysconfig.get_path("scripts"), "worldsim")
    process = subprocess.Popen(
        [script, "compare", tiny, f"{tiny} steps=1", "--seconds", "100000", "--threads", "1",
         "--out", path, "--json", figures],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until = time.monotonic() + WAIT
    while not (path.exists() and path.stat().st_size > 100_000):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err.decode()
    assert "Traceback" not in err.decode()
    count = json.loads(figures.read_text())["pictures"]
    assert f"stopped after {count} of 1600000 pictures" in err.decode()
    assert f"{count} pictures, seed 0" in out.decode()
    assert len(video(path)) == count


# --- what cannot be ------------------------------------------------------------------------------

BAD_SETTINGS = {
    "speed=2": "'speed=2' must be NAME=VALUE",
    "steps=0": "steps must be in 1…1000",
    "steps=two": "steps must be a whole number",
    "cache=size=3": "cannot read 'size=3'",
    "schedule=heun": "is none of renoise, euler",
    "dtype=float8": "unknown dtype 'float8'",
    "world=nowhere": "no world 'nowhere'",
}
BAD_OPTIONS = [
    ({"seconds": 0.0}, "--seconds must be above 0"),
    ({"seed": -1}, "seed must be in"),
    ({"prompt": "purple elephants"}, "no word that this world knows"),
    ({"controls": "Q*2"}, "unknown key 'Q'"),
    ({"out": "-"}, "--out is a file here"),
    ({"out": "side.avi"}, "cannot tell what to write to 'side.avi'"),
    ({"out": "missing/side.mp4"}, "there is no folder missing"),
    ({"json": Path("missing/figures.json")}, "there is no folder missing"),
    ({"scale": -1}, "scale is -1"),
    ({"threads": 0}, "threads must be 1 or more"),
    ({"device": "toaster"}, "unknown device 'toaster'"),
]


def refused(folder: Path, monkeypatch, given: CompareOptions) -> str:
    """Runs what cannot be in an empty folder; returns the one line that it says."""
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, OSError)) as error:
        run(given)
    assert "\n" not in str(error.value)
    assert list(folder.iterdir()) == []
    return str(error.value)


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_setting(setting: str, tmp_path: Path, world_folder: Path, monkeypatch) -> None:
    name = setting.partition("=")[0]
    usual = {"world": f"world={world_folder}", "dtype": "dtype=float32"}
    bad = " ".join([*(line for key, line in usual.items() if key != name), setting])
    given = options(f"world={world_folder} dtype=float32", bad, out="side.mp4")
    assert BAD_SETTINGS[setting] in refused(tmp_path, monkeypatch, given)


@pytest.mark.parametrize(("wrong", "said"), BAD_OPTIONS, ids=str)
def test_bad_option(wrong: dict, said: str, tmp_path: Path, tiny: str, monkeypatch) -> None:
    given = options(tiny, f"{tiny} steps=1", **{"out": "side.mp4", **wrong})
    assert said in refused(tmp_path, monkeypatch, given)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"height": 64}, "A shows 48×32 and B 48×64: only worlds of one size compare"),
        ({"fps": 8.0}, "A shows 16 fps and B 8 fps: only worlds of one speed compare"),
        ({"controls": "S*2"}, "controls of their own that differ: give --controls"),
        ({"prompt": "night"}, "prompt of their own that differ: give --prompt"),
    ],
    ids=str,
)
def test_worlds_that_do_not_compare(
    other: dict, said: str, tmp_path: Path, tiny: str, make_world: MakeWorld, monkeypatch
) -> None:
    make_world(**other).save_pretrained(tmp_path / "other")
    (tmp_path / "here").mkdir()
    line = f"world={tmp_path / 'other'} dtype=float32"
    given = options(tiny, line, prompt=None, controls=None)
    assert said in refused(tmp_path / "here", monkeypatch, given)
