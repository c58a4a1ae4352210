"""What a session begins with: latents that are given, as they are or as pictures."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from worldsim.bundle import check_numbers
from worldsim.config import Settings
from worldsim.pictures import read_pictures

if TYPE_CHECKING:
    from worldsim.stocked import Stocked


def given_latents(
    world: "Stocked", size: tuple[int, int], given: Tensor | None, pictures: Any
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
    check_numbers("given", given)
    if given.ndim != 5 or not given.shape[2]:
        raise ValueError(f"given latents must be [1, C, F, h, w], got {list(given.shape)}")
    wanted = world.latents_of(size, given.shape[2])
    if given.shape != wanted:
        raise ValueError(f"given latents must be {list(wanted)}, got {list(given.shape)}")
    return given


def frame_alone(frames: int, block_frames: int) -> bool:
    """Whether one frame is left over of so many given ones: it is a first block of its own."""
    return frames % block_frames == 1


def check_beginning(settings: Settings, frames: int, block_frames: int) -> None:
    """Of a session that is given so many frames.

    Raises:
        ValueError: for frames that are no whole blocks.
    """
    if frames and (frames - settings.independent_first_frame) % block_frames:
        raise ValueError(
            f"given latents have {frames} frames, which are no whole blocks of {block_frames}"
        )
