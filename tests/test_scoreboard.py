"""The scoreboard measures itself: the simulator as a subject, whole and with known faults."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_world

from worldsim.apps import evaluate
from worldsim.apps.evaluate import EvaluateOptions
from worldsim.apps.score_table import mean
from worldsim.apps.setting import Setting, every
from worldsim.apps.tables import TABLES, table
from worldsim.cache.config import CacheConfig
from worldsim.maze.board import Material, score
from worldsim.maze.corruptions import FAULTS
from worldsim.maze.inverse import learn_inverse
from worldsim.maze.looks import Looks
from worldsim.maze.measures import AWAY, Readers, forkable, leaving
from worldsim.maze.streams import Played, Simulated
from worldsim.maze.truth import FIRST, GIVEN, SECOND, held_out
from worldsim.maze.walks import HALF_TURN
from worldsim.session import Session

SIZE = (64, 64)
WALKS = 3


@pytest.fixture(scope="module")
def readers() -> Readers:
    """A reader of motion, and one of themes that says that everything is theme 0."""
    blind = Looks(np.zeros((72, 48)), np.eye(48), 0.0, 0.0)
    return Readers(blind, learn_inverse(SIZE))


@pytest.fixture(scope="module")
def material(readers: Readers) -> Material:
    """A few walks for each measure that needs no reading of themes."""
    walks = {
        "rollout": held_out(WALKS, GIVEN + SECOND * 4, SIZE),
        "forks": held_out(8 * WALKS, GIVEN, SIZE, 10_000),
        "returning": held_out(WALKS, GIVEN, SIZE, 40_000, standing=True),
        "minute": held_out(1, GIVEN + SECOND * 60, SIZE, 20_000),
    }
    rows = {name: list(range(len(truth.poses))) for name, truth in walks.items()}
    rows["forks"] = forkable(walks["forks"], WALKS)
    return Material(walks, rows, readers)


@pytest.fixture(scope="module")
def board(material: Material) -> dict[str, dict[str, float]]:
    found = {}
    for name, fault in FAULTS.items():
        scores = score(partial(Simulated, fault), material, 1, lambda: None)
        found[name] = {key: mean(values)[0] for key, values in scores.items()}
    return found


Board = dict[str, dict[str, float]]


def test_the_truth_is_perfect(board: Board) -> None:
    truth = board["truth"]
    for score_name in ("second 1", "second 4", "return"):
        assert truth[score_name] > 48
    assert truth["forks"] == 1 and truth["drift error"] < 3 and truth["colour"] == 0
    assert truth["turn seen"] > 0.9 and truth["advance seen"] > 0.9
    assert truth["return"] - truth["return, swapped"] > 10


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "truth"])
def test_likeness_falls_for_every_fault(board: Board, fault: str) -> None:
    assert board[fault]["second 2"] < board["truth"]["second 2"] - 10


# For each score: the faults that it is meant to see, how far at least they take it from the truth's
# value, and how far at most any other fault may. Frozen frames, wrong controls and another map show
# other views, whose looks differ a little: they are only kept out where looks are not scored.
OTHER_VIEWS = {"frozen", "wrong controls", "another map"}
SEES = {
    "forks": ({"frozen", "wrong controls", "another map"}, 0.5, 0.1),
    "turn seen": ({"frozen", "wrong controls"}, 0.2, 0.1),
    "advance seen": ({"frozen", "wrong controls"}, 0.4, 0.3),
    "sharpness": ({"blur", "noise"}, 0.25, 0.15),
    "colour": ({"colour shift"}, 15.0, 5.0),
    "motion": ({"frozen", "noise", "blur"}, 0.15, 0.1),
}
OF_LOOKS = {"sharpness", "colour", "motion"}


@pytest.mark.parametrize("score_name", SEES)
def test_each_score_sees_its_faults_and_them_alone(board: Board, score_name: str) -> None:
    seen, least, most = SEES[score_name]
    for fault in set(FAULTS) - {"truth"}:
        off = abs(board[fault][score_name] - board["truth"][score_name])
        if fault in seen:
            assert off >= least, fault
        elif score_name not in OF_LOOKS or fault not in OTHER_VIEWS:
            assert off <= most, fault


def test_two_runs_agree_on_any_number_of_processes(material: Material) -> None:
    few = replace(material, rows={"forks": material.rows["forks"][:2], "returning": [0, 1]})
    truth = partial(Simulated, FAULTS["truth"])
    one, two = (score(truth, few, processes, lambda: None) for processes in (1, 2))
    assert set(one) == set(two)
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_who_leaves_is_away_for_twice_the_window_and_comes_back() -> None:
    truth = held_out(2, GIVEN, SIZE, 40_000, standing=True)
    for row in range(2):
        track = leaving(truth, row)
        assert len(track) == 2 * HALF_TURN + 2 * AWAY + 1
        subject = Simulated()
        stream = subject.resume(truth, row)
        home = stream.pose
        stream.walk(track[: HALF_TURN + AWAY])
        apart = (stream.pose - home)[0, 2].abs()
        assert float(apart) == pytest.approx(np.pi, abs=1e-4)
        stream.walk(track[HALF_TURN + AWAY :])
        there = (stream.pose - home).abs()[0]
        assert float(there[:2].max()) < 1e-3
        assert min(float(there[2]), 2 * np.pi - float(there[2])) < 1e-3


def test_a_world_is_scored_through_its_sessions(material: Material) -> None:
    world = random_world(height=64, width=64)

    def opened(prompt: str, seed: int) -> Session:
        return world.session(prompt, seed)

    few = replace(material, rows={"rollout": [0], "forks": material.rows["forks"][:1],
                                  "returning": [0]})  # fmt: skip
    one, two = (score(partial(Played, opened), few, 1, lambda: None) for _ in range(2))
    assert all(np.array_equal(one[key], two[key]) for key in one), "a score is a pure function"
    assert one["second 1"][0] < 30, "random weights are no simulator"
    assert world.pool.used_pages == 0, "every session gave its pages back"
    # Only the given frames of a mistaken stream are others; what was made since is the same.
    truth = material.walks["returning"]
    stream = Played(opened).resume(truth, 0)
    stream.walk(leaving(truth, 0)[:3])
    twin = Played(opened).mistaken(stream, truth.of_another_map(0), 0)
    assert twin.session.block == stream.session.block
    assert np.array_equal(twin.session.pose, stream.session.pose)
    assert not torch.equal(
        world.pool.keys(twin.session.context.table.sink[0].page),
        world.pool.keys(stream.session.context.table.sink[0].page),
    )
    for made in (stream, twin):
        made.close()


def test_settings_are_combined_and_named() -> None:
    settings = every(["maze"], [1, 2], [None, "recent=4"], [None], ["auto"])
    assert [str(setting) for setting in settings] == [
        "steps=1", "steps=1 cache=recent=4", "steps=2", "steps=2 cache=recent=4",
    ]  # fmt: skip
    for setting in settings:
        assert Setting.parse(str(setting)) == setting
    for name in TABLES:
        rows = table(name, "maze-short")
        assert len({str(row) for row in rows}) == len(rows)
        assert all(row.world == "maze-short" for row in rows)
        assert all(CacheConfig.parse(row.cache, 1) for row in rows if row.cache)
        assert all(Setting.parse(str(row)) == row for row in rows)
    config = random_world().config
    rules = [config.sampling(row.steps, row.schedule)[0].rule for row in table("schedules", None)]
    assert {"clean", "last", "lag0", "lag1", "output"} == set(rules)
    with pytest.raises(
        ValueError, match="unknown table 'all': choose from settings, steps, caches, sch"
    ):
        table("all", None)


def test_the_command_scores_several_settings(
    world_64: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: Readers
) -> None:
    monkeypatch.setattr("worldsim.maze.board.learn_looks", lambda _: readers.looks)
    monkeypatch.setattr("worldsim.maze.board.learn_inverse", lambda _: readers.inverse)
    options = EvaluateOptions(
        settings=tuple(every([str(world_64)], [1, 2], [None], [None], ["float32"])),
        measures=("returning",), states=8, device="cpu", processes=1, self_test=False,
        sheet=None, json=tmp_path / "scores.json", markdown=tmp_path / "table.md",
    )  # fmt: skip
    evaluate.run(options)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 4 and all(line.count("|") == table[0].count("|") for line in table)
    assert FIRST == 17 and (tmp_path / "scores.json").stat().st_size > 0
    with pytest.raises(ValueError, match="unknown measure 'luck'"):
        evaluate.run(replace(options, measures=("luck",)))


@pytest.fixture(scope="module")
def world_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "square"
    random_world(height=64, width=64).save_pretrained(folder)
    return folder
