"""A session as a file: safetensors, with everything that is no tensor as JSON in its header.

Nothing in it is executed on loading: the header names classes of a short list, all of them plain
data. What a world knows anyway is not in it: weights, and keys and values of words.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Event
from worldsim.cache.policy import Entry, Mid, Table
from worldsim.cache.pool import PageKind
from worldsim.config import Settings
from worldsim.models.transformer import Conditioning
from worldsim.rollout import Known
from worldsim.schedule import Schedule
from worldsim.state import Applied, Asked, Block, Decoding, Made, Moment, Snapshot

if TYPE_CHECKING:
    from worldsim.session import Session
    from worldsim.world import World

FORMAT = "worldsim session 1"
HEADER = "worldsim"
PLAIN: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Applied, Asked, Block, CacheConfig, Conditioning, Decoding, Entry, Event, Known, Made, Mid,
        Moment, PageKind, Schedule, Settings, Table,
    )
}  # fmt: skip
LEFT_OUT = {
    "Asked": ("keys", "values"),
    "Block": ("frames", "timings"),
    "Moment": ("origin", "past"),
}


def save(session: "Session", path: str | Path) -> None:
    """Write a session, whole or not at all.

    Raises:
        ValueError: for a session whose noise is a function of the caller's.
        OSError: where it cannot be written.
    """
    if session.has_own_noise:
        raise ValueError("a session with noise= of its own cannot be saved: it is no data")
    target, snapshot = Path(path), session.snapshot()
    pool = snapshot.pool
    used = [e.page for rows in snapshot.tables.values() for table in rows for e in table]
    number = {page: i for i, page in enumerate(sorted(set(used)))}
    tables = {
        str(lane): [table.moved(number.__getitem__) for table in rows]
        for lane, rows in snapshot.tables.items()
    }
    moment = snapshot.moment
    if snapshot.decoding.decoded:
        moment = replace(moment, given=())  # the decoder has seen them
    told = {
        "format": FORMAT,
        "world": session.world.config.name,
        "fingerprint": session.world.fingerprint,
        "settings": snapshot.settings,
        "pages": [(pool.kind(page), pool.tensors(page)) for page in number],
        "moment": moment,
        "decoding": snapshot.decoding,
        "tables": tables,
        "newest": {str(lane): list(rows) for lane, rows in snapshot.newest.items()},
    }
    pack = _Pack()
    header = {HEADER: json.dumps(pack.plain(told))}
    part = target.with_name(f".{target.name}.part")
    try:
        save_file(pack.tensors, part, header)
        part.replace(target)
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def load(
    world: "World", path: str | Path, open_session: Callable[[Settings, Asked], "Session"]
) -> "Session":
    """A session that goes on where a saved one stood.

    Raises:
        ValueError: for a file that is none, is damaged, or is of another world.
    """
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(HEADER, "null"))
            if not isinstance(told, dict) or told.get("format") != FORMAT:
                raise ValueError(f"{path} holds no session that this version reads")
            _check(world, told, path)
            tensors = {
                name: file.get_tensor(name).to(world.device)
                for name in file.keys()  # noqa: SIM118  # it is no dict
            }
        return _opened(_Unpack(world, tensors), told, open_session)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (SafetensorError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no session: {error!r}") from None


def _check(world: "World", told: dict[str, Any], path: str | Path) -> None:
    dtype, own = told["settings"]["fields"]["dtype"], str(world.dtype).removeprefix("torch.")
    if dtype != own:
        raise ValueError(f"{path} was saved in {dtype}: load the world in it, not in {own}")
    if told["fingerprint"] != world.fingerprint:
        raise ValueError(
            f"{path} is of a world {told['world']!r} with other weights or another world.json than "
            f"{world.config.name!r} here"
        )


def _opened(
    unpack: "_Unpack", told: dict[str, Any], open_session: Callable[[Settings, Asked], "Session"]
) -> "Session":
    settings = unpack.settings = unpack.read(told["settings"])
    moment = unpack.read(told["moment"])
    session = open_session(settings, moment.asked)
    try:
        pool, pages = session.context.pool, []
        for kind, tensors in unpack.read(told["pages"]):
            pages.append(pool.acquire(kind))
            pool.adopt(pages[-1], tensors)
        tables = {
            int(lane): tuple(table.moved(pages.__getitem__) for table in unpack.read(rows))
            for lane, rows in told["tables"].items()
        }
        newest = {int(lane): tuple(rows) for lane, rows in told["newest"].items()}
        decoding = unpack.read(told["decoding"])
        session.restore(Snapshot(settings, moment, decoding, tables, newest, pool))
        for page in pages:
            pool.release(page)  # the session and its snapshot hold them now
    except BaseException:
        session.close()
        raise
    return session


@dataclass
class _Pack:
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
class _Unpack:
    """And back: lists become tuples."""

    world: "World"
    tensors: dict[str, Tensor]
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
