"""Values as JSON and back: the plain data of a session, and nothing else.

Nothing is executed on reading: a class is named, and only those of a short list are known.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Event
from worldsim.cache.policy import Entry, Mid, Table
from worldsim.cache.pool import PageKind
from worldsim.config import Settings
from worldsim.controls import ControlState, Held, Press
from worldsim.models.transformer import Conditioning
from worldsim.rollout import Known
from worldsim.schedule import Schedule
from worldsim.state import Applied, Asked, Block, Decoding, Made, Moment

if TYPE_CHECKING:
    from worldsim.world import World

PLAIN: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Applied, Asked, Block, CacheConfig, Conditioning, ControlState, Decoding, Entry, Event,
        Held, Known, Made, Mid, Moment, PageKind, Press, Schedule, Settings, Table,
    )
}  # fmt: skip
LEFT_OUT = {
    "Asked": ("keys", "values"),
    "Block": ("frames", "timings"),
    "Moment": ("origin", "past"),
}


@dataclass
class Pack:
    """Turns values into JSON; tensors are numbered and put aside."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    _known: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def plain(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._name(value)}
        if isinstance(value, Enum):
            return {"is": type(value).__name__, "value": value.value}
        if is_dataclass(value):
            name = type(value).__name__
            kept = [f.name for f in fields(value) if f.name not in LEFT_OUT.get(name, ())]
            return {
                "is": name, "fields": {k: self.plain(getattr(value, k)) for k in kept}
            }  # fmt: skip
        if isinstance(value, frozenset):
            return {"set": sorted(value)}
        if isinstance(value, dict):
            return {key: self.plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [self.plain(item) for item in value]
        return value

    def _name(self, tensor: Tensor) -> str:
        """The same for the same tensor: what is one object is one again after loading."""
        if id(tensor) not in self._known:
            name = str(len(self._known))
            self._known[id(tensor)] = name, tensor
            self.tensors[name] = tensor.detach().cpu().contiguous().clone()
        return self._known[id(tensor)][0]


@dataclass
class Unpack:
    """And back: lists become tuples."""

    world: "World"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: Settings | None = None

    def read(self, written: Any) -> Any:
        if isinstance(written, list):
            return tuple(map(self.read, written))
        if not isinstance(written, dict):
            return written
        if "tensor" in written:
            return self.tensors[written["tensor"]]
        if "set" in written:
            return frozenset(written["set"])
        kind = PLAIN[written["is"]]
        if "value" in written:
            return kind(written["value"])
        values = {name: self.read(value) for name, value in written["fields"].items()}
        if kind is Asked:
            assert self.settings is not None
            prompt = None if values["embeds"] is not None else values["prompt"]
            return self.world.ask(self.settings, prompt, values["embeds"], values["negative"])
        if kind is Moment:
            values["origin"] = object()
        return kind(**values)
