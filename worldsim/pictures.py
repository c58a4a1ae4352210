"""Pictures that people hand in, as a stream's beginning."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_pictures(source: Any, size: tuple[int, int]) -> Tensor:
    """One picture or several as uint8 ``[P, H, W, 3]``.

    Args:
        source: a path, a PIL image, or uint8 ``[H, W, 3]`` or ``[P, H, W, 3]``.
        size: (height, width) that they must have.

    Raises:
        ValueError: for what is no picture, or one of another size.
    """
    if isinstance(source, str | Path):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(source) as image:
                source = image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            reason = "there is none" if isinstance(error, FileNotFoundError) else "it is no picture"
            raise ValueError(f"cannot read {str(source)!r}: {reason}") from None
    convert = getattr(source, "convert", None)  # PIL's, of whatever mode
    pixels = np.asarray(source if convert is None else convert("RGB"))
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise ValueError(
            f"pictures must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    given = torch.from_numpy(pixels.copy())
    given = given[None] if given.ndim == 3 else given
    height, width = given.shape[1:3]
    if (height, width) != size:
        raise ValueError(
            f"the picture is {width}×{height}, this world shows {size[1]}×{size[0]}: resize it"
        )
    return given
