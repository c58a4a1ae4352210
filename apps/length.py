"""How long a stream is when it is not told."""

from worldsim.models.autoencoder import GROUP

DEFAULT_SECONDS = 20.0


def length(seconds: float | None, latents: int | None, fps: float) -> int:
    """Pictures: the seconds asked for, else a whole script of ``latents``, else 20 seconds."""
    if seconds is None and latents is not None:
        return 1 + GROUP * (latents - 1)
    return max(1, round((seconds or DEFAULT_SECONDS) * fps))
