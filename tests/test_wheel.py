"""The wheel holds the six packages, all of them and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("apps", "cache", "maze", "models", "streaming", "worldsim")
WEIGHTS_MB = {"maze": 24, "maze-short": 10}
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes of the files in a wheel built from a copy of the sources: no stale build/ joins in."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in (*PACKAGES, "tests"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "golden")
        )
    command = [sys.executable, "-c", BUILD, str(out)]  # the call that pip makes, without pip
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(out / done.stdout.split()[-1]) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def shipped() -> set[str]:
    """Every file that the folders hold and the wheel must, by its name in the wheel."""
    files = {"worldsim/py.typed": ROOT / "worldsim" / "py.typed"}
    for folder in PACKAGES:
        inside = "worldsim" if folder == "worldsim" else f"worldsim/{folder}"
        for kind in ("*.py", "page.*"):
            files |= {f"{inside}/{path.name}": path for path in (ROOT / folder).glob(kind)}
    weights = ROOT / "maze" / "weights"
    files |= {
        f"worldsim/maze/weights/{path.relative_to(weights).as_posix()}": path
        for path in weights.rglob("*")
        if path.is_file()
    }
    return set(files)


def test_wheel_holds_exactly_the_packages(wheel: dict[str, int]) -> None:
    info = {name for name in wheel if name.split("/")[0].endswith(".dist-info")}
    assert set(wheel) - info == shipped()
    assert any(name.endswith("entry_points.txt") for name in info)
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_bundled_weights_are_small(wheel: dict[str, int]) -> None:
    weights = {name: size for name, size in wheel.items() if "/weights/" in name}
    for world, most in WEIGHTS_MB.items():
        size = sum(weights[name] for name in weights if f"/weights/{world}/" in name)
        assert 0 < size <= most * 1_000_000, world
    assert {Path(name).suffix for name in weights} <= {".json", ".safetensors"}
