"""`worldsim controls`: what one can do in a world; its weights are not loaded."""

from worldsim.apps.opening import MADE
from worldsim.bundle import locate
from worldsim.config import WorldConfig
from worldsim.folder import config_of
from worldsim.manual import manual


def run(name: str) -> None:
    """Print the manual of a world.

    Raises:
        ValueError: if there is no such world.
    """
    print(manual(_config(name)))


def _config(name: str) -> WorldConfig:
    if name in MADE:
        from worldsim.apps import medium

        return medium.random_world(medium.MADE[name], "auto", "cpu").config
    return config_of(locate(name, only_configs=True), None)
