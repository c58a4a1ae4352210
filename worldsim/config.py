"""What a world is, apart from its weights: one frozen dataclass, stored as ``world.json``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import EllipsisType
from typing import Any

from worldsim.actions import ActionSpec
from worldsim.cache.config import CacheConfig
from worldsim.lines import read
from worldsim.models.files import read_config
from worldsim.samplers import SAMPLERS
from worldsim.schedule import Schedule

FILE = "world.json"
UNGUIDED = 1.0  # guidance that guides nowhere: one row is enough
KINDS: Any = {int: (int, "a whole number"), float: ((int, float), "a number"), str: (str, "text")}


@dataclass(frozen=True)
class WorldConfig:
    """Defaults of a world; a session may override what it asks for.

    Attributes:
        name: what people call it.
        height, width: size of a picture in pixels.
        fps: pictures per second at which it was made.
        block_frames: latent frames of a block.
        steps: denoising steps of a block: how many equal ones, or which.
        shift: timestep shift of the noise levels.
        grid: what a step means, see `Schedule`; ``unipc`` always takes ``solver``.
        sampler: ``renoise``, ``euler`` or ``unipc``, see `worldsim.samplers`.
        context_timestep: timestep of the context pass of a block that was made; one that was given
            is always told as clean (0).
        cache: one line, see `CacheConfig.parse`.
        actions: its controls, or None.
        prompt, controls: what it shows when nothing is asked for; the script is repeated.
        guidance: how far to go from the negative prompt to the prompt; 1 needs no negative one.
        negative_prompt: what guidance leads away from.
        independent_first_frame: the first latent frame is a block of its own.
        text_length: rows of an encoded prompt, where the text encoder does not say.
        rule: what the model was trained to read of earlier blocks, see `Schedule.rule`. Blocks are
            made so unless a session names a schedule; one under another rule warns.
    """

    name: str
    height: int
    width: int
    fps: float = 16.0
    block_frames: int = 1
    steps: int | tuple[int, ...] = 4
    shift: float = 3.0
    grid: str = "warped"
    sampler: str = "renoise"
    context_timestep: float = 0.0
    cache: str = "recent=all"
    actions: ActionSpec | None = None
    prompt: str = ""
    controls: str = ""
    guidance: float = UNGUIDED
    negative_prompt: str = ""
    independent_first_frame: bool = False
    text_length: int = 512
    rule: str = "clean"

    def __post_init__(self) -> None:
        for field in fields(self):  # what comes out of a file may be anything
            kind, value = KINDS.get(field.type), getattr(self, field.name)
            if kind is not None and (not isinstance(value, kind[0]) or isinstance(value, bool)):
                raise ValueError(f"world: {field.name} must be {kind[1]}, got {value!r}")
        for name in ("height", "width", "block_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"world: {name} must be 1 or more, got {getattr(self, name)}")
        if not self.fps > 0:  # nor NaN
            raise ValueError(f"world: fps must be above 0, got {self.fps}")
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"world: sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}"
            )
        self.schedule()
        self.cache_config()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return (self.height, self.width)

    def sized(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size that is asked for; None is the world's own.

        Raises:
            ValueError: for less than one pixel.
        """
        size = (
            self.height if height is None else height, self.width if width is None else width,
        )  # fmt: skip
        if min(size) < 1:
            raise ValueError(f"a picture must be 1 pixel or more, got height, width = {size}")
        return size

    def schedule(self, steps: int | None = None, sampler: str | None = None) -> Schedule:
        """The world's schedule, or the same with another number of steps or for a sampler."""
        wanted = self.steps if steps is None else steps
        grid = "solver" if (sampler or self.sampler) == "unipc" else self.grid
        if isinstance(wanted, tuple):
            plain = Schedule(wanted, self.shift, self.context_timestep, grid=grid)
        else:
            plain = Schedule.uniform(wanted, self.shift, self.context_timestep, grid)
        return plain.under(self.rule)

    def sampling(self, steps: int | None, line: str | None) -> tuple[Schedule, str]:
        """A session's schedule and sampler.

        Args:
            steps: number of uniform steps, None for the world's own.
            line: a sampler, the name of a schedule, or both, with or without a step list, as in
                ``euler``, ``tpp`` or ``renoise+hiar:1000,750,500,250``; None for the world's own.

        Raises:
            ValueError: for words that nobody knows, a bad step list, or both a list and a number.
        """
        if line is None:
            return self.schedule(steps), self.sampler
        words = line.partition(":")[0].split("+")
        plain = self.schedule(steps, next((word for word in words if word in SAMPLERS), None))
        return read(line, plain, self.sampler, steps is not None)

    def cache_config(self, line: str | None = None) -> CacheConfig:
        """The world's cache, or the one that ``line`` describes."""
        return CacheConfig.parse(self.cache if line is None else line, self.block_frames)

    def windowed(
        self, window: int | EllipsisType | None, sink: int | None, positions: str | None
    ) -> CacheConfig:
        """The world's cache with the field's words for it; see `worldsim.world.World.session`.

        Args:
            window: ``...`` is the world's own, None everything.
            sink, positions: None is the world's own.

        Raises:
            ValueError: for a window that the sink and a block do not fit in.
        """
        own, block = self.cache_config(), self.block_frames
        kept = own.sink if sink is None else sink
        recent: int | None
        if window is ...:
            recent = None if own.recent is None else own.sink + own.recent - kept
        else:
            recent = None if window is None else window - kept - block
        if recent is not None and recent < 0:
            raise ValueError(
                f"cache: window={recent + kept + block} is too small for sink={kept} and a block "
                f"of {block}; it needs at least {kept + block}"
            )
        return replace(own, sink=kept, recent=recent, positions=positions or own.positions)

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "WorldConfig":
        """Read ``world.json``.

        Raises:
            ValueError: if it is missing, is no JSON, or has fields that are not known.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {FILE}: it is not a world folder")
        told = read_config(path)
        try:
            return cls.from_dict(told)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "WorldConfig":
        actions, steps = data.get("actions"), data.get("steps")
        read: dict[str, Any] = {
            "actions": None if actions is None else ActionSpec.from_dict(actions)
        }
        if isinstance(steps, list):
            read["steps"] = tuple(steps)
        return cls(**{**data, **read})


@dataclass(frozen=True)
class Settings:
    """Everything of one session that changes its pixels, beside the world itself.

    Attributes:
        seed: names the noise, 0…2⁶⁴-1.
        schedule: when and at which levels blocks are denoised.
        cache: what the context keeps.
        sampler, guidance, negative_prompt, independent_first_frame: see `WorldConfig`.
        dtype: in which the models compute.
        attention: the attention kernel.
        size: height and width of a picture.
    """

    seed: int
    schedule: Schedule
    cache: CacheConfig
    sampler: str
    dtype: str
    attention: str
    size: tuple[int, int]
    guidance: float = UNGUIDED
    negative_prompt: str = ""
    independent_first_frame: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0…2⁶⁴-1, got {self.seed}")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be 0 or more, got {self.guidance}")

    @property
    def rows(self) -> int:
        """Contexts of a session: a guided one has a second, under the negative prompt."""
        return 1 if self.guidance == UNGUIDED else 2
