"""How released models of the Wan2.1 family are run, as plain data.

Each is a `WorldConfig`: a folder's own ``world.json`` wins over it. docs/models.md says where each
number comes from.
"""

from collections.abc import Mapping
from dataclasses import replace

from worldsim.config import WorldConfig

_SELF_FORCING = WorldConfig(
    name="self-forcing",
    height=480,
    width=832,
    fps=16.0,
    block_frames=3,
    steps=(1000, 750, 500, 250),
    shift=5.0,
    sampler="renoise",
    cache="window=21",
)
# What Wan2.1 and all that came of it lead away from.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_LISTED = (
    _SELF_FORCING,
    replace(_SELF_FORCING, name="causvid", steps=(1000, 757, 522), shift=8.0, grid="plain"),
    replace(_SELF_FORCING, name="longlive", cache="window=12,sink=3,prompt=recache"),
    replace(
        _SELF_FORCING,
        name="infinity-rope",
        cache="window=6,sink=1,positions=packed,prompt=flush",
    ),
    replace(
        _SELF_FORCING,
        name="krea-realtime",
        steps=(1000, 750, 500, 250, 0),
        cache="window=6,positions=packed",
    ),
    replace(
        _SELF_FORCING,
        name="rolling",
        steps=(1000, 800, 600, 400, 200),
        cache="window=21,sink=3,positions=packed",
    ),
    replace(
        _SELF_FORCING,
        name="many-step",
        steps=50,
        sampler="unipc",
        guidance=3.0,
        negative_prompt=NEGATIVE_PROMPT,
    ),
)
PRESETS: Mapping[str, WorldConfig] = {config.name: config for config in _LISTED}


def preset_config(name: str) -> WorldConfig:
    """A preset by its name.

    Raises:
        ValueError: for an unknown one, naming those that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose {', '.join(PRESETS)}")
    return PRESETS[name]
