"""Pictures of pictures: clips side by side on one sheet, for people to look at."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from worldsim.maze.simulator import maps, render
from worldsim.maze.themes import ALL_THEMES
from worldsim.maze.walks import per_picture, theme_track, walks

Clips = torch.Tensor | NDArray[np.uint8]

LINE = 14  # height of a label in picture elements
PAPER, INK = (18, 18, 22), (235, 235, 235)


def contact_sheet(
    clips: Clips, every: int = 4, scale: int = 2, labels: Sequence[str] | None = None
) -> Image.Image:
    """One row per clip of uint8 [N, F, H, W, 3], every `every`-th picture, `scale` times as large.

    `labels` are written above the rows. Raises ValueError unless there is one for each clip."""
    pictures = np.asarray(clips)[:, ::every]
    if pictures.ndim != 5 or pictures.shape[-1] != 3 or not pictures.size:
        raise ValueError(f"clips must be [N, F, H, W, 3], not {list(np.shape(clips))}")
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f"{len(labels)} labels for {len(pictures)} clips")
    count, _, height, width, _ = pictures.shape
    pictures = pictures.repeat(scale, axis=2).repeat(scale, axis=3)
    framed = np.full((*pictures.shape[:3], width * scale + 2, 3), PAPER[0], dtype=np.uint8)
    framed[..., :-2, :] = pictures
    rows = framed.transpose(0, 2, 1, 3, 4).reshape(count, height * scale, -1, 3)
    top = LINE if labels is not None else 0
    step = top + rows.shape[1] + 2
    sheet = Image.new("RGB", (rows.shape[2], count * step - 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        if labels is not None:
            draw.text((3, index * step + 1), labels[index], fill=INK)
        sheet.paste(Image.fromarray(row), (0, index * step + top))
    return sheet


def pairs_sheet(
    true: Clips,
    generated: Clips,
    every: int = 4,
    scale: int = 2,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """Pairs of rows, truth above what was generated; both uint8 [N, F, H, W, 3]."""
    first, second = np.asarray(true), np.asarray(generated)
    if first.shape != second.shape:
        raise ValueError(f"pairs differ in shape: {first.shape} and {second.shape}")
    both = np.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
    if labels is not None:
        labels = [text for label in labels for text in (f"{label} (true)", "generated")]
    return contact_sheet(both, every, scale, labels)


def world_sheet(
    seeds: Sequence[int],
    frames: int = 13,
    height: int = 64,
    width: int = 64,
    every: int = 4,
    scale: int = 2,
    switches: bool = False,
) -> Image.Image:
    """Walks of `frames` latent frames, one row per seed, stepping through all kinds of themes;
    `switches`: with the theme changes that training sees instead of one theme per row."""
    mazes = maps(seeds)
    walk = walks(mazes, mazes.start, frames, seed=min(seeds))
    if switches:
        track = theme_track(len(seeds), frames, seed=min(seeds), switch_probability=1.0)
        labels = None
    else:
        # 31 and 72 have no common factor: neighbours differ and no theme comes twice too soon.
        chosen = [ALL_THEMES[31 * row % len(ALL_THEMES)] for row in range(len(seeds))]
        indices = torch.tensor([theme.indices() for theme in chosen])
        track = indices[:, None].expand(-1, frames, -1)
        labels = [theme.prompt() for theme in chosen]
    clips = render(mazes, walk.poses, per_picture(track), height, width)
    return contact_sheet(clips, every, scale, labels)
