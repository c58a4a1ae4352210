"""What a context keeps: one frozen line of configuration."""

from dataclasses import dataclass

POSITIONS = ("absolute", "packed")


@dataclass(frozen=True)
class CacheConfig:
    """Capacities in latent frames.

    Attributes:
        recent: newest frames kept, the current block excluded; None keeps everything.
        sink: first frames of the stream, kept for ever and counted apart from ``recent``.
        positions: ``absolute`` (a frame keeps its own index) or ``packed`` (the sink is re-aligned
            to sit right before the recent frames, so that no gap ever grows).
    """

    recent: int | None = None
    sink: int = 0
    positions: str = "absolute"

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"cache: sink must be 0 or more, got {self.sink}")
        if self.recent is not None and self.recent < 0:
            raise ValueError(f"cache: recent must be 0 or more, got {self.recent}")
        if self.positions not in POSITIONS:
            raise ValueError(
                f"cache: positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}"
            )

    @property
    def capacity(self) -> int | None:
        """Most frames held between two blocks; None where nothing is ever evicted."""
        return None if self.recent is None else self.sink + self.recent

    @classmethod
    def parse(cls, line: str, block_frames: int) -> "CacheConfig":
        """Read ``"sink=3,recent=9,positions=packed"`` or the field's ``"window=12,sink=3"``.

        The field's window counts the sink and the current block too, so
        ``recent = window - sink - block_frames``. ``recent=all`` keeps everything.

        Raises:
            ValueError: naming the field that cannot be read.
        """
        fields: dict[str, str] = {}
        for part in line.replace(" ", "").split(","):
            name, equals, value = part.partition("=")
            if not equals or name not in ("sink", "recent", "window", "positions"):
                raise ValueError(
                    f"cache: cannot read {part!r}; write for example 'sink=2,recent=10' "
                    "(fields: sink, recent or window, positions)"
                )
            if name in fields:
                raise ValueError(f"cache: {name} is given twice")
            fields[name] = value
        if "window" in fields and "recent" in fields:
            raise ValueError("cache: give recent or window, not both (window = sink+recent+block)")
        sink = _count("sink", fields.get("sink", "0"))
        recent: int | None = None
        if "window" in fields:
            recent = _count("window", fields["window"]) - sink - block_frames
            if recent < 0:
                raise ValueError(
                    f"cache: window={fields['window']} is too small for sink={sink} and a block of "
                    f"{block_frames}; it needs at least {sink + block_frames}"
                )
        elif fields.get("recent", "all") != "all":
            recent = _count("recent", fields["recent"])
        return cls(recent=recent, sink=sink, positions=fields.get("positions", "absolute"))

    def line(self) -> str:
        """The one-line form that `parse` reads back."""
        recent = "all" if self.recent is None else self.recent
        return f"sink={self.sink},recent={recent},positions={self.positions}"


def _count(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"cache: {name} must be a whole number of latent frames, got {value!r}")
    return int(value)
