"""What is asked of a world over time: a prompt and controls for every latent frame."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worldsim.controls import IDLE, ControlState, Keys

if TYPE_CHECKING:
    from worldsim.actions import ActionSpec

# Commas and spaces separate, but for those within brackets.
BETWEEN = re.compile(r"[,\s]+(?![^()]*\))")
AMOUNT = re.compile(r"(look|move|scroll)\((.*)\)", re.DOTALL)


@dataclass(frozen=True)
class PromptSegment:
    """A prompt from latent frame ``start`` on; ``cut`` marks a scene change before it, and ``end``
    is where it ends, if it says for how long it is."""

    prompt: str
    start: int
    cut: bool = False
    end: int | None = None


@dataclass(frozen=True)
class Script:
    """Prompts and controls by absolute latent frame; `World.script` makes one that is checked.

    Attributes:
        prompts: in the order of their start; the first one starts the stream.
        controls: of each latent frame from the second on: the first is a single picture, which
            nothing moves.
        repeated: the controls are played over and over; else nothing is held after their end.
    """

    prompts: tuple[PromptSegment, ...]
    controls: tuple[ControlState, ...]
    repeated: bool = False

    @property
    def frames(self) -> int | None:
        """Latent frames until the controls have been played, or where they have no end, until the
        last prompt has; None where that has none either."""
        return self.prompts[-1].end if self.repeated else 1 + len(self.controls)

    def prompt(self, frame: int) -> str:
        """The prompt at a latent frame."""
        current = [segment.prompt for segment in self.prompts if segment.start <= frame]
        return current[-1]

    def cuts(self, first: int, count: int) -> bool:
        """Whether a block of ``count`` latent frames from ``first`` on begins a new scene: it is
        the first one that is made under the prompt after a cut."""
        since = range(max(1, first - count + 1), first + 1)  # a stream's start is a scene anyway
        return any(segment.cut and segment.start in since for segment in self.prompts)

    def held(self, first: int, count: int) -> list[ControlState]:
        """Controls of ``count`` latent frames from ``first`` on."""
        return [self._held(frame) for frame in range(first, first + count)]

    def _held(self, frame: int) -> ControlState:
        if frame == 0 or not self.controls:
            return ControlState()
        index = (frame - 1) % len(self.controls) if self.repeated else frame - 1
        return self.controls[index] if index < len(self.controls) else ControlState()


def parse_controls(script: str, spec: "ActionSpec") -> tuple[ControlState, ...]:
    """Read ``W*12 WJ*4, L*8 .*4``: what is held in each latent frame.

    Comma or space separates, ``WA`` holds both, ``.`` holds nothing; a count of one may be
    left out. Other keys are written by their event code, ``ArrowLeft*4``.

    Where a world takes more than keys, ``+`` joins what is done at once: ``look(3,-1)*4`` moves the
    mouse 3 right and 1 up in each of four latent frames, ``W+look(3,-1)``, ``WA+move(0,0,1)`` (a
    stick: right, up, forward), ``scroll(2)``, ``KeyW+Mouse0``.

    Raises:
        ValueError: for what this world does not have, keys that are never held at once, or a count
            that is no number.
    """
    track: list[ControlState] = []
    for part in BETWEEN.split(script.strip()):
        if part:
            chord, star, count = part.partition("*")
            if star and (not count.isdecimal() or int(count) == 0):
                raise ValueError(
                    f"controls: {part!r} must end in a count, as in 'W*12' (latent frames)"
                )
            track += [_state(chord, spec)] * (int(count) if star else 1)
    return tuple(track)


def _state(chord: str, spec: "ActionSpec") -> ControlState:
    if not chord:
        raise ValueError("controls: a count needs a key before it, as in 'W*12'")
    held: set[str] = set()
    amounts: dict[str, Any] = {}
    for term in chord.split("+"):
        if match := AMOUNT.fullmatch(term):
            amounts[match[1]] = _amount(term, match[2])
        else:
            held |= _keys(term, chord, spec)
    try:
        return spec.state(ControlState(frozenset(held), **amounts))
    except ValueError as error:
        raise ValueError(f"controls: {chord!r}: {error}".replace("control: ", "")) from None


def _amount(term: str, numbers: str) -> float | list[float]:
    try:
        read = [float(number) for number in numbers.split(",")]
    except ValueError:
        raise ValueError(f"controls: {term!r} must hold numbers, as in 'look(3,-1)'") from None
    return read[0] if len(read) == 1 else read


def _keys(term: str, chord: str, spec: "ActionSpec") -> Keys:
    if term == ".":
        return IDLE
    if term in spec.keys or term in spec.aliases:
        return frozenset({term})
    if not term:
        raise ValueError(f"controls: '+' stands between two controls, not as in {chord!r}")
    for letter in term:
        if letter.upper() not in spec.letters:
            raise ValueError(
                f"controls: unknown key {letter!r} in {chord!r}; this world has "
                f"{spec.legend()} · . nothing"
            )
    return frozenset(spec.letters[letter.upper()] for letter in term)


def parse_prompts(text: str, latents_per_second: float) -> tuple[PromptSegment, ...]:
    """Read ``red brick[4s] | night[4s#]``: each prompt, for how long, and ``#`` for a cut.

    The last duration may be left out. A text without ``|`` is one prompt for ever.

    Raises:
        ValueError: for a segment before the last without a duration, or one that is no number, or
            too short to be seen.
    """
    segments: list[PromptSegment] = []
    start = 0.0
    parts = text.split("|")
    for i, part in enumerate(parts):
        match = re.fullmatch(r"\s*(.*?)\s*(?:\[\s*([\d.]+)\s*s\s*(#?)\s*\])?\s*", part, re.DOTALL)
        assert match is not None
        prompt, seconds, cut = match.groups()
        if "[" in prompt or (seconds is None and i + 1 < len(parts)):
            raise ValueError(
                f"prompt: {part.strip()!r} needs a duration, as in 'red brick[4s] | night[4s]'"
            )
        first, end = round(start), None
        if seconds is not None:
            try:
                start += float(seconds) * latents_per_second
            except ValueError:
                raise ValueError(f"prompt: {seconds!r} is not a number of seconds") from None
            end = round(start)
            if end <= first:
                raise ValueError(
                    f"prompt: {part.strip()!r} is too short to be seen: a latent frame is "
                    f"{1 / latents_per_second:g} s"
                )
        segments.append(PromptSegment(prompt, first, bool(cut), end))
    return tuple(segments)
