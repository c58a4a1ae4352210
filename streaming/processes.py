"""Where the processes of ranks come from. Light to import: a command begins it while it loads."""

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker
from typing import Any

PRELOAD = ["worldsim.streaming.launch"]
SAFE = "PYTHONSAFEPATH"


def context() -> Any:
    """How processes are started: from one that has loaded everything already, and has touched no
    device and started no thread. It is there from the first call on."""
    if sys.version_info < (3, 11):
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    # Else it would look for modules in the working directory first, where others of the same name
    # may lie: in the root of this repository, say.
    # A Ctrl-C while it loads is this process's to tell; what it starts inherits the mask. Starting
    # the tracker lifts it.
    resource_tracker.ensure_running()
    before = os.environ.get(SAFE)
    os.environ[SAFE] = "1"
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        if before is None:
            del os.environ[SAFE]
    return found
