"""What a context keeps: one frozen line of configuration."""

from dataclasses import dataclass
from typing import NamedTuple

POSITIONS = ("absolute", "packed")
FORMS = ("pool", "participative", "topk", "pose")
BANKED = ("topk", "pose")  # forms that choose what is read out of more than is read
ON_PROMPT = ("keep", "flush", "recache")
POOLED = 2  # latent frames, rows and columns of tokens that a pooled token stands for
BANK = 8  # pages of a bank for each one that is read, where nothing else is said
FULL = "full"
FORMATS = (FULL, "int8", "int4", "int8h", "int4h")  # how pages are stored; h: Hadamard
PARTITIONS = ("sink", "mid", "recent")
EXAMPLE = "'sink=3,mid=8:pool,recent=9,positions=packed'"


@dataclass(frozen=True)
class CacheConfig:
    """Capacities in latent frames.

    Attributes:
        recent: newest frames kept, the current block excluded; None keeps everything.
        sink: first frames of the stream, kept for ever and counted apart from ``recent``.
        mid: frames that left the recent ones and are still read, in some ``form``.
        form: of mid. ``pool``: means over patches of two frames by 2×2 tokens. ``participative``:
            the most asked-for tokens, as many as ``mid`` frames have. ``topk`` and ``pose``: the
            ``mid`` best frames out of a ``bank``, by what the newest queries ask or by what a
            camera at the coming pose would see. See `worldsim.cache.mid`.
        bank: frames that ``topk`` and ``pose`` choose from, the newest ones.
        positions: ``absolute`` (a frame keeps its own index) or ``packed`` (sink and mid are
            re-aligned to sit right before the recent frames, so that no gap ever grows).
        prompt: what a change of prompt does to the context: ``keep``, ``flush`` (all but the sink
            and the newest frame) or ``recache`` (recent frames are committed anew under it).
        formats: how pages of sink, mid and recent are stored, see `worldsim.cache.codec`.
    """

    recent: int | None = None
    sink: int = 0
    mid: int = 0
    form: str = ""
    bank: int = 0
    positions: str = "absolute"
    prompt: str = "keep"
    formats: tuple[str, str, str] = (FULL, FULL, FULL)

    def __post_init__(self) -> None:
        for name in ("sink", "mid", "bank", "recent"):
            frames = getattr(self, name)
            if name == "recent" and frames is None:
                continue
            if not isinstance(frames, int) or frames < 0:
                raise ValueError(f"cache: {name} must be a whole number, 0 or more, got {frames}")
        if len(self.formats) != len(PARTITIONS):
            raise ValueError(f"cache: formats are those of {', '.join(PARTITIONS)}")
        _one_of("positions", self.positions, POSITIONS)
        _one_of("prompt", self.prompt, ON_PROMPT)
        for name, format_ in zip(PARTITIONS, self.formats, strict=True):
            _one_of(f"the format of {name}", format_, FORMATS)
            if format_ != FULL and getattr(self, name) == 0:
                raise ValueError(f"cache: {name} holds no frames to store as {format_}")
        if bool(self.mid) != bool(self.form):
            raise ValueError(f"cache: mid needs frames and a form, as in mid=8:{FORMS[0]}")
        if self.form:
            _one_of("the form of mid", self.form, FORMS)
            if self.recent is None:
                raise ValueError("cache: mid takes what leaves recent, and recent=all keeps it all")
            if self.recent == 0:
                raise ValueError("cache: mid takes what leaves recent: keep 1 or more frames there")
        if self.form == "pool" and self.mid % POOLED:
            raise ValueError(
                f"cache: mid={self.mid}:pool must be a multiple of {POOLED}, the frames of a page"
            )
        if self.bank and self.form not in BANKED:
            raise ValueError(f"cache: bank is for mid forms that choose: {', '.join(BANKED)}")
        if self.form in BANKED and self.bank < self.mid:
            raise ValueError(f"cache: bank={self.bank} is less than the mid={self.mid} read of it")
        if self.form == "participative" and self.formats[1] != FULL:
            raise ValueError("cache: a participative mid is stored in full: leave its format out")
        if self.form in BANKED and self.formats[2] not in (FULL, self.formats[1]):
            raise ValueError(
                f"cache: a page is quantised once, so mid must be {self.formats[2]} as recent is: "
                f"write mid={self.mid}:{self.form}:{self.formats[2]}"
            )

    @property
    def capacity(self) -> int | None:
        """Most whole frames of sink and recent between two blocks; None: nothing is evicted."""
        return None if self.recent is None else self.sink + self.recent

    @property
    def full_after(self) -> int | None:
        """Latent frames after which every partition is full; None: never."""
        if self.capacity is None:
            return None
        return self.capacity + (max(self.mid, self.bank) + POOLED if self.mid else 0)

    @property
    def asks(self) -> bool:
        """Whether the mid form looks at the queries of finished frames."""
        return self.form in ("participative", "topk")

    @property
    def quantised(self) -> bool:
        return any(format_ != FULL for format_ in self.formats)

    @classmethod
    def parse(cls, line: str, block_frames: int) -> "CacheConfig":
        """Read ``"sink=3,mid=8:pool,recent=9:int4,positions=packed"`` or the field's
        ``"window=12,sink=3"``.

        After a partition's frames come its form and its format, in any order. ``sink=50%`` is a
        share of the window (a deep sink). The field's window counts the sink and the current block
        too, so ``recent = window - sink - block_frames``. ``recent=all`` keeps everything.

        Raises:
            ValueError: naming the field that cannot be read.
        """
        fields = _fields(line)
        if "window" in fields and "recent" in fields:
            raise ValueError("cache: give recent or window, not both (window = sink+recent+block)")
        sink_said, mid_said, recent_said = (
            _partition(name, fields.get(name, "0")) for name in PARTITIONS
        )
        form = mid_said.form
        if ":" in fields.get("window", ""):
            raise ValueError("cache: a window has no format: write recent=9:int4 instead")
        window = _count("window", fields["window"]) if "window" in fields else None
        sink = _sink(sink_said.frames, window)
        recent: int | None = None
        if window is not None:
            recent = window - sink - block_frames
            if recent < 0:
                raise ValueError(
                    f"cache: window={window} is too small for sink={sink} and a block of "
                    f"{block_frames}; it needs at least {sink + block_frames}"
                )
        elif "recent" in fields and recent_said.frames != "all":
            recent = _count("recent", recent_said.frames)
        if sink and not fields.keys() & {"window", "recent"}:
            raise ValueError(
                f"cache: beside sink={sink} say what else is kept: recent=9, or recent=all"
            )
        mid = _count("mid", mid_said.frames)
        bank = BANK * mid if form in BANKED else 0
        if "bank" in fields:
            bank = _count("bank", fields["bank"])
        return cls(
            recent=recent,
            sink=sink,
            mid=mid,
            form=form,
            bank=bank,
            positions=fields.get("positions", "absolute"),
            prompt=fields.get("prompt", "keep"),
            formats=(sink_said.format, mid_said.format, recent_said.format),
        )

    def line(self) -> str:
        """The one-line form that `parse` reads back."""
        sink, mid, recent = ("" if f == FULL else f":{f}" for f in self.formats)
        parts = [f"sink={self.sink}{sink}"]
        if self.mid:
            parts.append(f"mid={self.mid}:{self.form}{mid}")
        if self.bank:
            parts.append(f"bank={self.bank}")
        parts.append(f"recent={'all' if self.recent is None else self.recent}{recent}")
        parts.append(f"positions={self.positions}")
        if self.prompt != "keep":
            parts.append(f"prompt={self.prompt}")
        return ",".join(parts)


def _fields(line: str) -> dict[str, str]:
    known = ("sink", "mid", "bank", "recent", "window", "positions", "prompt")
    fields: dict[str, str] = {}
    for part in line.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in known:
            raise ValueError(
                f"cache: cannot read {part.strip()!r}; write for example {EXAMPLE} "
                f"(fields: {', '.join(known)})"
            )
        if name in fields:
            raise ValueError(f"cache: {name} is given twice")
        fields[name] = value
    return fields


class _Said(NamedTuple):
    """What a line says of one partition."""

    frames: str
    form: str
    format: str


def _partition(name: str, value: str) -> _Said:
    """Read ``8:topk:int4``; only mid has forms."""
    frames, *said = value.split(":")
    known = (*FORMS, *FORMATS) if name == "mid" else FORMATS
    for word in said:
        if word not in known:
            raise ValueError(
                f"cache: {name} knows no {word!r}; after a ':' comes one of {', '.join(known)}"
            )
    forms, formats = ([word for word in said if word in kind] for kind in (FORMS, FORMATS))
    for what, words in (("formats", formats), ("forms", forms)):
        if len(words) > 1:
            raise ValueError(f"cache: {name} has two {what}: {' and '.join(words)}")
    return _Said(frames, "".join(forms), "".join(formats) or FULL)


def _sink(value: str, window: int | None) -> int:
    if not value.endswith("%"):
        return _count("sink", value)
    share = _count("sink", value[:-1])
    if share > 100:
        raise ValueError(f"cache: sink={value}: a share is 0…100 %")
    if window is None:
        raise ValueError(f"cache: sink={value} is a share of a window: write window=21,sink=50%")
    return window * share // 100


def _count(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"cache: {name} must be a whole number of latent frames, got {value!r}")
    return int(value)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"cache: {name} must be one of {', '.join(known)}, got {value!r}")
