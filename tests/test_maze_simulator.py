"""The bundled maze: one seed, one world; motion by the rules; themes people can see."""

import math

import pytest
import torch

from worldsim.maze.layout import MazeMaps
from worldsim.maze.sheet import pairs_sheet, world_sheet
from worldsim.maze.simulator import (
    BODY,
    KEYS,
    PICTURES_PER_LATENT,
    SPEED,
    advance,
    clearance,
    maps,
    render,
    trajectory,
)
from worldsim.maze.themes import ALL_THEMES, IGNORED, SYNONYMS, VOCABULARY, Theme
from worldsim.maze.walks import HELD_OUT, TRAIN_SEEDS, Walk, homing, per_picture, theme_track, walks

DAY = Theme("brick", "grass", "day", "clear")


def held(*names: str) -> torch.Tensor:
    """One row of keys, bool [1, 6]."""
    return torch.tensor([[key.removeprefix("Key") in names for key in KEYS]])


def themed(theme: Theme, rows: int, pictures: int) -> torch.Tensor:
    return torch.tensor(theme.indices()).expand(rows, pictures, 4)


def empty(size: int = 16) -> MazeMaps:
    """One map without any wall."""
    maze = maps([0], size)
    return MazeMaps(
        torch.zeros_like(maze.walls),
        maze.tint,
        maze.shape,
        maze.colour,
        torch.tensor([[8.5, 8.5, 0.0]]),
    )


def film(seeds: list[int], frames: int = 5) -> tuple[Walk, torch.Tensor]:
    """A walk and its pictures at 32 x 32."""
    mazes = maps(seeds)
    walk = walks(mazes, mazes.start, frames, seed=3)
    track = per_picture(theme_track(len(seeds), frames, seed=3))
    return walk, render(mazes, walk.poses, track, 32, 32)


def test_same_seed_gives_same_bytes_on_any_thread_count() -> None:
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(film(list(range(6))))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0][0].keys, runs[1][0].keys)
    assert torch.equal(runs[0][0].poses, runs[1][0].poses)
    assert torch.equal(runs[0][1], runs[1][1])


def test_a_map_does_not_depend_on_its_batch() -> None:
    together, alone = maps([5, 2**40, 7]), maps([2**40])
    for name in ("walls", "tint", "shape", "colour", "start"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
    keys = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    poses = trajectory(together, together.start, keys)
    assert torch.equal(poses[1:2], trajectory(alone, alone.start, keys[1:2]))
    pictures = render(together, poses, themed(DAY, 3, poses.shape[1]))
    lone = render(alone, poses[1:2], themed(DAY, 1, poses.shape[1]))
    assert torch.equal(pictures[1:2], lone)


@pytest.mark.parametrize("size", [6, 12, 16])
def test_maps_are_open_mazes_with_a_view_from_the_start(size: int) -> None:
    mazes = maps(range(30), size)
    share = mazes.walls.float().mean((1, 2))
    assert share.min() > 0.2 and share.max() < 0.55
    if size == 16:
        assert share.min() > 0.35 and share.max() < 0.50
        assert 0.35 < (mazes.shape > 0).float().mean() < 0.45
    assert clearance(mazes, mazes.start, torch.zeros(1)).min() >= 1.4


def test_the_body_never_enters_a_wall() -> None:
    mazes = maps(range(32))
    random = torch.Generator().manual_seed(1)
    share = torch.tensor([0.7, 0.2, 0.3, 0.3, 0.3, 0.2])
    pose = mazes.start
    for step in range(500):
        if step % 8 == 0:
            keys = torch.rand(32, 6, generator=random) < share
        pose = advance(mazes, pose, keys)
        for x in (-BODY, BODY):
            for y in (-BODY, BODY):
                cell = mazes.cells(mazes.rows(), (pose[:, 0] + x).floor(), (pose[:, 1] + y).floor())
                assert not mazes.walls.take(cell.long()).any()


def test_a_wall_is_slid_along() -> None:
    maze = empty()
    maze.walls[0, 10, :] = True
    pose = torch.tensor([[9.5, 8.0, math.pi / 4]])
    for _ in range(12):
        pose = advance(maze, pose, held("W"))
    assert pose[0, 0] == pytest.approx(10 - BODY, abs=0.01)
    assert pose[0, 1] == pytest.approx(8.0 + 12 * SPEED * math.sin(math.pi / 4), abs=1e-4)


def test_opposite_keys_cancel_and_others_add() -> None:
    maze = empty()
    start = maze.start
    assert torch.equal(advance(maze, start, held("W", "S", "A", "D", "J", "L")), start)
    forward = advance(maze, start, held("W")) - start
    right = advance(maze, start, held("D")) - start
    both = advance(maze, start, held("W", "D")) - start
    assert torch.allclose(forward, torch.tensor([[SPEED, 0, 0]]), atol=1e-5)
    assert torch.allclose(right, torch.tensor([[0, SPEED, 0]]), atol=1e-5)
    assert torch.allclose(both, forward + right, atol=1e-5)


@pytest.mark.parametrize(("key", "turned"), [("L", math.pi / 2), ("J", 3 * math.pi / 2)])
def test_five_latent_frames_turn_a_quarter(key: str, turned: float) -> None:
    maze = empty()
    keys = held(key)[:, None].expand(1, 6, 6)
    poses = trajectory(maze, maze.start, keys)
    assert poses.shape == (1, 21, 3)
    assert torch.equal(poses[:, 0], maze.start)
    assert poses[0, 20, 2].item() == pytest.approx(turned, abs=1e-5)


def test_space_wraps() -> None:
    maze = empty()
    keys = held("W")[:, None].expand(1, 41, 6)
    poses = trajectory(maze, maze.start, keys)
    assert torch.allclose(poses[0, -1], maze.start[0], atol=1e-3)
    assert poses[..., :2].min() >= 0 and poses[..., :2].max() <= 16

    mazes = maps([3])
    away = mazes.start[:, None] + torch.tensor([0.0, 16.0, 0.0])
    pictures = render(mazes, torch.cat([mazes.start[:, None], away], 1), themed(DAY, 1, 2), 32, 32)
    difference = (pictures[0, 0].float() - pictures[0, 1].float()).abs()
    assert difference.mean() < 0.5


def test_the_sky_tells_the_heading_in_every_map() -> None:
    mazes = maps([1, 2])
    headings = torch.arange(4) * math.pi / 2
    poses = mazes.start[:, None].repeat(1, 4, 1)
    poses[:, :, 2] = headings
    top = render(mazes, poses, themed(DAY, 2, 4), 64, 64)[:, :, :3].float()
    same = (top[0] - top[1]).abs().amax(-1) == 0  # where no wall stands before the sky
    assert same.float().mean() > 0.2
    open_poses = torch.tensor([8.5, 8.5, 0.0]).repeat(1, 4, 1)
    open_poses[0, :, 2] = headings
    views = render(empty(), open_poses, themed(DAY, 1, 4), 64, 64)[0].float()
    for first in range(4):
        for second in range(first):
            assert (views[first, :32] - views[second, :32]).abs().mean() > 3


def test_themes_are_72_and_their_prompts_are_understood() -> None:
    assert len({theme.indices() for theme in ALL_THEMES}) == 72
    for theme in ALL_THEMES:
        assert Theme.from_indices(theme.indices()) == theme
        words = theme.prompt().replace(",", "").split()
        assert all(word in VOCABULARY or word in IGNORED for word in words)
        assert {VOCABULARY[word] for word in words if word in VOCABULARY} == set(theme.words())
    assert not set(VOCABULARY) & IGNORED
    assert VOCABULARY["green"] == "hedge" and VOCABULARY["sunset"] == "dusk"


def test_no_word_has_two_meanings() -> None:
    words = [word for line in SYNONYMS.values() for word in line.split()]
    assert len(words) == len(set(words))


def test_wrong_themes_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="marzipan"):
        Theme(wall="marzipan")
    with pytest.raises(ValueError, match="index"):
        Theme.from_indices((4, 0, 0, 0))


def test_every_theme_looks_different() -> None:
    mazes = maps([4])
    poses = mazes.start[:, None].expand(1, 72, 3)
    themes = torch.tensor([theme.indices() for theme in ALL_THEMES])[None]
    pictures = render(mazes, poses, themes, 32, 32)[0].float().flatten(1)
    apart = torch.cdist(pictures, pictures, p=1) / pictures.shape[1]
    apart.fill_diagonal_(math.inf)
    assert apart.min() > 2


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (34, 18)])
def test_pictures_have_the_size_asked_for(size: tuple[int, int]) -> None:
    mazes = maps([1, 2])
    pictures = render(mazes, mazes.start[:, None], themed(DAY, 2, 1), *size)
    assert pictures.shape == (2, 1, *size, 3) and pictures.dtype == torch.uint8
    assert pictures.float().std() > 20


def test_walks_follow_their_keys_and_come_back() -> None:
    mazes = maps(range(48))
    walk = walks(mazes, mazes.start, 40, seed=9)
    assert torch.equal(walk.poses, trajectory(mazes, mazes.start, walk.keys))
    poses = walk.poses[:, ::4]
    gap = (poses[:, :, None, :2] - poses[:, None, :, :2]).abs()
    gap = torch.minimum(gap, 16 - gap).norm(dim=-1)
    turn = poses[:, :, None, 2] - poses[:, None, :, 2]
    turn = torch.atan2(turn.sin(), turn.cos()).abs()
    seen, left = (gap < 0.3) & (turn < 0.2), (gap > 1) | (turn > 0.8)
    returns = [
        (seen[:, last, first] & left[:, last, first + 1 : last].any(1))
        for last in range(4, 40)
        for first in range(last - 3)
    ]
    assert torch.stack(returns).any(0).float().mean() > 0.5  # walks that see a view twice
    assert (clearance(mazes, poses[:, -1], torch.zeros(1)) < 0.6).float().mean() < 0.3
    assert gap[:, 0].amax(1).median() > 1.5


def test_theme_tracks_switch_once_and_for_good() -> None:
    constant = theme_track(20, 12, seed=1, switch_probability=0.0)
    assert torch.equal(constant, constant[:, :1].expand_as(constant))
    track = theme_track(200, 12, seed=1, switch_probability=1.0)
    changes = (track[:, 1:] != track[:, :-1]).sum(-1)
    assert ((changes > 0).sum(1) == 1).all() and changes.max() == 4
    assert set(changes[changes > 0].tolist()) == {1, 2, 3, 4}
    assert per_picture(track).shape == (200, 45, 4)
    assert torch.equal(per_picture(track)[:, 0::4], track)


def test_training_and_held_out_seeds_never_meet() -> None:
    assert HELD_OUT not in TRAIN_SEEDS and HELD_OUT - 1 in TRAIN_SEEDS


def test_sheets_have_a_row_per_clip() -> None:
    sheet = world_sheet([1, 2], frames=3, scale=1)
    assert sheet.size[0] == 3 * 66
    clips = torch.zeros(2, 5, 8, 8, 3, dtype=torch.uint8)
    assert pairs_sheet(clips, clips, scale=1).size == (20, 4 * 10 - 2)
    with pytest.raises(ValueError, match="differ"):
        pairs_sheet(clips, clips[:1])


def test_homing_walks_come_back_to_their_very_pose() -> None:
    mazes = maps(range(6))
    walk = homing(mazes, mazes.start, 80, seed=3)
    again = homing(mazes, mazes.start, 80, seed=3)
    assert torch.equal(walk.keys, again.keys) and torch.equal(walk.poses, again.poses)
    ends = walk.poses[:, ::PICTURES_PER_LATENT]
    apart = (ends - ends[:, :1]).abs()
    apart[..., 2] = torch.minimum(apart[..., 2], 2 * math.pi - apart[..., 2])
    home = apart.amax(-1) < 1e-2
    assert (home.sum(1) >= 4).all(), "four times in twenty seconds"
    assert walk.keys[:, :, 0].any() and apart[..., :2].max() > 0.5, "some walk away as well"
    turned_home = apart[..., 2] < 1e-3
    standing = ~walk.keys[..., :2].any(-1)
    lost = turned_home & standing & ~home
    assert not lost.any(), "whoever faces home again stands there again"
