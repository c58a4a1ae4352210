"""`worldsim evaluate`: scores against the simulator, with intervals, beside their baselines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worldsim.apps.opening import open_world
from worldsim.apps.report import machine, print_table, write_json
from worldsim.maze import scores
from worldsim.maze.looks import learn_looks
from worldsim.maze.sheet import pairs_sheet
from worldsim.maze.truth import GIVEN, Truth, held_out
from worldsim.session import Session
from worldsim.streaming.sinks import check_writable
from worldsim.world import World

SECONDS = 4
LONG = 60
SHEET_ROWS = 10


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line was given."""

    world: str
    states: int
    steps: int | None
    cache: str | None
    dtype: str
    device: str
    threads: int | None
    sheet: Path | None
    json: Path | None


def run(options: EvaluateOptions) -> None:
    """Score and print; see `evaluate`.

    Raises:
        ValueError: for options that cannot be, or a world that is no maze.
    """
    if options.states < 8:
        raise ValueError(f"--states must be 8 or more to mean anything, got {options.states}")
    for path in (options.sheet, options.json):
        if path is not None:
            check_writable(path)
    world = open_world(options.world, options.dtype, options.device, options.threads)
    if world.config.name != "maze":
        raise ValueError(
            f"only the maze has a simulator to score against, not {world.config.name!r}"
        )
    figures = evaluate(world, options)
    rows = [
        [name, f"{value['mean']:.2f} ± {value['ci95']:.2f}", value["unit"]]
        for name, value in figures["scores"].items()
    ]
    print_table(f"{options.world} on held-out maps", ("score", "mean ± 95 %", "unit"), rows)
    write_json(options.json, figures)


def evaluate(world: World, options: EvaluateOptions) -> dict[str, Any]:
    """Every score of the scoreboard as one dictionary; writes the contact sheet on the way."""
    size = (world.config.height, world.config.width)
    states, few = options.states, max(4, options.states // 25)

    def open_session(prompt: str, seed: int) -> Session:
        return world.session(prompt, seed, options.steps, options.cache)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def note(name: str, total: int) -> scores.Note:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        truth = held_out(states, GIVEN + scores.SECOND * SECONDS, size)
        ceiling = scores.reconstruction(world, truth, note("autoencoder", states))
        model, frozen, clips = scores.rollouts(
            open_session, truth, SECONDS, note("rollout", states)
        )
        if options.sheet is not None:
            _sheet(options.sheet, truth, clips)
        forks = scores.control_following(
            open_session, held_out(6 * states, GIVEN, size, 10_000), states, note("forks", states)
        )
        far = held_out(few, GIVEN + scores.SECOND * LONG, size, 20_000)
        sharp, _ = scores.long_walks(open_session, far, LONG, note(f"{LONG} s walks", few))
        looks = learn_looks(size)
        asked = held_out(states, 1 + 2 * scores.SECOND, size, 30_000)
        shown, _ = scores.prompt_response(open_session, asked, looks, note("prompts", states))
    table = {
        "autoencoder": _score(ceiling, "dB"),
        **{f"rollout, second {s + 1}": _score(model[:, s], "dB") for s in (0, 1, SECONDS - 1)},
        **{f"frozen, second {s + 1}": _score(frozen[:, s], "dB") for s in (0, 1, SECONDS - 1)},
        "control following (fork test)": _score(100 * forks, "%"),
        "sharpness, seconds 1–10": _score(sharp[:, :10].mean(1), "× true"),
        f"sharpness, seconds {LONG - 9}–{LONG}": _score(sharp[:, -10:].mean(1), "× true"),
        "prompt attributes shown": _score(100 * shown, "%"),
    }
    return {
        "world": options.world,
        "dtype": str(world.dtype).removeprefix("torch."),
        "steps": options.steps or world.config.steps,
        "cache": options.cache or world.config.cache,
        "states": states,
        "scores": table,
        "recogniser_accuracy_on_truth": looks.accuracy,
        "machine": machine(),
    }


def _score(values: scores.Scores, unit: str) -> dict[str, Any]:
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"mean": float(values.mean()), "ci95": half, "unit": unit}


def _sheet(path: Path, truth: Truth, clips: list[Any]) -> None:
    rows = range(min(SHEET_ROWS, len(clips)))
    first = 4 * (GIVEN - 1) + 1
    true = np.stack([truth.pictures(row, first, first + len(clips[row])).numpy() for row in rows])
    labels = [truth.prompt(row) for row in rows]
    pairs_sheet(true, np.stack([clips[row] for row in rows]), 4, 2, labels).save(path)
