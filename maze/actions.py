"""The controls of the maze: the one place where its keys meet worldsim's `ActionSpec`."""

from worldsim.actions import ActionSpec, Motion
from worldsim.maze.raycast import FIELD_OF_VIEW
from worldsim.maze.simulator import KEYS, PICTURES_PER_LATENT, SPEED, TURN

ACTIONS = ActionSpec(
    keys=KEYS,
    letters={key.removeprefix("Key"): key for key in KEYS},
    aliases={"ArrowUp": "KeyW", "ArrowDown": "KeyS", "ArrowLeft": "KeyJ", "ArrowRight": "KeyL"},
    labels={
        "KeyW": "forward",
        "KeyS": "back",
        "KeyA": "step left",
        "KeyD": "step right",
        "KeyJ": "turn left",
        "KeyL": "turn right",
    },
    motion=(
        Motion(forward=SPEED),
        Motion(forward=-SPEED),
        Motion(right=-SPEED),
        Motion(right=SPEED),
        Motion(turn=-TURN),
        Motion(turn=TURN),
    ),
    periods=(4.0, 16.0),
    field_of_view=FIELD_OF_VIEW,
    pictures=PICTURES_PER_LATENT,
)
