"""What a training run leaves for people to look at: loss curves and true/generated pictures."""

import csv
from pathlib import Path

import numpy as np
from PIL.Image import Image

from worldsim.maze.sheet import pairs_sheet
from worldsim.maze.simulator import PICTURES_PER_LATENT
from worldsim.maze.streams import Played, Subject
from worldsim.maze.truth import FIRST, GIVEN, SECOND, Truth, held_out
from worldsim.world import World

ROWS, SECONDS = 8, 4
SMOOTHED = 15  # logged points


def plot_losses(folder: Path, out: Path) -> None:
    """One panel for each ``NAME.csv`` in ``folder``: every figure over the steps, smoothed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    logs = sorted(folder.glob("*.csv"))
    figure, panels = pyplot.subplots(1, len(logs), figsize=(6 * len(logs), 4), squeeze=False)
    for panel, log in zip(panels[0], logs, strict=True):
        with log.open() as file:
            names, *rows = list(csv.reader(file))
        values = np.array(rows, dtype=float)
        panel.set(title=log.stem, xlabel="step")
        for column, name in enumerate(names[1:], start=1):
            axis = panel.twinx() if name == "psnr" else panel
            colour = f"C{column - 1}"
            axis.plot(values[:, 0], _smooth(values[:, column]), color=colour, label=name)
            axis.set_ylabel(f"{name}{' (dB)' if name == 'psnr' else ''}", color=colour)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def draw_rollouts(world: World, out: Path) -> None:
    """Held-out walks, truth above what the world makes of the same controls."""
    truth = held_out(ROWS, GIVEN + SECOND * SECONDS, world.config.size)
    rollout_sheet(Played(lambda prompt, seed: world.session(prompt, seed)), truth, ROWS).save(out)


def rollout_sheet(subject: Subject, truth: Truth, rows: int) -> Image:
    """Pairs of rows: the truth of the first walks, and what a subject makes of their controls."""
    true, made = [], []
    for row in range(min(rows, len(truth.poses))):
        stream = subject.resume(truth, row)
        made.append(stream.walk(truth.track(row)[GIVEN:]))
        stream.close()
        true.append(truth.pictures(row, FIRST, FIRST + len(made[-1])).numpy())
    labels = [truth.prompt(row) for row in range(len(made))]
    return pairs_sheet(np.stack(true), np.stack(made), every=PICTURES_PER_LATENT, labels=labels)


def _smooth(values: np.ndarray) -> np.ndarray:
    width = min(SMOOTHED, len(values))
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")
