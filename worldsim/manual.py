"""How to play a world, told by its action spec: a legend, an example of a script."""

from dataclasses import dataclass

from worldsim.actions import ActionSpec
from worldsim.config import WorldConfig

WORDS = {"look": "look(3,-1)", "scroll": "scroll(1)", "move": "move(0,0,1)"}
MEANT = {
    "look": "the mouse: right, down",
    "scroll": "the wheel",
    "move": "a stick: right, up, forward",
}


@dataclass(frozen=True)
class Row:
    """One thing to do: what a script calls it, what it does, and the event codes that do it."""

    name: str
    label: str
    codes: tuple[str, ...] = ()


def rows(spec: ActionSpec) -> tuple[Row, ...]:
    """The legend, keys first."""
    names = spec.names
    keys = [
        Row(names[key], spec.labels.get(key, ""), (key, *_also(spec, key))) for key in spec.keys
    ]
    analog = [Row(WORDS[name], spec.labels.get(name, MEANT[name])) for name in spec.analog]
    return (*keys, *analog)


def example(spec: ActionSpec) -> str:
    """A script of some of it; empty for a world that takes nothing."""
    names = spec.names
    parts = []
    if spec.keys:
        first = spec.keys[0]
        parts.append(f"{names[first]}*12")
        both = [key for key in spec.keys[1:] if _may(spec, first, key)]
        if both:
            letters = all(key in spec.letters.values() for key in (first, both[-1]))
            parts.append(f"{names[first]}{'' if letters else '+'}{names[both[-1]]}*4")
        parts += [f"{names[first]}+{WORDS[name]}*4" for name in spec.analog]
    else:
        parts += [f"{WORDS[name]}*4" for name in spec.analog]
    return " ".join([*parts, ".*8"]) if parts else ""


def manual(config: WorldConfig) -> str:
    """What one can do in a world, when it is heeded, and how a script says it: for people."""
    spec = config.actions
    if spec is None or not rows(spec):
        return f"{config.name} takes no controls: its prompt alone steers it"
    seconds = spec.pictures / config.fps
    each = {
        "picture": f"each picture ({1 / config.fps:.3g} s)",
        "latent": f"each latent frame ({spec.pictures} pictures, {seconds:.3g} s)",
        "block": f"each block ({config.block_frames} latent frames, "
        f"{config.block_frames * seconds:.3g} s)",
    }
    table = [*rows(spec), Row(".", f"nothing{_neutral(spec)}")]
    name_width, label_width = (
        max(len(getattr(row, column)) for row in table) for column in ("name", "label")
    )
    lines = [
        f"{row.name:{name_width}}  {row.label:{label_width}}  {', '.join(row.codes)}".rstrip()
        for row in table
    ]
    return "\n".join(
        [
            f"{config.name} heeds its controls once for {each[spec.rate]}:",
            "",
            *(f"  {line}" for line in lines),
            "",
            *(
                f"never at once: {' and '.join(keys)} (the one pressed last counts; a script must "
                "choose)"
                for keys in spec.forbidden
            ),
            f"script, in latent frames of {seconds:.3g} s: {example(spec)}",
        ]
    )


def _also(spec: ActionSpec, key: str) -> list[str]:
    return [alias for alias, meant in spec.aliases.items() if meant == key]


def _may(spec: ActionSpec, *keys: str) -> bool:
    return not any(set(together) <= set(keys) for together in spec.forbidden)


def _neutral(spec: ActionSpec) -> str:
    return f" (counts as {' and '.join(spec.neutral)})" if spec.neutral else ""
