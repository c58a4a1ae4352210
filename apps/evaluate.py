"""`worldsim evaluate`: scores against the simulator, with intervals, beside their baselines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worldsim.apps.opening import open_world
from worldsim.apps.report import machine, print_table, write_json
from worldsim.maze import scores
from worldsim.maze.looks import learn_looks
from worldsim.maze.report import rollout_sheet
from worldsim.maze.truth import GIVEN, held_out
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
    if options.sheet is not None and options.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet is a PNG file, got {str(options.sheet)!r}")
    world = open_world(options.world, options.dtype, options.device, options.threads)
    if world.config.name != "maze":
        raise ValueError(
            f"only the maze has a simulator to score against, not {world.config.name!r}"
        )
    if world.config.block_frames != 1 or world.config.fps != 16:
        raise ValueError("the scores are made for blocks of one latent frame at 16 fps")
    figures = evaluate(world, options)
    rows = [
        [name, f"{value['mean']:.2f} ± {value['ci95']:.2f}", value["unit"], value["beside"]]
        for name, value in figures["scores"].items()
    ]
    columns = ("score", "mean ± 95 %", "unit", "beside it")
    print_table(f"{options.world} on held-out maps", columns, rows)
    write_json(options.json, figures)


def evaluate(world: World, options: EvaluateOptions) -> dict[str, Any]:
    """Every score of the scoreboard as one dictionary; writes the contact sheet on the way."""
    size = (world.config.height, world.config.width)
    states, some, few = options.states, max(8, options.states // 2), max(8, options.states // 20)

    def open_session(prompt: str, seed: int) -> Session:
        return world.session(prompt, seed, options.steps, options.cache)

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
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
            rollout_sheet(truth, clips[:SHEET_ROWS]).save(options.sheet)
        forks, walked = scores.control_following(
            open_session, held_out(8 * states, GIVEN, size, 10_000), states, note("forks", states)
        )
        looks = learn_looks(size)
        asked = held_out(some, 1 + 3 * scores.SECOND, size, 30_000)
        prompts = scores.prompt_response(open_session, asked, looks, note("prompts", some))
        far = held_out(few, GIVEN + scores.SECOND * LONG, size, 20_000)
        long = scores.long_walks(open_session, far, LONG, looks, note(f"{LONG} s walks", few))
    rows = _short_rows(ceiling, model, frozen, forks)
    rows |= _prompt_rows(prompts, looks.accuracy) | _long_rows(long)
    return {
        "world": options.world,
        "dtype": str(world.dtype).removeprefix("torch."),
        "steps": options.steps or world.config.steps,
        "cache": options.cache or world.config.cache,
        "states": {"rollouts": states, "forks": states, "prompts": some, "long walks": few},
        "walks_drawn_for_forks": walked,
        "scores": rows,
        "machine": machine(),
    }


Rows = dict[str, dict[str, Any]]


def _short_rows(
    ceiling: scores.Scores, model: scores.Scores, frozen: scores.Scores, forks: scores.Scores
) -> Rows:
    shown = (0, 1, SECONDS - 1)
    return {
        "autoencoder": _row(ceiling, "dB"),
        **{
            f"rollout, second {s + 1}": _row(model[:, s], "dB", f"frozen {frozen[:, s].mean():.2f}")
            for s in shown
        },
        "control following (forks)": _row(100 * forks, "%", "chance 20"),
    }


def _prompt_rows(prompts: dict[str, scores.Scores], accuracy: float) -> Rows:
    truth = f"chance 35, truth {100 * accuracy:.1f}"
    return {
        "prompt, attributes shown": _row(100 * prompts["start"], "%", truth),
        "prompt changed, after 3 s": _row(100 * prompts["switch"], "%", truth),
        "prompt of one word, wall": _row(100 * prompts["one word"], "%", "chance 25"),
    }


def _long_rows(long: scores.LongWalk) -> Rows:
    rows = {}
    for name, values in (("sharpness", long.sharpness), ("motion", long.motion)):
        rows[f"{name}, seconds 1–10"] = _row(values[:, :10].mean(1), "× true")
        last = values[:, -10:].mean(1)
        rows[f"{name}, last 10 of {LONG} s"] = _row(last, "× true", f"worst {last.min():.2f}")
    rows[f"theme kept, last 10 of {LONG} s"] = _row(100 * long.theme, "%", "chance 35")
    return rows


def _row(values: scores.Scores, unit: str, beside: str = "") -> dict[str, Any]:
    """Mean and half of its 95 % interval (normal; a few long walks make it a rough one)."""
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"mean": float(values.mean()), "ci95": half, "unit": unit, "beside": beside}
