"""A run over ranks, seen from outside: start them, take their blocks, notice what goes wrong.

The process that starts the ranks is none of them: it holds the store where they meet and takes the
finished blocks, so what was made is delivered whichever rank dies. The store listens on a port that
the system chooses, so none can be taken. Under torchrun there is no such process: see
`worldsim.streaming.torchrun`.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from pickle import UnpicklingError
from threading import Event, Lock, Thread, Timer
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore  # as torch.distributed has them

from worldsim.controls import ControlState
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
from worldsim.streaming.leader import Run
from worldsim.streaming.link import Order
from worldsim.streaming.pipeline import prefetch
from worldsim.streaming.processes import context
from worldsim.streaming.ranks import Rank
from worldsim.streaming.words import check_words
from worldsim.world import World

HOST = "127.0.0.1"
LOOK = 0.1  # seconds between two looks at the ranks
PATIENCE = timedelta(minutes=30)  # for whatever takes long without anything being wrong
STOPPING = 10.0  # seconds in which ranks that were told to stop may finish their blocks


class Ranks:
    """A run over processes of this machine.

    Attributes:
        ran: of each rank that has ended well, the cells that it ran, where the run keeps a log.
        messages: of each such rank, how many it sent and received.
    """

    def __init__(self, run: Run, shares: list[Share], world: World, threads: int = 1) -> None:
        """``world``: the one that runs, to know its controls and words; it needs no weights."""
        self.run, self._world = run, world
        self.ran: dict[int, list[tuple[str, int, int]]] = {}
        self.messages: dict[int, tuple[int, int]] = {}
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._watch = Watch(self._store, run.ranks)
        self._failure: Failure | None = None
        self._stream: Generator[Block, None, None] | None = None
        self._over = Event()
        self._newest = -1  # block that came
        self._lock = Lock()  # states are asked for on one thread and written for on another
        self._ended = False
        self._telling = Lock()  # held while a full pipe waits: not with what comes
        self._snapshots: dict[str, tuple[Future[Path], set[int]]] = {}
        start = context()
        self._results: list[Connection] = []
        self._orders: Connection
        self._processes = []
        try:
            for share in shares:
                here, there = start.Pipe(duplex=False)
                heard, said = start.Pipe(duplex=False)
                process = start.Process(
                    target=_work,
                    args=(run, share, self._store.port, there, heard, threads),
                    name=f"worldsim-rank-{share.rank}",
                    daemon=True,
                )
                process.start()
                there.close()
                heard.close()
                self._results.append(here)
                self._processes.append(process)
                if share.rank == 0:
                    self._orders = said
                else:
                    said.close()
        except BaseException:
            self._end()
            raise
        self._thread = Thread(target=self._look, name="worldsim-watch", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int | None]:
        """Of each rank's process."""
        return [process.pid for process in self._processes]

    def heard(self, rank: int) -> bool:
        """Whether a rank has begun to work."""
        return bool(self._watch.beats(rank))

    def blocks(self) -> Generator[Block, None, None]:
        """Finished blocks, in order; one stream of them, whoever asks.

        Raises:
            RankFailed: one line, after the last block that was delivered.
        """
        # On a thread of its own: Ctrl-C may not come in the middle of a message.
        if self._stream is None:
            self._stream = prefetch(self._received())
        return self._stream

    def _received(self) -> Iterator[Block]:
        open_ = {rank: result for rank, result in enumerate(self._results) if not result.closed}
        while open_:
            ready = wait(list(open_.values()), LOOK)
            for rank in [rank for rank, result in open_.items() if result in ready]:
                try:
                    kind, value = open_[rank].recv()
                except (EOFError, OSError, UnpicklingError):
                    del open_[rank]
                    continue
                if kind == "block":
                    block = _unpacked(value)
                    self._newest = block.index
                    yield block
                elif kind == "kept":
                    self._kept(rank, value)
                else:
                    self.ran[rank], self.messages[rank] = value
        self._over.wait()
        with self._lock:
            self._ended, waiting = True, list(self._snapshots.values())
            self._snapshots.clear()
        for future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(ValueError("the run has ended before its state was written"))
        if self._failure is not None:
            raise self._failure.error()

    def tell(self, name: str, **arguments: Any) -> None:
        """Do something to the first rank's session before its next block: ``control``, ``cut``,
        ``flush`` or ``reset``.

        Raises:
            ValueError: for what this world does not know; the run goes on.
        """
        if name not in ("control", "cut", "flush", "reset"):
            raise ValueError(f"ranks know no {name!r}")
        if name == "control":
            self._check(**arguments)
        self._order(name, **arguments)

    def snapshot(self, folder: str | Path) -> "Future[Path]":
        """Have every rank write its state after the next block that is begun, on its way past it.
        `worldsim.streaming.kept.gathered` makes a session of the folder, `Run.resume` a run.

        The future is done once all of it is there, while somebody takes the `blocks`; it raises a
        ValueError where the run ends before.

        Raises:
            ValueError: for a run along a script that has no ``saves``: that is made again instead;
                for one that has ended, or a folder that a state is being written to.
        """
        if not self.run.keeps:
            raise ValueError("a run along a script writes states only where it has saves=")
        future: Future[Path] = Future()
        name = str(Path(folder).resolve())
        with self._lock:
            if self._ended:
                raise ValueError("the run has ended: there is no state to write")
            if name in self._snapshots:
                raise ValueError(f"a state is being written to {folder} already")
            self._snapshots[name] = future, set()
        self._order("snapshot", folder=name)
        return future

    def rewind(self, to_block: int) -> None:
        """Go back to right before a block, as `Session.rewind` does: blocks on their way still
        come, and then it and those after it once more. What is told after it holds from there on.

        From the nearest state that ranks keep in memory (`Run.snapshots`), and blocks between are
        made again, which nobody sees. Where the way is forgotten, the run goes on as it was.

        Raises:
            ValueError: for a block that has not come out of `blocks`.
        """
        if not 0 <= to_block <= self._newest:
            raise ValueError(f"cannot go back to block {to_block}: the newest is {self._newest}")
        self._order("rewind", to_block=to_block)

    def _order(self, name: str, **arguments: Any) -> None:
        with self._telling, contextlib.suppress(OSError):  # gone: `blocks` tells why
            self._orders.send((name, arguments))

    def _kept(self, rank: int, folder: str) -> None:
        """A rank has written its state."""
        with self._lock:
            future, ranks = self._snapshots.get(folder, (None, set()))
            ranks.add(rank)
            if future is None or len(ranks) < self.run.ranks:
                return
            del self._snapshots[folder]
        if future.set_running_or_notify_cancel():
            future.set_result(Path(folder))

    def _check(
        self,
        buttons: Collection[str] | None = None,
        prompt: str | None = None,
        state: ControlState | None = None,
    ) -> None:
        """Refuse here what `Session.control` would refuse there, where it would end the run."""
        if state is None:
            state = ControlState(frozenset(buttons or ()), prompt=prompt)
        elif buttons is not None or prompt is not None:
            raise ValueError("control: give buttons and a prompt, or a state that holds both")
        if (words := self._world.actions.heard(state).prompt) is not None:
            check_words(self._world, words)

    def stop(self) -> None:
        """Have no more blocks begun; those in the making still come."""
        self._order("stop")

    def close(self) -> None:
        """End all ranks: well if they can, and for sure."""
        late = Timer(STOPPING, self._kill)  # whatever it is that a rank or this thread waits for
        late.daemon = True
        late.start()
        try:
            self.stop()
            with contextlib.suppress(RankFailed, ValueError):
                if self._stream is not None:
                    self._stream.close()
                for _ in self._received():  # nobody can finish who cannot deliver
                    pass
        finally:
            late.cancel()
            self._end()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _look(self) -> None:
        """On a thread of its own: notice the first thing that goes wrong, and end everybody."""
        try:
            self._failure = self._found()
        except Exception as error:  # whatever it is, nobody may wait for ever
            self._failure = Failure(0, 0, f"cannot be watched any more ({error})")
        finally:
            for process in self._processes:
                if process.exitcode is None and self._failure is not None:
                    process.kill()
                process.join()
            self._over.set()

    def _found(self) -> Failure | None:
        """What goes wrong; None where every rank ends well."""
        while alive := [p.sentinel for p in self._processes if p.exitcode is None]:
            wait(alive, LOOK)
            dead = [rank for rank, process in enumerate(self._processes) if process.exitcode]
            silent = self._watch.listen()
            if dead or silent is not None:
                return self._blame(dead, silent)
        dead = [rank for rank, process in enumerate(self._processes) if process.exitcode]
        return self._blame(dead, None) if dead else None

    def _blame(self, dead: list[int], silent: int | None) -> Failure:
        if silent is not None and not dead:
            return self._watch.silent(silent)
        time.sleep(GRACE)
        codes = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        killed = [rank for rank, code in codes.items() if code is not None and code < 0]
        if killed:
            return self._watch.died(killed[0], codes[killed[0]])
        said = self._watch.said()
        return said if said is not None else self._watch.died(dead[0], codes[dead[0]])

    def _kill(self) -> None:
        for process in self._processes:
            if process.exitcode is None:
                process.kill()

    def _end(self) -> None:
        self._kill()
        for process in self._processes:
            process.join()
        if hasattr(self, "_thread"):
            self._thread.join()
        for connection in (*self._results, *([self._orders] if self._processes else [])):
            connection.close()


# --- in a rank's process ----------------------------------------------------------------------
def _work(
    run: Run, share: Share, port: int, results: Connection, heard: Connection, threads: int
) -> None:
    """What a rank's process does, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    store, own = (TCPStore(HOST, port, wait_for_workers=False, timeout=PATIENCE) for _ in range(2))
    beat = Beat(own, share.rank, end_process)
    try:
        dist.init_process_group(
            run.backend if run.backend != "nccl" else "cpu:gloo,cuda:nccl",
            store=PrefixStore("group", store), rank=share.rank, world_size=share.ranks,
            timeout=PATIENCE,
        )  # fmt: skip
        rank = Rank(run, share, store, beat, heard if share.rank == 0 else None)
        for order, block in finished(rank):
            for folder in order.saves:
                results.send(("kept", folder))
            if block is not None and not order.again:
                results.send(("block", _packed(block)))
        results.send(("ran", (rank.ran, rank.messages)))
    except PeerLost as error:
        beat.fail(store, f"lost touch ({error})", peer=True)
        end_process()
    except (BrokenPipeError, ConnectionResetError):
        end_process()  # whoever started it is gone
    except ValueError as error:
        beat.fail(store, str(error), asked=True)
        end_process()
    except BaseException as error:
        beat.fail(store, why(error))
        end_process()
    beat.done(store)
    results.close()
    sys.stdout.flush()
    os._exit(0)  # at once: nothing is left to do that could hang


def finished(rank: Rank) -> Iterator[tuple[Order, Block | None]]:
    """What a rank has done, in order. On the last one each block comes with it, decoded if it
    decodes; the others only pass them on."""
    if not rank.share.last:
        for order, _ in rank.blocks():
            yield order, None
        return
    if not rank.run.overlap:
        for order, block in rank.blocks():
            yield order, rank.finish(order, block)
        return
    with contextlib.closing(prefetch(rank.blocks())) as ahead:  # decoding overlaps its own steps
        for order, block in ahead:
            yield order, rank.finish(order, block)


def why(error: BaseException) -> str:
    """An error in one line."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or "out of memory" in said or "DefaultCPUAllocator" in said:
        return f"ran out of memory ({said or 'MemoryError'})"
    return f"failed ({said or type(error).__name__})"


def _packed(block: Block) -> dict[str, Any]:
    return {
        "index": block.index, "start": block.start, "latents": block.latents.cpu().numpy(),
        "applied": block.applied, "frames": block.frames, "timings": block.timings,
    }  # fmt: skip


def _unpacked(told: dict[str, Any]) -> Block:
    latents: np.ndarray[Any, Any] = told.pop("latents")
    return Block(latents=torch.from_numpy(latents), **told)
