"""How a session begins: settings that were checked, words, and latents that it is given."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from worldsim.pictures import read_pictures
from worldsim.rollout import Noise
from worldsim.session import Session
from worldsim.wanted import Wanted, settled

if TYPE_CHECKING:
    from worldsim.world import World


def begun(
    world: "World",
    wanted: Wanted,
    given: Tensor | None = None,
    noise: Noise | None = None,
    history: int = 0,
) -> Session:
    """A new session that has taken what it is given, see `given_latents`.

    Raises:
        ValueError: for what this world cannot do.
    """
    frames, each = 0 if given is None else given.shape[2], world.config.block_frames
    if wanted.independent_first_frame is None and frame_alone(frames, each):
        wanted = replace(wanted, independent_first_frame=True)
    settings = settled(world, wanted)
    unwanted = wanted.negative_prompt, wanted.negative_prompt_embeds
    if settings.rows == 1 and unwanted != (None, None):
        raise ValueError("a negative prompt does nothing without guidance: give guidance=3, say")
    if frames and (frames - settings.independent_first_frame) % each:
        raise ValueError(f"given latents have {frames} frames, which are no whole blocks of {each}")
    session = world.open(settings, world.ask(settings, *wanted.words), history, noise)
    try:
        while given is not None and session.frame < frames:
            session.give(given[:, :, session.frame : session.frame + session.block_frames])
    except BaseException:
        session.close()
        raise
    return session


def given_latents(
    world: "World", size: tuple[int, int], given: Tensor | None, pictures: Any
) -> Tensor | None:
    """Clean latents ``[1, C, F, h, w]`` that a session begins with, if any: as they are, or those
    of pictures.

    Raises:
        ValueError: for a size (height, width) that the models cannot make, for what is of another
            size, or for both.
    """
    world.latents_of(size, 1)
    if pictures is not None:
        if given is not None:
            raise ValueError("give latents or pictures, not both")
        return world.encoded(read_pictures(pictures, size))
    if given is None:
        return None
    if given.ndim != 5:
        raise ValueError(f"given latents must be [1, C, F, h, w], got {list(given.shape)}")
    wanted = world.latents_of(size, given.shape[2])
    if given.shape != wanted:
        raise ValueError(f"given latents must be {list(wanted)}, got {list(given.shape)}")
    return given


def frame_alone(frames: int, block_frames: int) -> bool:
    """Whether one frame is left over of so many given ones: it is a first block of its own."""
    return frames % block_frames == 1
