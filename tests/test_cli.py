"""The command line: files that play, and one clear line where something cannot be."""

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import MakeWorld, command
from safetensors.torch import load_file, save_file

from worldsim.apps import cli
from worldsim.apps.length import latents_asked, length
from worldsim.apps.resident import peak_mib, resident_mib
from worldsim.maze.recipe import CPU
from worldsim.world import World

CONSOLE_SCRIPT = Path(sysconfig.get_path("scripts"), "worldsim")
COMMANDS = [each.callback.__name__ for each in cli.app.registered_commands if each.callback]
WEIGHTS = "diffusion_pytorch_model.safetensors"
WAIT = 120.0  # seconds; a limit for what must happen, never a pause


def start(cwd: Path, *arguments: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [CONSOLE_SCRIPT, *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def video(path: Path) -> tuple[np.ndarray, float]:
    """All pictures of a file, as a player sees them, and its frame rate."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        pictures = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    assert rate is not None
    return np.stack(pictures), float(rate)


# --- what is written -----------------------------------------------------------------------------


def test_mp4_from_another_folder(tmp_path: Path, world_folder: Path) -> None:
    process = start(
        tmp_path, "stream", "walk.mp4", "--world", world_folder, "--seconds", "1.5", "--fps", "8"
    )
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err.decode()
    assert out == b""
    assert b"12 pictures (1.5 s)" in err and b"seed 0" in err
    pictures, fps = video(tmp_path / "walk.mp4")
    assert len(pictures) == 12 and fps == 8
    assert pictures.shape[1:] == (256, 384, 3)  # 32 × 48, enlarged so that it can be seen
    assert pictures.std() > 1
    assert list(tmp_path.iterdir()) == [tmp_path / "walk.mp4"]


def test_pipe_gets_exactly_the_pictures(tmp_path: Path, world_folder: Path) -> None:
    process = start(
        tmp_path, "stream", "-", "--world", world_folder, "--controls", "W*2 L",
        "--prompt", "red brick, zebra", "--seed", "9", "--threads", "1", "--dtype", "float32",
    )  # fmt: skip
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err.decode()
    assert b"passed over zebra" in err
    world = World.from_pretrained(world_folder, torch.float32)
    blocks = list(world.stream("red brick", controls="W*2 L", seed=9, blocks=4))
    assert out == b"".join(block.frames.tobytes() for block in blocks)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_ends_with_a_file_that_plays(tmp_path: Path, world_folder: Path) -> None:
    path = tmp_path / "long.mp4"
    process = start(tmp_path, "stream", path, "--world", world_folder, "--seconds", "100000")
    until = time.monotonic() + WAIT
    while not (path.exists() and path.stat().st_size > 100_000):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err.decode()
    summary = err.decode().split("stopped: ")[1]
    pictures, _ = video(path)
    assert len(pictures) == int(summary.split()[0])
    assert "Traceback" not in err.decode()


@pytest.mark.parametrize("name", ["walk.gif", "walk.webp", "frames/", "frames/p%03d.png"])
def test_pictures_and_animations(
    name: str, tmp_path: Path, world_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "frames").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ("--world", world_folder, "--seconds", "0.5", "--threads", "1", "--scale", "2")
    assert command("stream", name, *arguments).code == 0
    if name.startswith("walk"):
        pictures = imageio.imread(tmp_path / name, index=...)
        assert pictures.shape == (8, 64, 96, 3)
    else:
        files = sorted((tmp_path / "frames").iterdir())
        assert len(files) == 8
        assert imageio.imread(files[-1]).shape == (64, 96, 3)


# --- what cannot be ------------------------------------------------------------------------------


def damaged(world_folder: Path, tmp_path: Path, how: str) -> Path:
    """A copy of a world with one thing wrong."""
    folder = tmp_path / "worlds" / how
    shutil.copytree(world_folder, folder)
    weights, config = (folder / "transformer" / name for name in (WEIGHTS, "config.json"))
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "without-weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "not-a-number":
        tensors = load_file(weights)
        tensors["proj_out.bias"][3] = float("nan")
        save_file(tensors, weights)
    elif how == "config-cut":
        config.write_text(config.read_text()[:40])
    elif how == "config-type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": "two"}))
    elif how == "size-is-text":
        told = folder / "world.json"
        told.write_text(json.dumps(json.loads(told.read_text()) | {"height": "tall"}))
    elif how == "other-decoder":
        told = folder / "vae" / "config.json"
        told.write_text(json.dumps(json.loads(told.read_text()) | {"_class_name": "AutoencoderKL"}))
    elif how == "other-words":
        shutil.rmtree(folder / "text_encoder")
        shutil.copytree(folder / "vae", folder / "text_encoder")
    else:
        raise AssertionError(how)
    return folder


BAD_WORLDS = {
    "empty": "is not a world folder",
    "without-weights": f"has no {WEIGHTS}",
    "truncated": "is damaged",
    "not-a-number": "not finite: proj_out.bias",
    "config-cut": "config.json is no JSON",
    "config-type": "does not fit CausalWanTransformer3DModel",
    "size-is-text": "world: height must be a whole number, got 'tall'",
    "other-decoder": "holds a AutoencoderKL, not a CausalAutoencoder or AutoencoderKLWan",
    "other-words": "holds a CausalAutoencoder, not a WordEncoder",
}
BAD_OPTIONS = {
    ("--world", "nowhere"): "no world 'nowhere'",
    ("--controls", "W*4 Q*2"): "unknown key 'Q'",
    ("--controls", "W*"): "must end in a count",
    ("--prompt", "purple elephants"): "no word that this world knows",
    ("--prompt", "red brick[4 | night"): "needs a duration",
    ("--seconds", "0"): "--seconds must be above 0",
    ("--seconds", "nan"): "--seconds must be above 0",
    ("--seed", "-1"): "seed must be in",
    ("--steps", "0"): "steps must be in 1…1000",
    ("--cache", "size=3"): "cannot read 'size=3'",
    ("--cache", ""): "cannot read ''",
    ("--schedule", "heun"): "is none of renoise, euler",
    ("--schedule", "euler:250,500"): "steps must be descending",
    ("--profile", "missing/trace.json"): "there is no folder missing",
    ("--profile", "walk.mp4"): "--profile is a .json file, got 'walk.mp4'",
    ("--fps", "0"): "--fps must be above 0",
    ("--fps", "inf"): "--fps must be above 0",
    ("--fps", "5000"): "fps is 5000",
    ("--scale", "-1"): "scale is -1",
    ("--dtype", "float8"): "unknown dtype 'float8'",
    ("--device", "toaster"): "unknown device 'toaster'",
    ("--device", "cuda:1", "--ranks", "2"): "--device cuda:1 is a single one, and each rank wants",
    ("--ranks", "0"): "--ranks must be 1 or more, got 0",
    ("--threads", "0"): "threads must be 1 or more",
}
BAD_TARGETS = {
    "missing/walk.mp4": "there is no folder missing",
    "walk.avi": "cannot tell what to write to 'walk.avi'",
    "missing/": "there is no folder missing",
}


def refused(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> str:
    """Runs what cannot be in an empty folder; returns the one line that it says."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("worldsim: "), err
    assert list(folder.iterdir()) == []
    return err


@pytest.mark.parametrize("how", BAD_WORLDS)
def test_bad_world(how: str, tmp_path: Path, world_folder: Path, monkeypatch) -> None:
    world = damaged(world_folder, tmp_path, how)
    said = refused(monkeypatch, tmp_path / "here", "stream", "w.mp4", "--world", world)
    assert BAD_WORLDS[how] in said and str(world) in said


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_option(
    option: tuple[str, ...], tmp_path: Path, world_folder: Path, monkeypatch
) -> None:
    arguments = ("stream", "walk.mp4", "--world", world_folder, *option)
    assert BAD_OPTIONS[option] in refused(monkeypatch, tmp_path, *arguments)


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_bad_target(target: str, tmp_path: Path, world_folder: Path, monkeypatch) -> None:
    arguments = ("stream", target, "--world", world_folder)
    assert BAD_TARGETS[target] in refused(monkeypatch, tmp_path, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--blocks", "3"),
        ("bench", "--model", "nowhere"),
        ("bench", "--cache", "recent=all"),
        ("bench", "--schedule", "heun"),
        ("bench", "--json", "missing/figures.json"),
        ("evaluate", "--states", "1"),
        ("evaluate", "--json", "missing/figures.json"),
        ("train", "castle"),
        ("train", "maze", "--preset", "huge"),
        ("train", "maze", "--ranks", "0"),
        ("schedule", "simulate", "tpp", "--stage-ms", "40", "--latency-us", "-1"),
        ("schedule", "simulate", "tpp", "--stage-ms", "40", "--decode-ms", "-1"),
        ("sheet", "walks.jpg"),
        ("sheet", "missing/walks.png"),
        ("sheet", "walks.png", "--rows", "0"),
    ],
    ids=" ".join,
)
def test_bad_option_of_another_command(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch
) -> None:
    refused(monkeypatch, tmp_path, *arguments)


def test_error_through_the_console_script(tmp_path: Path) -> None:
    process = start(tmp_path, "stream", "walk.mp4", "--world", "nowhere")
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 2 and out == b""
    assert err.decode() == (
        "worldsim: no world 'nowhere': give 'maze', 'maze-short', a world folder, "
        "or a hub id (owner/name)\n"
    )
    assert list(tmp_path.iterdir()) == []


# --- help ----------------------------------------------------------------------------------------

HELP = """
import sys
from worldsim.apps import cli

for command in sys.argv[1:]:
    sys.argv = ["worldsim", *command.split(), "--help"]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, command
heavy = {"torch", "diffusers", "gradio", "numpy", "av", "matplotlib", "PIL"} & set(sys.modules)
assert not heavy, f"help loads {heavy}"
"""


def test_help_of_every_command_loads_nothing_heavy(tmp_path: Path) -> None:
    assert {"stream", "bench", "train", "evaluate"} <= set(COMMANDS)
    done = subprocess.run(
        [sys.executable, "-c", HELP, "", *COMMANDS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"Usage: worldsim {name}" in done.stdout
    assert done.stdout.count("Example") >= len(COMMANDS)


def test_controls_of_a_world_are_told(world_folder: Path) -> None:
    said = command("controls", "--world", world_folder).out
    assert "  W  forward     KeyW, ArrowUp\n" in said and "script, in latent frames" in said
    assert "its prompt alone steers it" in command("controls", "--world", "tiny").out


# --- repeatability -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_seed_same_latents_on_one_and_two_threads(
    dtype: torch.dtype, make_world: MakeWorld
) -> None:
    # the shipped sizes: smaller products never use a second thread
    world = make_world(CPU, height=64, width=64).to(dtype)
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(list(world.stream(controls="W L", seed=3, blocks=2)))
    finally:
        torch.set_num_threads(1)
    for one, two in zip(*made, strict=True):
        assert torch.equal(one.latents, two.latents)
        assert np.array_equal(one.frames, two.frames)


def test_measures_may_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("worldsim.apps.evaluate.run", lambda options: asked.append(options))
    line = ["evaluate", "--measure", "returning, forks", "--measure", "minute"]
    cli.app(line, standalone_mode=False)
    assert asked[0].measures == ("returning", "forks", "minute")


def test_a_stream_is_as_long_as_its_prompts(make_world: MakeWorld) -> None:
    world = make_world()
    assert latents_asked(world, "red brick[2s] | night[1s]", None) == 12
    assert latents_asked(world, "red brick[2s] | night[1s]", "W*5") == 6
    assert latents_asked(world, "red brick[2s] | night", None) is None
    assert latents_asked(world, None, None) is None
    assert length(None, 12, 16.0) == 45 and length(2.0, 12, 16.0) == 32


def test_a_process_takes_memory() -> None:
    assert 0 < resident_mib() <= peak_mib(torch.device("cpu")) + 1
