"""A session as a file: safetensors, with everything that is no tensor as JSON in its header.

Nothing in it is executed on loading: the header names classes of a short list, all of them plain
data. What a world knows anyway is not in it: weights, and keys and values of words.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldsim.cache.policy import Table
from worldsim.cache.pool import PageKind
from worldsim.config import Settings
from worldsim.plain import Pack, Unpack
from worldsim.state import Asked, Decoding, Moment, Snapshot

if TYPE_CHECKING:
    from worldsim.session import Session
    from worldsim.world import World

FORMAT = "worldsim session 1"
HEADER = "worldsim"


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
    number = {page: i for i, page in enumerate(dict.fromkeys(used))}  # alike on all ranks
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
    pack = Pack()
    header = {HEADER: json.dumps(pack.plain(told))}
    part = target.with_name(f".{target.name}.part")
    try:
        save_file(pack.tensors, part, header)
        part.replace(target)
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Saved:
    """What a file holds, as values.

    Attributes:
        world, fingerprint: of which it is.
        pages: kind and `PagePool.tensors` of each; tables know them by their place here.
        settings, moment, decoding, tables, newest: see `Snapshot`.
    """

    world: str
    fingerprint: str
    settings: Settings
    moment: Moment
    decoding: Decoding
    pages: tuple[tuple[PageKind, tuple[Tensor, ...]], ...]
    tables: Mapping[int, tuple[Table, ...]]
    newest: Mapping[int, tuple[int | None, ...]]


def load(
    world: "World", path: str | Path, open_session: Callable[[Settings, Asked], "Session"]
) -> "Session":
    """A session that goes on where a saved one stood.

    Raises:
        ValueError: for a file that is none, is damaged, or is of another world.
    """
    saved = read(world, path)
    if saved.fingerprint != world.fingerprint:
        raise ValueError(
            f"{path} is of a world {saved.world!r} with other weights or another world.json than "
            f"{world.config.name!r} here"
        )
    return opened(saved, open_session, path)


def read(world: "World", path: str | Path) -> Saved:
    """What a file holds; the world's dtype is checked, and not its weights.

    Raises:
        ValueError: as `load`.
    """
    with _told(path), safe_open(path, "pt") as file:
        told = _head(file, path)
        dtype, own = told["settings"]["fields"]["dtype"], str(world.dtype).removeprefix("torch.")
        if dtype != own:
            raise ValueError(f"{path} was saved in {dtype}: load the world in it, not in {own}")
        tensors = {
            name: file.get_tensor(name).to(world.device)
            for name in file.keys()  # noqa: SIM118  # it is no dict
        }
        unpack = Unpack(world, tensors)
        unpack.settings = unpack.read(told["settings"])
        return Saved(
            told["world"],
            told["fingerprint"],
            unpack.settings,
            unpack.read(told["moment"]),
            unpack.read(told["decoding"]),
            unpack.read(told["pages"]),
            {int(lane): unpack.read(rows) for lane, rows in told["tables"].items()},
            {int(lane): tuple(rows) for lane, rows in told["newest"].items()},
        )


def _head(file: Any, path: str | Path) -> dict[str, Any]:
    told = json.loads((file.metadata() or {}).get(HEADER, "null"))
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError(f"{path} holds no session that this version reads")
    return told


def settings_of(world: "World", path: str | Path) -> Settings:
    """Under which a file was saved; no more of it is read.

    Raises:
        ValueError: as `load`.
    """
    with _told(path), safe_open(path, "pt") as file:
        told = _head(file, path)
        settings: Settings = Unpack(world, {}).read(told["settings"])
        return settings


@torch.inference_mode()  # pages that others grew in it may be written only in it
def opened(
    saved: Saved, open_session: Callable[[Settings, Asked], "Session"], path: str | Path
) -> "Session":
    """A session that goes on from there.

    Raises:
        ValueError: where it does not fit the session; ``path`` says whose fault that is.
    """
    with _told(path):
        session = open_session(saved.settings, saved.moment.asked)
        pool, pages = session.context.pool, list[int]()
        try:
            for kind, tensors in saved.pages:
                pages.append(pool.acquire(kind))
                pool.adopt(pages[-1], tensors)
            tables = {
                lane: tuple(table.moved(pages.__getitem__) for table in rows)
                for lane, rows in saved.tables.items()
            }
            whole = saved.settings, saved.moment, saved.decoding, tables, saved.newest, pool
            session.restore(Snapshot(*whole))
        except BaseException:
            session.close()
            raise
        finally:
            for page in pages:
                pool.release(page)  # the session and its snapshot hold them now
        return session


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Say in one line what is wrong with a file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (SafetensorError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no session: {error!r}") from None
