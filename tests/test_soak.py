"""`worldsim soak`: bounded memory passes, and memory that grows or moves is told."""

import json
from pathlib import Path

import pytest

from worldsim.apps import soak
from worldsim.apps.setting import Setting
from worldsim.apps.soak import SoakOptions
from worldsim.cache.context import Context


def options(tmp_path: Path, cache: str | None = None, blocks: int = 150) -> SoakOptions:
    return SoakOptions(Setting("tiny", cache=cache), blocks, "cpu", tmp_path / "soak.json")


@pytest.mark.parametrize(
    "cache", [None, "sink=1,mid=4:pool:int8,recent=3:int4", "mid=2:topk,bank=20,recent=3"]
)
def test_a_bounded_cache_passes(tmp_path: Path, cache: str | None) -> None:
    soak.run(options(tmp_path, cache))
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["blocks"] == 150 and not figures["moved"]
    assert figures["memory"]["growth"] == 0


def test_pages_that_are_allocated_anew_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = Context._release
    kept = []

    def forgetful(self: Context, entries: set) -> None:  # type: ignore[type-arg]
        kept.extend(entries)
        release(self, set() if len(kept) % 5 == 0 else entries)

    monkeypatch.setattr(Context, "_release", forgetful)
    with pytest.raises(SystemExit, match="pages or rotated copies moved"):
        soak.run(options(tmp_path))


def test_memory_that_grows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(range(100, 10_000))
    monkeypatch.setattr(soak, "resident_mib", lambda: float(next(sizes)))
    with pytest.raises(SystemExit, match="memory grew by"):
        soak.run(options(tmp_path))


def test_what_cannot_be_soaked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="100 or more"):
        soak.run(options(tmp_path, blocks=10))
    with pytest.raises(ValueError, match="keeps everything must grow"):
        soak.run(options(tmp_path, "recent=all"))
    with pytest.raises(ValueError, match="until then the context fills"):
        soak.run(options(tmp_path, "recent=200"))
