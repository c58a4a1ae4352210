"""A session as a file: safetensors, with everything that is no tensor as JSON in its header.

Nothing in it is executed on loading: the header names classes of a short list, all of them plain
data. What a world knows anyway is not in it: weights, and keys and values of words.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from worldsim.config import Settings
from worldsim.plain import Pack, Unpack
from worldsim.state import Asked, Snapshot

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


def load(
    world: "World",
    path: str | Path,
    open_session: Callable[[Settings, Asked], "Session"],
    whole: bool = True,
) -> "Session":
    """A session that goes on where a saved one stood.

    ``whole``: False where it was saved by a rank that had a share of the world only, which has
    another fingerprint.

    Raises:
        ValueError: for a file that is none, is damaged, or is of another world.
    """
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(HEADER, "null"))
            if not isinstance(told, dict) or told.get("format") != FORMAT:
                raise ValueError(f"{path} holds no session that this version reads")
            _check(world, told, path, whole)
            tensors = {
                name: file.get_tensor(name).to(world.device)
                for name in file.keys()  # noqa: SIM118  # it is no dict
            }
        return _opened(Unpack(world, tensors), told, open_session)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (SafetensorError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no session: {error!r}") from None


def _check(world: "World", told: dict[str, Any], path: str | Path, whole: bool) -> None:
    dtype, own = told["settings"]["fields"]["dtype"], str(world.dtype).removeprefix("torch.")
    if dtype != own:
        raise ValueError(f"{path} was saved in {dtype}: load the world in it, not in {own}")
    if whole and told["fingerprint"] != world.fingerprint:
        raise ValueError(
            f"{path} is of a world {told['world']!r} with other weights or another world.json than "
            f"{world.config.name!r} here"
        )


@torch.inference_mode()  # pages that others grew in it may be written only in it
def _opened(
    unpack: Unpack, told: dict[str, Any], open_session: Callable[[Settings, Asked], "Session"]
) -> "Session":
    settings = unpack.settings = unpack.read(told["settings"])
    moment = unpack.read(told["moment"])
    session = open_session(settings, moment.asked)
    pool, pages = session.context.pool, list[int]()
    try:
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
    except BaseException:
        session.close()
        raise
    finally:
        for page in pages:
            pool.release(page)  # the session and its snapshot hold them now
    return session
