"""`worldsim stream --profile`: a Chrome trace of some blocks, and where their time went.

The trace opens in https://ui.perfetto.dev or chrome://tracing. Each thread of the stream is a row
in it, each part of a block a region with a name, ``denoise block 12``. It holds `BLOCKS` blocks or
so (stages run ahead of each other), however long the stream is.
"""

import json
import os
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from worldsim.apps.report import print_table
from worldsim.apps.trace import Event, Total, by_operator, by_part
from worldsim.parts import PARTS, part
from worldsim.streaming.sinks import Frames, Sink, plain_errors

BLOCKS = 8
OPERATORS = 10  # shown
QUIET = "6"  # a level of Kineto's log above all that it says


class Profile:
    """Profiles while it is entered, from the end of the warm-up on.

    Args:
        path: of the trace.
        device: where the world is; a GPU's kernels are in the trace, too.
        warm_up: blocks to let pass first, but at most half of the stream.
        blocks: of the whole stream.
    """

    def __init__(self, path: Path, device: torch.device, warm_up: int, blocks: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Stages are threads of their own, and a profiler sees but its own thread unless told to.
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._profiler = profile(activities=activities, experimental_config=threads)
        self._path = path
        self._first = min(warm_up, blocks // 2)
        self._running = self._ran = False

    def named(self, sink: Sink) -> Sink:
        """A sink whose writes are regions of the trace; the other parts name themselves."""
        return _NamedSink(sink)

    def after(self, block: int) -> None:
        """Told of each block that has passed; begins and ends the profile."""
        if block + 1 == self._first:
            self._start()
        elif block + 1 == self._first + BLOCKS:
            self._stop()

    def __enter__(self) -> "Profile":
        self._profiler.prepare_trace()  # takes a second the first time: better not in mid-stream
        if self._first == 0:
            self._start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop()

    def report(self, console: Console) -> None:
        """Write the trace, whole or not at all, and say where the time went.

        Raises:
            OSError: if it cannot be written.
        """
        if not self._ran:
            console.print(f"no trace: stopped before block {self._first}, where it begins")
            return
        events = self._write()
        parts, operators = by_part(events), by_operator(events)
        blocks = max((total.calls for total in parts.values()), default=0)
        console.print(f"trace of {blocks} blocks in {self._path}; tracing slows small operators")
        rows = [
            [
                name,
                *_shares(parts[name], parts),
                f"{1e3 * parts[name].seconds / parts[name].calls:.2f}",
            ]
            for name in PARTS
            if name in parts
        ]
        print_table("by part", ("part", "total s", "share", "ms per block"), rows, console)
        longest = sorted(operators, key=lambda name: -operators[name].seconds)[:OPERATORS]
        rows = [
            [name, *_shares(operators[name], operators), str(operators[name].calls)]
            for name in longest
        ]
        title = "by operator, without those that it calls"
        print_table(title, ("operator", "total s", "share", "calls"), rows, console)

    def _start(self) -> None:
        self._profiler.start_trace()
        self._running = self._ran = True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            self._profiler.stop_trace()

    def _write(self) -> list[Event]:
        unfinished = self._path.with_suffix(".json.tmp")
        try:
            with plain_errors(str(self._path)):
                self._profiler.export_chrome_trace(str(unfinished))
                # Read back, for the summary: and the exporter is silent about a full disk.
                events: list[Event] = json.loads(unfinished.read_bytes())["traceEvents"]
                unfinished.replace(self._path)
        except ValueError:
            line = f"cannot write {self._path}: it came out cut: make room or name another target"
            raise OSError(line) from None
        finally:
            unfinished.unlink(missing_ok=True)
        return events


class _NamedSink:
    """A sink whose n-th write is the region ``encode block n``."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._block = 0

    def write(self, frames: Frames) -> None:
        with part("encode", self._block, {}):
            self._sink.write(frames)
        self._block += 1

    def close(self) -> None:
        self._sink.close()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _shares(total: Total, among: dict[str, Total]) -> tuple[str, str]:
    everything = sum(other.seconds for other in among.values())
    return f"{total.seconds:.3f}", f"{100 * total.seconds / max(1e-9, everything):.1f} %"
