"""The command line: which commands there are, and how an error reaches people.

Options stand in `cli_*.py`, a file for each concern. What a command runs is loaded when it is
called, so that `worldsim --help` loads no model.
"""

import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from worldsim.apps import cli_measure, cli_play, cli_schedule, cli_stream, cli_world
from worldsim.apps.out_of_memory import advice
from worldsim.streaming.faults import RankFailed

# As `worldsim --help` lists them.
ORDER = (
    "stream", "replay", "controls", "play", "fuzz", "bench", "train", "evaluate", "compare", "soak",
    "convert", "doctor", "sheet",
)  # fmt: skip

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="worldsim: a block-diffusion video model as a live, controllable world.",
)
app.registered_commands = sorted(
    (
        command
        for group in (cli_stream, cli_play, cli_measure, cli_world)
        for command in group.app.registered_commands
    ),
    key=lambda command: ORDER.index(command.name or ""),
)
app.add_typer(cli_schedule.app, name="schedule")


def _say_version(asked: bool) -> None:
    if asked:
        print(f"worldsim {version('worldsim')}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool,
        typer.Option("--version", help="Say it and stop.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    pass


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"worldsim: {message}", file=sys.stderr)


def main() -> None:
    """Console entry: errors of the user are one line and exit code 2, any other failure 1."""
    warnings.showwarning = _warn  # one line, without a source path
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"worldsim: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        line = advice(error)
        if line is None:
            raise
        print(f"worldsim: {line}", file=sys.stderr)
        sys.exit(2)
    except RankFailed as error:
        if str(error):  # else another rank has said it
            print(f"worldsim: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
