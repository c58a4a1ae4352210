"""How long a stream is when it is not told."""

from worldsim.models.autoencoder import GROUP
from worldsim.script import parse_prompts
from worldsim.world import World

DEFAULT_SECONDS = 20.0


def length(seconds: float | None, latents: int | None, fps: float) -> int:
    """Pictures: the seconds asked for, else a whole script of ``latents``, else 20 seconds."""
    if seconds is None and latents is not None:
        return 1 + GROUP * (latents - 1)
    return max(1, round((seconds or DEFAULT_SECONDS) * fps))


def latents_asked(world: World, prompt: str | None, controls: str | None) -> int | None:
    """Latent frames of a script of controls, or without one of prompts over time whose last one
    says for how long it is."""
    if controls is not None:
        return 1 + len(world.actions.parse(controls))
    if prompt is None:
        return None
    return parse_prompts(prompt, world.latents_per_second)[-1].end
