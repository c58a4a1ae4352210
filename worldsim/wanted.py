"""What is asked of a session, before a world has said what becomes of it."""

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from worldsim.cache.mid import check_form
from worldsim.config import Settings

if TYPE_CHECKING:
    from worldsim.stocked import Stocked

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Wanted:
    """None means the world's own. `worldsim.world.World.session` says what each of them is.

    Attributes:
        size: height and width of a picture.
    """

    prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    cache: str | None = None
    schedule: str | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    independent_first_frame: bool | None = None
    context_noise: float | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None

    @property
    def words(self) -> tuple[str | None, Tensor | None, Tensor | None]:
        """What it asks for in words, as `Stocked.ask` takes them."""
        return self.prompt, self.prompt_embeds, self.negative_prompt_embeds


def settled(world: "Stocked", wanted: Wanted) -> Settings:
    """The settings of such a session: the world's own, but for what is wanted. Warns, once for a
    world, of a schedule that it was not trained for.

    Raises:
        ValueError: for what this world cannot do.
    """
    own = world.config
    schedule, sampler = own.sampling(wanted.steps, wanted.schedule)
    if wanted.context_noise is not None:
        schedule = replace(schedule, context_timestep=float(wanted.context_noise))
    cache = own.cache_config(wanted.cache)
    check_form(cache, world.actions.camera)
    if schedule.context == "joint":
        raise ValueError(
            "schedule: nothing runs joint windows yet; 'worldsim schedule show' draws them"
        )
    if cache.prompt == "recache":
        schedule.check_recache()
    if schedule.rule != own.rule and schedule.rule not in world.warned_of:
        world.warned_of.add(schedule.rule)
        warnings.warn(
            f"{own.name} was trained to read what is {own.rule} of earlier blocks, and under "
            f"this schedule reads what is {schedule.rule}",
            stacklevel=4,  # who called the world, which called for this
        )
    found = Settings(
        seed=wanted.seed,
        schedule=schedule,
        cache=cache,
        sampler=sampler,
        dtype=str(world.dtype).removeprefix("torch."),
        attention=world.attention,
        size=wanted.size or own.size,
        guidance=_or(wanted.guidance, own.guidance),
        negative_prompt=_or(wanted.negative_prompt, own.negative_prompt),
        independent_first_frame=_or(wanted.independent_first_frame, own.independent_first_frame),
    )
    unwanted = wanted.negative_prompt, wanted.negative_prompt_embeds
    if found.rows == 1 and unwanted != (None, None):
        raise ValueError("a negative prompt does nothing without guidance: give guidance=3, say")
    return found


def _or(wanted: T | None, own: T) -> T:
    return own if wanted is None else wanted
