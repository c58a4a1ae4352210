"""Scripts, dead reckoning, prompts over time, schedules and noise: what a block is made under."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from worldsim.actions import ActionSpec, Motion
from worldsim.controls import ControlState
from worldsim.maze.actions import ACTIONS
from worldsim.maze.simulator import KEYS, PICTURES_PER_LATENT, SPEED, MazeMaps, advance, trajectory
from worldsim.noise import noise
from worldsim.schedule import CLEAN, Cell, Schedule, levels, shift_table
from worldsim.script import PromptSegment, Script, parse_prompts
from worldsim.world import World

W, S, A, D, J, L = (frozenset({key}) for key in KEYS)
NOTHING = frozenset[str]()


# --- scripts ----------------------------------------------------------------------------------
def test_a_script_is_held_keys_of_each_latent_frame() -> None:
    track = [state.buttons for state in ACTIONS.parse("W*12 WJ*4, L*8 .*4")]
    assert tuple(track) == (W,) * 12 + (W | J,) * 4 + (L,) * 8 + (NOTHING,) * 4


@pytest.mark.parametrize(
    ("script", "track"),
    [
        ("", ()),
        ("  ", ()),
        ("W", (W,)),
        ("w*2 wj", (W, W, W | J)),
        ("W,.,A", (W, NOTHING, A)),
        ("W*2,\n S", (W, W, S)),
        ("WW*2", (W, W)),
        ("ArrowUp*2 ArrowLeft", (W, W, J)),
        ("ArrowDown ArrowRight KeyD*2", (S, L, D, D)),
    ],
)
def test_scripts(script: str, track: tuple[frozenset[str], ...]) -> None:
    assert ACTIONS.parse(script) == tuple(map(ControlState, track))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("W*2 Q*3", "unknown key 'Q' in 'Q'; this world has W forward · S back · A step left"),
        ("WX*3", "unknown key 'X' in 'WX'"),
        ("W.*3", r"unknown key '\.' in 'W\.'"),
        ("W*", r"'W\*' must end in a count, as in 'W\*12'"),
        ("W*0", r"'W\*0' must end in a count"),
        ("W*-2", r"'W\*-2' must end in a count"),
        ("W*two", r"'W\*two' must end in a count"),
        ("W*²", r"'W\*²' must end in a count"),
        ("W*2*3", r"'W\*2\*3' must end in a count"),
        ("*4", "a count needs a key before it"),
        ("ArrowUpp", "unknown key 'r' in 'ArrowUpp'"),
    ],
)
def test_script_errors_are_one_clear_line(script: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^controls: .*{message}") as told:
        ACTIONS.parse(script)
    assert "\n" not in str(told.value)


def test_buttons_are_event_codes_and_aliases() -> None:
    assert ACTIONS.resolve({"KeyW", "ArrowLeft"}) == W | J
    assert ACTIONS.resolve({"KeyW", "ArrowUp"}) == W
    assert ACTIONS.resolve(()) == NOTHING
    with pytest.raises(ValueError, match="unknown key 'KeyQ'; this world has W forward"):
        ACTIONS.resolve({"KeyW", "KeyQ"})


def test_specs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"letters name keys that do not exist: \['KeyX'\]"):
        ActionSpec(keys=("KeyW",), letters={"X": "KeyX"})
    with pytest.raises(ValueError, match=r"aliases name keys that do not exist: \['KeyX'\]"):
        ActionSpec(keys=("KeyW",), aliases={"ArrowUp": "KeyX"})
    with pytest.raises(ValueError, match="motion must have one entry for each key"):
        ActionSpec(keys=("KeyW", "KeyS"), motion=(Motion(forward=1.0),))


# --- dead reckoning ---------------------------------------------------------------------------
def open_field(rows: int, size: int = 16) -> MazeMaps:
    """Maps without a wall, so that every way is free."""
    cells = (rows, size, size)
    faces = torch.zeros(*cells, 4, dtype=torch.int32)
    return MazeMaps(
        torch.zeros(cells, dtype=torch.bool),
        torch.ones(*cells, 3),
        faces,
        faces,
        torch.zeros(rows, 3),
    )


def held_keys(seed: int, rows: int, frames: int) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, frames, len(KEYS))) < 0.4


def test_reckoning_is_the_simulators_motion_where_the_way_is_free() -> None:
    mazes, held = open_field(8), held_keys(0, 8, 30)
    start = np.random.default_rng(1).random((8, 3)) * [16, 16, 2 * math.pi]
    poses, pose = [], torch.from_numpy(start)
    for frame in range(held.shape[1]):
        for _ in range(PICTURES_PER_LATENT):
            pose = advance(mazes, pose, torch.from_numpy(held[:, frame]))
        poses.append(pose.numpy())
    reckoned = ACTIONS.reckon(held, start)
    # The simulator lives on a torus and wraps its heading; reckoning goes on for ever.
    around = np.array([16.0, 16.0, 2 * math.pi])
    off = (reckoned - np.stack(poses, axis=1) + around / 2) % around - around / 2
    assert np.abs(off).max() <= 1e-9
    assert np.ptp(reckoned[..., :2], axis=1).min() > 0.5  # everyone went somewhere


def test_reckoned_frames_are_those_of_the_training_walks() -> None:
    # Latent frame 0 of a walk is a single picture that nothing moves: its keys must be idle.
    held = held_keys(2, 4, 12)
    held[:, 0] = False
    start = torch.tensor([[3.0, 4.0, 0.5]], dtype=torch.float64).expand(4, 3)
    walk = trajectory(open_field(4), start, torch.from_numpy(held))[:, ::PICTURES_PER_LATENT]
    off = ACTIONS.reckon(held, start.numpy()) - walk.numpy()
    off[..., 2] = np.sin(off[..., 2])  # headings up to whole turns
    assert np.abs(off).max() <= 1e-9


def test_keys_held_from_the_beginning_move_nothing_in_the_first_picture(
    make_world: Callable[..., World],
) -> None:
    with make_world(block_frames=2, steps=1).session() as session:
        session.control(buttons={"KeyW"})
        first, second = session.denoise(), session.denoise()
        assert first.applied.keys == (NOTHING, W)
        assert second.applied.keys == (W, W)
        assert np.abs(np.array(session.pose) - [3 * 4 * SPEED, 0, 0]).max() <= 1e-12


def test_reckoning_in_pieces_is_reckoning_at_once() -> None:
    held = held_keys(3, 1, 40)[0]
    whole = ACTIONS.reckon(held)
    parts, pose = [], np.zeros(3)
    for first, last in ((0, 1), (1, 4), (4, 4 + 1), (5, 25), (25, 40)):
        parts.append(ACTIONS.reckon(held[first:last], pose))
        pose = parts[-1][-1]
    assert np.abs(np.concatenate(parts) - whole).max() <= 1e-12


def test_action_vectors_tell_keys_heading_and_place() -> None:
    spec = ActionSpec(
        keys=("KeyW", "KeyL"),
        motion=(Motion(forward=0.5), Motion(turn=math.pi / 4)),
        periods=(8.0,),
        pictures=2,
    )
    held = spec.multi_hot([frozenset({"KeyL"}), frozenset({"KeyW"})])
    assert held.tolist() == [[False, True], [True, False]]
    poses = spec.reckon(held)
    vectors = spec.actions(held, poses)
    assert vectors.shape == (2, spec.dim) == (2, 2 + 2 + 4)
    assert vectors.dtype == np.float32
    # A quarter turn to the right, then two pictures of half a cell: from +x to +y, one cell.
    assert np.abs(poses[-1] - [0, 1, math.pi / 2]).max() <= 1e-12
    turned = [0, 1, 0, 1, 1, 0, 1, 0]
    moved = [1, 0, 0, 1, 1, 0, math.cos(math.pi / 4), math.sin(math.pi / 4)]
    assert np.abs(vectors - [turned, moved]).max() <= 1e-6
    # Places a period apart are told alike: the vector never leaves the range it was trained in.
    far = spec.actions(held, spec.reckon(held, np.array([8e5, -8e5, 0.0])))
    assert np.abs(far - vectors).max() <= 1e-6


def test_a_ray_tells_the_bearing_of_its_column_and_the_place() -> None:
    turned = ACTIONS.multi_hot([L] * 5)  # a quarter turn
    rays = ACTIONS.rays(ACTIONS.reckon(turned), columns=4)
    assert rays.shape == (5, 4, ACTIONS.ray_dim) and rays.dtype == np.float32
    half = math.tan(ACTIONS.field_of_view / 2)
    for column, across in enumerate((-0.75, -0.25, 0.25, 0.75)):
        bearing = math.pi / 2 + math.atan(across * half)
        for n, times in enumerate(ACTIONS.harmonics):
            told = rays[-1, column, 2 * n : 2 * n + 2]
            expected = [math.cos(times * bearing), math.sin(times * bearing)]
            assert told == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(rays[..., 8:], np.broadcast_to(rays[0, 0, 8:], (5, 4, 8)))


def test_rays_meet_again_after_a_full_turn() -> None:
    rays = ACTIONS.rays(ACTIONS.reckon(ACTIONS.multi_hot([L] * 40)), columns=4)
    assert rays[39] == pytest.approx(rays[19], abs=1e-6)
    assert np.abs(rays[39] - rays[29]).max() > 0.5


def test_rays_in_pieces_are_rays_at_once() -> None:
    held = ACTIONS.multi_hot([W, W | J, L, D, W, S])
    whole = ACTIONS.rays(ACTIONS.reckon(held), columns=3)
    pose = ACTIONS.reckon(held[:2])[-1]
    assert ACTIONS.rays(ACTIONS.reckon(held[2:], pose), 3) == pytest.approx(whole[2:], abs=1e-6)


def test_a_spec_without_a_camera_tells_no_rays() -> None:
    blind = replace(ACTIONS, field_of_view=0.0)
    assert blind.ray_dim == 0 and blind.camera is None
    assert blind.rays(blind.reckon(blind.multi_hot([W])), 4).shape == (1, 4, 0)
    with pytest.raises(ValueError, match="field_of_view"):
        replace(ACTIONS, field_of_view=4.0)
    assert replace(ACTIONS, motion=()).ray_dim == 0


def test_without_motion_an_action_is_its_keys() -> None:
    spec = replace(ACTIONS, motion=())
    held = spec.multi_hot([W | J, NOTHING])
    poses = spec.reckon(held)
    vectors = spec.actions(held, poses)
    assert spec.dim == len(KEYS)
    assert vectors.tolist() == [[1, 0, 0, 0, 1, 0], [0] * 6]
    assert poses.tolist() == [[0, 0, 0]] * 2


# --- prompts over time --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", [("", 0, False)]),
        ("red brick", [("red brick", 0, False)]),
        (" red [4s] ", [("red", 0, False)]),
        ("red[4s] | night", [("red", 0, False), ("night", 16, False)]),
        ("red brick[4s] | night[4s#]", [("red brick", 0, False), ("night", 16, True)]),
        ("a[0.3s]|b[0.3s]|c", [("a", 0, False), ("b", 1, False), ("c", 2, False)]),
        ("a [ 1.5 s # ] | | b", None),
        ("a[1s] | [1s] | b", [("a", 0, False), ("", 4, False), ("b", 8, False)]),
    ],
)
def test_prompts_over_time(text: str, segments: list[tuple[str, int, bool]] | None) -> None:
    if segments is None:
        with pytest.raises(ValueError, match="needs a duration"):
            parse_prompts(text, 4.0)
        return
    read = parse_prompts(text, 4.0)
    expected = tuple(PromptSegment(prompt, start, cut) for prompt, start, cut in segments)
    assert tuple(replace(segment, end=None) for segment in read) == expected
    assert [segment.end for segment in read[:-1]] == [segment.start for segment in read[1:]]


def test_prompts_that_end_make_a_stream_as_long() -> None:
    prompts = parse_prompts("red[4s] | night[2.5s]", 4.0)
    assert Script(prompts, (), repeated=True).frames == 26
    assert Script(prompts, (), repeated=False).frames == 1, "controls that are given come first"
    assert Script(parse_prompts("red[4s] | night", 4.0), (), repeated=True).frames is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red | night[4s]", "'red' needs a duration, as in"),
        ("red[4s | night", r"'red\[4s' needs a duration"),
        ("red[4]", r"'red\[4\]' needs a duration"),
        ("red[-1s] | night", r"'red\[-1s\]' needs a duration"),
        ("red[1.2.3s] | night", "'1.2.3' is not a number of seconds"),
        ("red[0s] | night", r"'red\[0s\]' is too short to be seen: a latent frame is 0.25 s"),
        ("red[4s] | night[0.1s]", r"'night\[0.1s\]' is too short"),
    ],
)
def test_prompt_errors_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^prompt: {message}") as told:
        parse_prompts(text, 4.0)
    assert "\n" not in str(told.value)


# --- schedules --------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [(), (250, 500), (500, 500), (1001, 500), (0,), (500, -1)])
def test_schedules_that_make_no_sense_are_refused(steps: tuple[int, ...]) -> None:
    message = r"schedule: steps must be descending numbers in 0…1000, got \("
    with pytest.raises(ValueError, match=message):
        Schedule(steps)
    with pytest.raises(ValueError, match=message):
        Schedule((1000,), first_steps=((1000, 500), steps))


def test_shift_and_context_timestep_are_checked() -> None:
    with pytest.raises(ValueError, match="shift must be above 0, got 0"):
        Schedule((1000,), shift=0)
    for timestep in (-1.0, 1000.5):
        with pytest.raises(ValueError, match="context_timestep must be in 0…1000"):
            Schedule((1000,), context_timestep=timestep)


@pytest.mark.parametrize(
    ("count", "steps"),
    [
        (1, (1000,)),
        (2, (1000, 500)),
        (3, (1000, 667, 334)),
        (4, (1000, 750, 500, 250)),
        (1000, tuple(range(1000, 0, -1))),
    ],
)
def test_uniform_steps(count: int, steps: tuple[int, ...]) -> None:
    assert Schedule.uniform(count, 5.0).steps == steps


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_uniform_needs_a_possible_number(count: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be in 1…1000, got {count}"):
        Schedule.uniform(count, 5.0)


def test_cells_of_a_block() -> None:
    schedule = Schedule((1000, 750, 500, 250), shift=5.0, context_timestep=20.0)
    timesteps = [1000.0, 937.5, 833.33331298828125, 625.0]  # fractional: never rounded
    sigmas = [1.0, 0.9375, 0.8333333134651184, 0.625, 0.0]
    assert list(schedule.cells(7)) == [
        Cell("denoise", 7, k, timesteps[k], sigmas[k], sigmas[k + 1], CLEAN) for k in range(4)
    ]
    assert schedule.commit_cell(7) == Cell(
        "commit", 7, CLEAN, 20.0, 0.0, reads=CLEAN, publishes=CLEAN
    )


def test_first_blocks_may_have_steps_of_their_own() -> None:
    schedule = Schedule((1000, 500), shift=1.0, first_steps=((1000, 750, 500, 250), (1000,)))
    assert [len(list(schedule.cells(block))) for block in range(4)] == [4, 1, 2, 2]
    assert [cell.sigma for cell in schedule.cells(0)] == [1.0, 0.75, 0.5, 0.25]
    assert [cell.next_sigma for cell in schedule.cells(1)] == [0.0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_levels_are_the_shifted_table(shift: float) -> None:
    sigmas, timesteps = shift_table(shift)
    assert bool((sigmas.diff() < 0).all())
    assert torch.equal(timesteps, sigmas * 1000)
    steps = (1000, 900, 337, 1)
    for step, timestep, sigma in zip(steps, *levels(steps, shift), strict=True):
        linear = step / 1000
        assert abs(sigma - shift * linear / (1 + (shift - 1) * linear)) <= 1e-6
        assert abs(timestep - 1000 * sigma) <= 1e-3


# --- noise ------------------------------------------------------------------------------------
SHAPE = (1, 4, 2, 8, 8)


def test_a_schedule_line_names_a_sampler_and_its_steps(make_world: Callable[..., World]) -> None:
    config = make_world().config
    assert config.sampling(None, None) == (config.schedule(), config.sampler)
    assert config.sampling(3, "renoise") == (config.schedule(3), "renoise")
    schedule, sampler = config.sampling(None, "euler:1000, 600,100")
    assert (schedule.steps, sampler) == ((1000, 600, 100), "euler")
    assert schedule.shift == config.shift


@pytest.mark.parametrize(
    ("steps", "line", "message"),
    [
        (None, "heun", "'heun' is none of renoise, euler"),
        (None, "euler:1000,x", "a step list is written as"),
        (None, "euler:", "a step list is written as"),
        (None, "euler:500,600", "descending"),
        (2, "euler:1000,500", "leave out the number of steps"),
    ],
)
def test_schedule_lines_that_cannot_be(
    make_world: Callable[..., World], steps: int | None, line: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_world().config.sampling(steps, line)


def test_noise_is_a_pure_function_of_seed_block_and_step() -> None:
    keys = [
        (seed, block, step)
        for seed in (0, 7, 2**64 - 1)
        for block in (0, 1, 10**6)
        for step in (0, 3)
    ]
    torch.manual_seed(1)
    forwards = {key: noise(*key, SHAPE) for key in keys}
    torch.manual_seed(2)
    for key in reversed(keys):  # neither the order nor torch's generator matters
        assert torch.equal(noise(*key, SHAPE), forwards[key])
    state = torch.get_rng_state()
    noise(0, 0, 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb one
    flat = torch.stack(list(forwards.values())).flatten(1)
    correlation = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 0.25  # 512 numbers: five deviations


def test_noise_does_not_overlap_between_neighbours() -> None:
    # Counters that ran into each other would repeat numbers, however large the tensor.
    large = [noise(3, block, step, (100_000,)) for block in (0, 1) for step in (0, 1)]
    seen = torch.cat(large).double()
    pairs = torch.stack((seen[:-1], seen[1:]), dim=1)  # two neighbours at once never repeat
    assert len(pairs.unique(dim=0)) == len(pairs)


def test_noise_is_standard_normal_float32() -> None:
    x = noise(5, 2, 1, (200_000,))
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.1


def test_noise_never_changes() -> None:
    # Seeds are saved in replay files: these numbers are a promise.
    expected = [-1.2722312211990356, 1.6172232627868652, -1.1294376850128174, 1.599673867225647]
    assert noise(42, 3, 1, (4,)).tolist() == pytest.approx(expected, abs=1e-7)
