"""The house: which folder may import which, and what an import may cost."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
# Arrows point down only; a folder may also import itself.
MAY_IMPORT = {
    "cache": set(),
    "models": {"cache"},
    "worldsim": {"models", "cache"},
    "maze": {"worldsim", "models", "cache"},
    "streaming": {"worldsim", "models", "cache"},
    "apps": {"streaming", "maze", "worldsim", "models", "cache"},
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Names that a file imports, also inside functions; a relative one starts with a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def folder_of(name: str) -> str:
    """The folder that an imported ``worldsim…`` name lives in."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in MAY_IMPORT else "worldsim"


def test_arrows_point_down() -> None:
    upwards = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in sorted(imported(path))
        if name.split(".")[0] == "worldsim"
        and folder_of(name) not in MAY_IMPORT[path.parent.name] | {path.parent.name}
    ]
    assert not upwards, "\n".join(upwards)


def test_imports_are_absolute_and_by_the_full_name() -> None:
    """``import models`` works at the root, too, but is another module than worldsim.models."""
    strange = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (*FILES, *TESTS)
        for name in sorted(imported(path))
        if name.startswith(".") or name.split(".")[0] in MAY_IMPORT.keys() - {"worldsim"}
    ]
    assert not strange, "\n".join(strange)


def test_no_file_is_named_after_a_dependency() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    lists = [PYPROJECT["project"]["dependencies"], *extras]
    names = {re.split(r"[^\w-]", line)[0].lower() for lines in lists for line in lines}
    modules = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if names & {name.lower() for name in distributions}
    } - {"worldsim"}
    assert {"torch", "diffusers", "gradio", "av", "PIL"} <= modules
    assert not {path.stem for path in (*FILES, *TESTS)} & (modules | names)


def test_folders_are_flat_and_every_one_is_packaged() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(MAY_IMPORT)
    assert {path.parent.parent for path in FILES} == {ROOT}
    assert not list((ROOT / "tests").rglob("__init__.py"))
    named = {folder: f"worldsim.{folder}" for folder in MAY_IMPORT} | {"worldsim": "worldsim"}
    tool = PYPROJECT["tool"]["setuptools"]
    assert set(tool["packages"]) == set(named.values())
    assert tool["package-dir"] == {name: folder for folder, name in named.items()}


def test_public_names_load_on_first_use(tmp_path: Path) -> None:
    """Small modules stay small: the top package is lazy, and the policy knows no tensors."""
    light = loaded(tmp_path, "import worldsim, worldsim.cache.config, worldsim.cache.policy")
    assert not light & {"torch", "numpy", "diffusers", "gradio", "rich"}
    heavy = loaded(tmp_path, "from worldsim import World; import worldsim.apps.stream")
    assert "torch" in heavy
    assert not heavy & {"gradio", "matplotlib", "imageio", "typer", "worldsim.maze"}


def loaded(cwd: Path, code: str) -> set[str]:
    """Modules there are after ``code`` has run in a fresh process, away from the repository."""
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())
