"""The files and pipes that pictures end in: what plays, what is refused, and a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image
from test_streaming import WAIT, run_python

from worldsim.streaming.pipeline import Writer
from worldsim.streaming.sinks import Frames, RawSink, SinkClosed, enlarged, open_sink
from worldsim.streaming.video_sinks import VideoSink


def moving(count: int, height: int = 32, width: int = 48) -> Frames:
    """A coloured gradient that drifts: every frame differs from the one before."""
    y, x = np.mgrid[:height, :width]
    shades = [
        np.stack([x * 4 + 3 * i, y * 5 + i, np.full_like(x, 60 + i)], -1) for i in range(count)
    ]
    return (np.stack(shades) % 256).astype(np.uint8)


def decoded(path: Path) -> tuple[Frames, list[float]]:
    """All frames of a video file, and their times in seconds."""
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    frames = np.stack([picture.to_ndarray(format="rgb24") for picture in pictures])
    return frames, [float(picture.time) for picture in pictures]


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("fps", [16, 24, 12.5])
def test_mp4_round_trip(tmp_path: Path, fps: float, scale: int) -> None:
    path = tmp_path / "out.mp4"
    frames = moving(60)
    with open_sink(path, fps, scale) as sink:
        sink.write(frames[:7])
        sink.write(frames[7:])
    sink.close()
    found, times = decoded(path)
    assert found.shape == (60, 32 * scale, 48 * scale, 3)
    np.testing.assert_allclose(times, np.arange(60) / fps, atol=1e-4)
    smaller = found[:, ::scale, ::scale].astype(int)
    assert np.abs(smaller - frames).mean() < (6 if scale == 1 else 3)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps)


def test_mp4_keeps_colours_and_says_which(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (128, 128, 128)]
    with open_sink(path, fps=5) as sink:
        sink.write(np.stack([np.full((16, 16, 3), colour, np.uint8) for colour in colours]))
    found, _ = decoded(path)
    assert np.abs(found[:, 8, 8].astype(int) - colours).max() <= 3
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_range) == (6, 1)  # BT.601, limited range


def test_mp4_has_a_keyframe_every_second(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with open_sink(path, fps=10) as sink:
        sink.write(np.zeros((35, 16, 16, 3), np.uint8))
    with av.open(str(path)) as container:
        keys = [p.pts * p.time_base for p in container.demux(video=0) if p.size and p.is_keyframe]
    assert keys == [0, 1, 2, 3]


def test_mp4_plays_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    code = (
        "import sys, numpy as np\n"
        "from worldsim.streaming.sinks import open_sink\n"
        "noise = np.random.default_rng(0)\n"
        "sink = open_sink(sys.argv[1], fps=16)\n"
        "while True:\n"
        "    sink.write(noise.integers(0, 255, (8, 32, 48, 3), np.uint8))\n"
        "    print('8 frames', flush=True)\n"
    )
    with run_python(code, path, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(10):
            assert child.stdout.readline()
        child.kill()
    frames, times = decoded(path)
    assert len(frames) >= 80 - 16 - 16  # all but the open second and what the encoder looks ahead
    assert frames.shape[1:] == (32, 48, 3)
    np.testing.assert_allclose(times, np.arange(len(frames)) / 16, atol=1e-4)


@pytest.mark.parametrize(("suffix", "error"), [(".gif", 3.0), (".webp", 0.0)])
@pytest.mark.parametrize("scale", [1, 3])
def test_animation_round_trip(tmp_path: Path, suffix: str, error: float, scale: int) -> None:
    path = tmp_path / f"out{suffix}"
    frames = moving(16, 15, 21)
    with open_sink(path, fps=16, scale=scale) as sink:
        sink.write(frames[:5])
        sink.write(frames[5:])
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    durations, pictures = [], []
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            durations.append(image.info["duration"])
            pictures.append(np.asarray(image.convert("RGB")))
    found = np.stack(pictures)
    assert found.shape == (16, 15 * scale, 21 * scale, 3)
    assert abs(sum(durations) - 1000) <= 10
    assert np.abs(found[:, ::scale, ::scale].astype(int) - frames).mean() <= error


@pytest.mark.parametrize("target", ["frames/", "frames/%05d.png"])
def test_png_round_trip(tmp_path: Path, target: str) -> None:
    (tmp_path / "frames").mkdir()
    frames = moving(3, 5, 7)
    with open_sink(f"{tmp_path}/{target}", fps=16, scale=2) as sink:
        sink.write(frames[:1])
        sink.write(frames[1:])
    files = sorted((tmp_path / "frames").iterdir())
    assert [f.name for f in files] == ["00000.png", "00001.png", "00002.png"]
    for file, frame in zip(files, frames, strict=True):
        np.testing.assert_array_equal(imageio.imread(file), enlarged(frame, 2))


def test_raw_frames_go_to_stdout() -> None:
    code = (
        "import numpy as np\n"
        "from worldsim.streaming.sinks import open_sink\n"
        "with open_sink('-', fps=16) as sink:\n"
        "    sink.write(np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)[:, :, ::-1])\n"
    )
    with run_python(code, stdout=subprocess.PIPE) as child:
        output = child.communicate(timeout=WAIT)[0]
    frames: Frames = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)[:, :, ::-1]
    assert output == frames.tobytes()
    assert child.returncode == 0


def test_a_reader_that_leaves_ends_the_stream_cleanly() -> None:
    code = (
        "import numpy as np\n"
        "from worldsim.streaming.pipeline import Writer\n"
        "from worldsim.streaming.sinks import SinkClosed, open_sink\n"
        "try:\n"
        "    with Writer(open_sink('-', fps=16)) as writer:\n"
        "        while True:\n"
        "            writer.write(np.zeros((8, 64, 64, 3), np.uint8))\n"
        "except SinkClosed:\n"
        "    raise SystemExit(7)\n"
    )
    with run_python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert len(child.stdout.read(1000)) == 1000
        child.stdout.close()
        assert child.wait(WAIT) == 7
        assert child.stderr.read() == b""


def test_a_broken_pipe_is_a_closed_sink() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(SinkClosed, match="closed the pipe"), RawSink(writer) as sink:
        sink.write(moving(1))
    os.close(writer)


def test_raw_frames_do_not_go_to_a_terminal() -> None:
    leader, terminal = os.openpty()
    with pytest.raises(ValueError, match="pipe them"):
        RawSink(terminal)
    os.close(leader)
    os.close(terminal)


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.webp", "%05d.png"])
def test_without_frames_nothing_changes(tmp_path: Path, name: str) -> None:
    with open_sink(tmp_path / name, fps=16) as sink:
        sink.write(moving(1)[:0])
    assert list(tmp_path.iterdir()) == []

    existing = tmp_path / name.replace("%05d", "00000")
    existing.write_bytes(b"precious")
    with open_sink(tmp_path / name, fps=16):
        pass
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(existing.name, b"precious")]


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.webp"])
def test_an_existing_file_is_replaced_by_frames(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x" * 10**6)
    with open_sink(path, fps=16) as sink:
        sink.write(moving(4))
    assert 0 < path.stat().st_size < 10**5
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("target", "fps", "scale", "error", "line"),
    [
        ("out.avi", 16, 1, ValueError, "name it like out.mp4"),
        ("out", 16, 1, ValueError, "name it like out.mp4"),
        ("", 16, 1, OSError, "is a folder"),
        ("nowhere/out.mp4", 16, 1, OSError, "mkdir -p"),
        ("nowhere/out.gif", 16, 1, OSError, "mkdir -p"),
        ("nowhere/", 16, 1, OSError, "mkdir -p"),
        ("file/out.mp4", 16, 1, OSError, "mkdir -p"),
        ("folder", 16, 1, OSError, "is a folder"),
        ("folder.mp4", 16, 1, OSError, "is a folder"),
        ("frame.png", 16, 1, ValueError, "frames/%05d.png"),
        ("%d-%d.png", 16, 1, ValueError, "frames/%05d.png"),
        ("%s.png", 16, 1, ValueError, "frames/%05d.png"),
        ("x" * 300 + ".mp4", 16, 1, OSError, "too long"),
        ("out.mp4", 0, 1, ValueError, "fps is 0"),
        ("out.mp4", float("nan"), 1, ValueError, "fps is nan"),
        ("out.mp4", float("inf"), 1, ValueError, "fps is inf"),
        ("out.gif", 60, 1, ValueError, "at most 50"),
        ("out.mp4", 16, 0, ValueError, "scale is 0"),
    ],
)
def test_bad_targets_fail_at_once_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    fps: float,
    scale: int,
    error: type[Exception],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.mp4"):
        Path(folder).mkdir()
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        open_sink(target, fps, scale)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_fails_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        open_sink(tmp_path / "out.mp4", fps=16)


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        (np.zeros((1, 16, 16, 3), np.float32), "not uint8"),
        (np.zeros((16, 16, 3), np.uint8), "not uint8"),
        (np.zeros((1, 3, 16, 16), np.uint8), "not uint8"),
        (np.zeros((1, 18, 16, 3), np.uint8), "change from"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: Frames, line: str) -> None:
    path = tmp_path / "out.mp4"
    with open_sink(path, fps=16) as sink:
        sink.write(np.zeros((1, 16, 16, 3), np.uint8))
        with pytest.raises(ValueError, match=line):
            sink.write(frames)
    assert len(decoded(path)[0]) == 1


def test_odd_sizes_are_refused_before_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"precious")
    with open_sink(path, fps=16) as sink, pytest.raises(ValueError, match="use scale=2"):
        sink.write(moving(1, 15, 16))
    assert path.read_bytes() == b"precious"
    with open_sink(path, fps=16, scale=2) as sink:
        sink.write(moving(1, 15, 16))
    assert decoded(path)[0].shape == (1, 30, 32, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["out.mp4", "00000.png"])
def test_a_full_disk_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    target = str(tmp_path / name.replace("00000", "%05d"))
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    with pytest.raises(OSError) as caught, open_sink(target, fps=16) as sink:
        sink.write(noise)
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_reached_the_disk_before_it_was_full_plays(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores the signal
    try:
        with pytest.raises(OSError, match="cannot write"), open_sink(path, fps=8) as sink:
            for start in range(0, 64, 4):
                sink.write(noise[start : start + 4])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 8 <= len(decoded(path)[0]) < 64


@pytest.mark.parametrize("name", ["out.gif", "out.webp"])
def test_a_failed_animation_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"precious")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoSink, "_flush", full)
    with pytest.raises(OSError, match="No space left"), open_sink(path, fps=16) as sink:
        sink.write(moving(2))
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_recording_plays(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    frames = moving(40)
    with pytest.raises(KeyboardInterrupt), Writer(open_sink(path, fps=16)) as writer:
        for start in range(0, 40, 8):
            writer.write(frames[start : start + 8])
        raise KeyboardInterrupt
    assert len(decoded(path)[0]) == 40
