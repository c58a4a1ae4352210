"""Worlds with other controls are other data: native action vectors of the field, each against a
slow reading of its format; and their specs, scripts and words."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from worldsim.actions import ActionSpec, Motion
from worldsim.config import FILE, WorldConfig
from worldsim.controls import ControlState
from worldsim.manual import example, manual, rows
from worldsim.maze.actions import ACTIONS
from worldsim.signals import (
    Analog,
    Bins,
    Buttons,
    CameraPose,
    Choice,
    Constant,
    Place,
)

WASD = ("KeyW", "KeyS", "KeyA", "KeyD")
LETTERS = {key[-1]: key for key in WASD}
OPPOSED = (("KeyW", "KeyS"), ("KeyA", "KeyD"))

# Matrix-Game 2.0: forward, back, left, right, jump, attack; then the mouse, up and right.
MATRIX = ActionSpec(
    keys=(*WASD, "Space", "Mouse0"),
    letters=LETTERS,
    labels={"KeyW": "forward", "KeyS": "back", "Space": "jump", "look": "look around"},
    signals=(
        Buttons(),
        Analog("look.y", scale=-0.01, limit=0.1),
        Analog("look.x", scale=0.01, limit=0.1, keys={"KeyA": -0.05}),
    ),
    forbidden=OPPOSED,
)

# Oasis: 25 floats in the order of its vocabulary, of which two are the camera, in 1/40 of ± 20°.
HOTBAR = tuple(f"Digit{n}" for n in range(1, 10))
BEFORE = ("KeyE", "Escape", *HOTBAR, *WASD)
AFTER = ("Space", "ShiftLeft", "ControlLeft", "KeyF", "Mouse0", "Mouse2", "Mouse1", "KeyQ")
OASIS = ActionSpec(
    keys=(*WASD, *AFTER, *HOTBAR, "KeyE", "Escape"),
    letters=LETTERS,
    signals=(
        Buttons(BEFORE),
        Analog("look.y", scale=0.05, step=0.025, limit=1.0),
        Analog("look.x", scale=0.05, step=0.025, limit=1.0),
        Buttons(AFTER),
    ),
)

# LingBot: a camera that walks and looks, as a matrix and its intrinsics.
LENS = (0.8, 1.4, 0.5, 0.5)
CAMERA = ActionSpec(
    keys=(*WASD, "Space"),
    letters=LETTERS,
    motion=(
        Motion(forward=0.1), Motion(forward=-0.1), Motion(right=-0.1), Motion(right=0.1),
        Motion(up=0.05),
    ),
    axes={
        "look.x": Motion(turn=0.01),
        "look.y": Motion(tilt=-0.02),
        "move.x": Motion(right=0.1),
        "move.z": Motion(forward=0.1),
    },
    signals=(CameraPose(LENS),),
    forbidden=OPPOSED,
)  # fmt: skip
SPECS = {"matrix": MATRIX, "oasis": OASIS, "camera": CAMERA}


def did(*buttons: str, **others: object) -> ControlState:
    return ControlState(frozenset(buttons), **others)  # type: ignore[arg-type]


def told(spec: ActionSpec, *states: ControlState) -> np.ndarray:
    return spec.encode(spec.track(states)).actions


# --- native vectors, as their formats say -------------------------------------------------------
def test_a_multi_hot_and_a_mouse() -> None:
    vectors = told(
        MATRIX, did("KeyW", "Space"), did("KeyA", look=(3.0, -2.0)), did(look=(99.0, 99.0))
    )
    assert vectors.dtype == np.float32 and MATRIX.dim == 8
    wanted = [
        [1, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0.02, 0.03 - 0.05],
        [0, 0, 0, 0, 0, 0, -0.1, 0.1],
    ]
    assert vectors == pytest.approx(np.array(wanted), abs=1e-7)


def test_twenty_five_floats() -> None:
    names = (*BEFORE, "cameraX", "cameraY", *AFTER)
    assert OASIS.dim == len(names) == 25
    rng = np.random.default_rng(3)
    for _ in range(20):
        held = frozenset(rng.choice(OASIS.keys, size=3).tolist())
        right, down = rng.uniform(-25, 25, 2)
        wanted = []
        for name in names:
            if name.startswith("camera"):
                degrees = down if name == "cameraX" else right
                bucket = min(40, max(-40, round(degrees / 0.5)))
                wanted.append(bucket / 40)
            else:
                wanted.append(float(name in held))
        vector = told(OASIS, ControlState(held, (right, down)))
        assert vector[0] == pytest.approx(wanted, abs=1e-6)


def test_bins_and_choices() -> None:
    across = (-1000, -500, -300, -200, -100, -60, -30, -20, -10, -4, -2)
    values = (*across, 0, *(-x for x in reversed(across)))
    down = (-200, -100, -50, -20, -10, -8, -4, 0, 4, 8, 10, 20, 50, 100, 200)
    keys = tuple(f"Key{letter}" for letter in "WASDRQEFGXC")
    diamond = ActionSpec(
        keys=(*keys, "Mouse0", "Mouse2"),
        signals=(Buttons(), Bins("look.x", values), Bins("look.y", down)),
    )
    assert diamond.dim == 51
    vector = told(diamond, did("KeyW", "Mouse2", look=(-27.0, 12.0)))[0]
    assert np.flatnonzero(vector).tolist() == [0, 12, 13 + values.index(-30), 36 + down.index(10)]

    walks = ((), *((key,) for key in WASD), *((a, b) for a in WASD[:2] for b in WASD[2:]))
    yume = ActionSpec(keys=WASD, signals=(Choice(walks),))
    assert yume.dim == 9
    tracks = {(): 0, ("KeyS",): 2, ("KeyW", "KeyD"): 6, ("KeyW", "KeyS"): 1}
    for held, index in tracks.items():
        assert told(yume, did(*held))[0].tolist() == [float(i == index) for i in range(9)]
    atari = ActionSpec(keys=("Noop", "Fire"), signals=(Choice((("Fire",),)),), neutral=("Noop",))
    assert told(atari, did(), did("Fire")).tolist() == [[0], [1]]
    assert told(replace(atari, signals=()), did(), did("Fire")).tolist() == [[1, 0], [0, 1]]
    assert told(ActionSpec(keys=(), signals=(Constant((0.5, 2.0)),)), did()).tolist() == [[0.5, 2]]


def turned(axis: str, angle: float) -> np.ndarray:
    """A rotation by the right hand about an axis of OpenCV's camera."""
    c, s = math.cos(angle), math.sin(angle)
    about_y = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    about_x = [[1, 0, 0], [0, c, -s], [0, s, c]]
    return np.array(about_y if axis == "y" else about_x)


def test_a_camera_is_walked_picture_by_picture() -> None:
    track = [
        did("KeyW"), did("KeyW", "KeyD", look=(20.0, 0.0)), did("Space", look=(-7.0, -300.0)),
        did(look=(0.0, 30.0), move=(0.5, 0.0, -1.0)), did(),
    ]  # fmt: skip
    encoded = CAMERA.encode(CAMERA.track(track))
    vectors, poses = encoded.actions, encoded.poses
    assert vectors.shape == (5, 20) and poses.shape == (5, 5) and CAMERA.pose_dim == 5
    assert np.array_equal(vectors[:, 16:], np.tile(np.float32(LENS), (5, 1)))
    heading, tilt, place, speed = 0.0, 0.0, np.zeros(3), 0.1
    for state, vector in zip(track, vectors, strict=True):
        for _ in range(4):
            heading += 0.01 * state.look[0] / 4
            tilt = max(-math.pi / 2, min(math.pi / 2, tilt - 0.02 * state.look[1] / 4))
            side = ("KeyD" in state.buttons) + state.move[0]
            ahead = ("KeyW" in state.buttons) + state.move[2]
            climb = -0.05 * ("Space" in state.buttons)  # down is positive
            place = place + turned("y", heading) @ [speed * side, climb, speed * ahead]
        rotation = turned("y", heading) @ turned("x", tilt)
        wanted = np.eye(4)
        wanted[:3, :3], wanted[:3, 3] = rotation, place
        assert vector[:16].reshape(4, 4) == pytest.approx(wanted, abs=1e-6)
    assert told(CAMERA, did())[0, :16].reshape(4, 4).tolist() == np.eye(4).tolist()
    assert tilt != 0 and np.abs(place).min() > 0.01


def test_the_maze_is_encoded_as_before() -> None:
    """By the formula that its weights were trained with, and from its file, which is older than
    most of the spec's fields."""
    import importlib.util

    spec = importlib.util.find_spec("worldsim.maze")
    assert spec is not None and spec.submodule_search_locations is not None
    for name in ("maze", "maze-short"):
        folder = Path(next(iter(spec.submodule_search_locations)), "weights", name)
        stored = json.loads((folder / FILE).read_text())["actions"]
        assert not {"signals", "rate", "axes"} & set(stored)
        assert WorldConfig.load(folder).actions == ACTIONS
    held = np.random.default_rng(0).random((30, 6)) < 0.4
    track = [
        ControlState(frozenset(k for k, down in zip(ACTIONS.keys, row, strict=True) if down))
        for row in held
    ]
    start = np.array([0.3, -2.0, 1.0])
    encoded = ACTIONS.encode(ACTIONS.track(track), start, columns=5)
    moves = np.array([[m.forward, m.right, m.turn] for m in ACTIONS.motion])
    forward, right, turn = (np.repeat(way, 4) for way in (held.astype(float) @ moves).T)
    heading = start[2] + np.cumsum(turn)
    x = start[0] + np.cumsum(forward * np.cos(heading) - right * np.sin(heading))
    y = start[1] + np.cumsum(forward * np.sin(heading) + right * np.cos(heading))
    poses = np.stack([x, y, heading], axis=-1)[3::4]
    angles = [poses[:, 2:], *(2 * math.pi * poses[:, :2] / period for period in (4.0, 16.0))]
    circle = [np.stack([np.cos(a), np.sin(a)], axis=-1).reshape(30, -1) for a in angles]
    wanted = np.concatenate([held, *circle], axis=-1).astype(np.float32)
    assert np.array_equal(encoded.poses, poses)
    assert np.array_equal(encoded.actions, wanted)
    assert encoded.rays.shape == (30, 5, ACTIONS.ray_dim)
    assert np.array_equal(encoded.rays, ACTIONS.rays(poses, 5))


def test_pictures_latents_and_blocks_have_actions_of_their_own() -> None:
    track = [did("KeyW", look=(4.0, 0.0)), did("KeyA", look=(8.0, 2.0))]
    every = replace(MATRIX, rate="picture", pictures=2)
    vectors = told(every, *track)
    assert vectors.shape == (2, every.dim) == (2, 16)
    halves = [state.shared(2) for state in track for _ in range(2)]
    assert vectors.reshape(4, 8) == pytest.approx(told(MATRIX, *halves), abs=1e-7)

    blockwise = replace(MATRIX, rate="block")
    states = blockwise.track(track)
    assert states == (did("KeyW", "KeyA", look=(6.0, 1.0)),) * 2
    assert blockwise.track(states) == states
    assert blockwise.track([did("KeyW"), did("KeyS")]) == (did("KeyS"),) * 2

    # A camera is told where it is at every picture of a latent frame.
    seen = replace(CAMERA, rate="picture")
    slow = replace(CAMERA, pictures=1, axes={}, motion=CAMERA.motion)
    walked = told(slow, *[did("KeyW", "KeyD")] * 8).reshape(2, -1)
    assert told(seen, did("KeyW", "KeyD"), did("KeyW", "KeyD")) == pytest.approx(walked, abs=1e-6)


def test_a_camera_in_pieces_is_a_camera_at_once() -> None:
    track = [did("KeyW", look=(float(i), -50.0 * (i % 3))) for i in range(8)]
    for spec in (CAMERA, replace(CAMERA, rate="picture")):
        whole = spec.encode(spec.track(track))
        start, parts = np.zeros(5), []
        for first, last in ((0, 1), (1, 4), (4, 8)):
            part = spec.encode(spec.track(track[first:last]), start)
            parts.append(part.actions)
            start = part.poses[-1]
        assert np.concatenate(parts) == pytest.approx(whole.actions, abs=1e-6)


# --- specs as data ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*SPECS, "maze"])
def test_a_spec_comes_back_from_world_json(name: str, tmp_path: Path) -> None:
    spec = SPECS.get(name, ACTIONS)
    choices = (Choice(((), ("KeyW", "KeyA"))), Bins("scroll", (-1.0, 1.0)), Constant((2.0,)))
    more = replace(spec, signals=(*spec.told, *choices), neutral=("KeyA",), rate="block")
    for each in (spec, more, replace(more, signals=())):
        config = WorldConfig("some", 32, 48, actions=each)
        config.save(tmp_path)
        assert WorldConfig.load(tmp_path) == config
        track = each.track([did("KeyW"), did()])
        again = WorldConfig.load(tmp_path).actions
        assert again is not None
        assert np.array_equal(again.encode(track).actions, each.encode(track).actions)


BAD_SPECS = {
    "neutral name keys that do not exist": {"neutral": ("KeyX",)},
    "forbidden name keys that do not exist": {"forbidden": (("KeyW", "KeyX"),)},
    "signals name keys that do not exist": {"signals": (Buttons(("KeyX",)),)},
    r"signals name keys that do not exist: \['KeyY'\]": {"signals": (Choice((("KeyY",),)),)},
    "an axis is one of look.x, look.y, scroll, .* not look": {"signals": (Analog("look"),)},
    "an axis is one of .* not turn": {"axes": {"turn": Motion()}},
    "a signal tells the pose, but nothing moves": {"signals": (Place((4.0,)),)},
    "must be two keys or more": {"forbidden": (("KeyW",),)},
    "rate must be one of picture, latent, block": {"rate": "minute"},
    "cannot be held at once": {"neutral": ("KeyW", "KeyS"), "forbidden": OPPOSED},
}


@pytest.mark.parametrize("message", BAD_SPECS)
def test_specs_that_cannot_be(message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ActionSpec(keys=WASD, **BAD_SPECS[message])  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_signals_of_a_file_that_nobody_knows(tmp_path: Path) -> None:
    config = WorldConfig("some", 32, 48, actions=MATRIX)
    for signal, message in (
        ({"kind": "warp"}, "a signal is one of buttons, analog, bins, .* not warp"),
        ({"scale": 2.0}, "a signal is one of"),
        ({"kind": "analog", "size": 2.0}, "cannot be read: .*'size'"),
    ):
        data = asdict(config)
        data["actions"]["signals"] = [signal]
        (tmp_path / FILE).write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            WorldConfig.load(tmp_path)


# --- scripts and words --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "track"),
    [
        ("W*2 .", [did("KeyW")] * 2 + [did()]),
        ("W+look(3,-1)*2", [did("KeyW", look=(3.0, -1.0))] * 2),
        ("WA+move(0, 0,1), look( -1e1 ,0)", [did("KeyW", "KeyA", move=(0.0, 0.0, 1.0)),
                                             did(look=(-10.0, 0.0))]),
        ("KeyW+Space*2", [did("KeyW", "Space")] * 2),
        (".+look(1,2)", [did(look=(1.0, 2.0))]),
    ],
)  # fmt: skip
def test_scripts_of_more_than_keys(script: str, track: list[ControlState]) -> None:
    assert CAMERA.parse(script) == tuple(track)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("WS*3", "'WS': KeyW and KeyS cannot be held at once in this world"),
        ("W+S", r"'W\+S': KeyW and KeyS cannot be held at once"),
        ("scroll(1)", "unknown control 'scroll'; this world has W · S · A · D · Space · look"),
        ("look(1)", "look must be 2 finite numbers"),
        ("look(1,nan)", "look must be 2 finite numbers"),
        ("move(1,2)", "move must be 3 finite numbers"),
        ("look(1,x)", "must hold numbers, as in"),
        ("look()", "must hold numbers, as in"),
        ("look(1,2", "unknown key"),
        ("W+", r"'\+' stands between two controls"),
        ("Q+look(1,2)", "unknown key 'Q'"),
        ("look(1,2)*0", "must end in a count"),
    ],
)
def test_errors_of_such_scripts_are_one_clear_line(script: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^controls: .*{message}") as error:
        CAMERA.parse(script)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", [*SPECS.values(), ACTIONS, replace(MATRIX, keys=WASD,
    signals=(Analog("scroll"),)), ActionSpec(keys=(), signals=(Analog("look.x"),))])  # fmt: skip
def test_the_manual_says_everything_and_its_example_can_be_played(spec: ActionSpec) -> None:
    text = manual(WorldConfig("some", 32, 48, actions=spec))
    legend = rows(spec)
    assert [row.codes[0] for row in legend if row.codes] == list(spec.keys)
    for row in legend:
        assert row.name in text and row.label in text and all(code in text for code in row.codes)
    assert text.endswith(example(spec))
    track = spec.parse(example(spec))
    used = {name for state in track for name in ("look", "move", "scroll")
            if getattr(state, name) != getattr(did(), name)}  # fmt: skip
    assert used == set(spec.analog) and (not spec.keys or any(state.buttons for state in track))


def test_the_manual_in_full() -> None:
    config = WorldConfig("blocks", 32, 48, fps=20.0, block_frames=3, actions=replace(
        MATRIX, rate="block", aliases={"ArrowUp": "KeyW"}, neutral=("Space",)))  # fmt: skip
    assert manual(config).splitlines() == [
        "blocks heeds its controls once for each block (3 latent frames, 0.6 s):",
        "",
        "  W           forward                    KeyW, ArrowUp",
        "  S           back                       KeyS",
        "  A                                      KeyA",
        "  D                                      KeyD",
        "  Space       jump                       Space",
        "  Mouse0                                 Mouse0",
        "  look(3,-1)  look around",
        "  .           nothing (counts as Space)",
        "",
        "never at once: KeyW and KeyS (the one pressed last counts; a script must choose)",
        "never at once: KeyA and KeyD (the one pressed last counts; a script must choose)",
        "script, in latent frames of 0.2 s: W*12 W+Mouse0*4 W+look(3,-1)*4 .*8",
    ]
    nothing = manual(WorldConfig("still", 32, 48))
    assert nothing == "still takes no controls: its prompt alone steers it"
    assert MATRIX.legend() == (
        "W forward · S back · A · D · Space jump · Mouse0 · look look around"
    )
