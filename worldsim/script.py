"""What is asked of a world over time: a prompt and held keys for every latent frame."""

from dataclasses import dataclass

from worldsim.controls import IDLE, Keys, PromptSegment


@dataclass(frozen=True)
class Script:
    """Prompts and controls by absolute latent frame; `World.script` makes one that is checked.

    Attributes:
        prompts: in the order of their start; the first one starts the stream.
        keys: held keys of each latent frame from the second on: the first is a single picture,
            which nothing moves.
        repeated: the keys are played over and over; else nothing is held after their end.
    """

    prompts: tuple[PromptSegment, ...]
    keys: tuple[Keys, ...]
    repeated: bool = False

    @property
    def frames(self) -> int | None:
        """Latent frames until the keys have been played; None where they have no end."""
        return None if self.repeated else 1 + len(self.keys)

    def prompt(self, frame: int) -> str:
        """The prompt at a latent frame."""
        current = [segment.prompt for segment in self.prompts if segment.start <= frame]
        return current[-1]

    def cuts(self, first: int, count: int) -> bool:
        """Whether a block of ``count`` latent frames from ``first`` on begins a new scene: it is
        the first one that is made under the prompt after a cut."""
        since = range(max(1, first - count + 1), first + 1)  # a stream's start is a scene anyway
        return any(segment.cut and segment.start in since for segment in self.prompts)

    def held(self, first: int, count: int) -> list[Keys]:
        """Held keys of ``count`` latent frames from ``first`` on."""
        return [self._held(frame) for frame in range(first, first + count)]

    def _held(self, frame: int) -> Keys:
        if frame == 0 or not self.keys:
            return IDLE
        index = (frame - 1) % len(self.keys) if self.repeated else frame - 1
        return self.keys[index] if index < len(self.keys) else IDLE
