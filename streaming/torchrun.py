"""One rank of a run that torchrun started, on this machine or on several.

Nobody stands outside here: the last rank delivers, every rank watches the others, and whoever finds
out first says it for all.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # as torch.distributed has it

from worldsim.share import Share
from worldsim.state import Block
from worldsim.streaming.faults import (
    GRACE,
    Beat,
    Failure,
    PeerLost,
    RankFailed,
    Watch,
    end_process,
)
from worldsim.streaming.launch import PATIENCE, finished, why
from worldsim.streaming.leader import Run
from worldsim.streaming.ranks import Rank

PREFIX = "worldsim/"
LOOK = 0.5  # seconds between two looks at the others
FOUND = 15.0  # seconds after which nobody will find out any more who is to blame


class Prefixed:
    """A store that others use too; keys of ours have a name of their own."""

    def __init__(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        run = os.environ.get("TORCHELASTIC_RUN_ID", "")
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        self._prefix = f"{PREFIX}{run}/{restart}/"
        self._store = TCPStore(host, port, wait_for_workers=False, timeout=PATIENCE)

    def set(self, key: str, value: str) -> None:
        self._store.set(self._prefix + key, value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._prefix + key)

    def check(self, keys: list[str]) -> bool:
        return self._store.check([self._prefix + key for key in keys])

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._prefix + key)

    def first(self, key: str) -> bool:
        """Whether nobody else has asked this before."""
        return self._store.add(self._prefix + key, 1) == 1


def joined(run: Run, shares: list[Share]) -> Iterator[Block]:
    """This process's part of the run. Blocks come out on the last rank alone.

    Raises:
        RankFailed: one line on one rank; the others end without a word.
    """
    share = shares[int(os.environ["RANK"])]
    signal.signal(signal.SIGTERM, _wait)  # torchrun ends all as soon as one fails: let us say why
    dist.init_process_group("cpu:gloo,cuda:nccl" if run.backend == "nccl" else run.backend)
    store, own, seen = Prefixed(), Prefixed(), Prefixed()
    beat = Beat(own, share.rank, end_process)
    watch = Watch(seen, share.ranks)
    over = threading.Event()
    threading.Thread(
        target=_look, args=(watch, seen, share, over), name="worldsim-watch", daemon=True
    ).start()
    try:
        rank = Rank(run, share, store, beat)
        for order, block in finished(rank):
            if block is not None and not order.again:
                yield block
    except PeerLost as error:
        beat.fail(store, f"lost touch ({error})", peer=True)
        raise _told(_culprit(watch, share), store) from None
    except ValueError as error:
        beat.fail(store, str(error), asked=True)
        raise _told(Failure(share.rank, beat.block, str(error), asked=True), store) from None
    except (KeyboardInterrupt, GeneratorExit):
        beat.fail(store, "was interrupted")
        raise
    except Exception as error:
        beat.fail(store, why(error))
        raise _told(Failure(share.rank, beat.block, why(error)), store) from None
    finally:
        over.set()
    beat.done(store)
    dist.barrier()
    dist.destroy_process_group()


def _look(watch: Watch, store: Prefixed, share: Share, over: threading.Event) -> None:
    """On a thread of its own: end this rank where another one hangs."""
    while not over.wait(LOOK):
        silent = watch.listen()
        if silent is not None and silent != share.rank:
            failure = watch.silent(silent)
            if store.first("told"):
                os.write(2, f"worldsim: {failure}\n".encode())
            end_process()


def _culprit(watch: Watch, share: Share) -> Failure:
    """Who it is that others lost touch with: it says so, or its heart does not beat any more."""
    until = time.monotonic() + FOUND
    while time.monotonic() < until:
        before = [watch.beats(rank) for rank in range(share.ranks)]
        time.sleep(GRACE)
        said = watch.said()
        if said is not None and not said.peer:
            return said
        for rank, beats in enumerate(before):
            if beats == watch.beats(rank) and not watch.ended(rank):
                return Failure(rank, watch.block(rank), "died")
    return Failure(share.rank, watch.block(share.rank), "lost touch with the others")


def _told(failure: Failure, store: Prefixed) -> Exception:
    """What to raise: the failure on one rank, and on all others an end without a word."""
    return failure.error() if store.first("told") else RankFailed("")


def _wait(*_: object) -> None:
    """Leave a moment for the words of whoever knows."""
    threading.Timer(FOUND, end_process).start()
