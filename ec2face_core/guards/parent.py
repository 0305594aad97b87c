"""Processes end with the one that started them: ranks, kernels, trainings, workers (on Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

END_WITH_PARENT = "EC2FACE_END_WITH_PARENT"  # environment variable of processes that we launch
TORCHRUN = "TORCHELASTIC_RUN_ID"  # environment variable of ranks under torchrun
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Make this process end when its parent does, if we or torchrun started it.

    On Linux only. The ranks of a training are children of torchrun, so each of them has to call
    this. On every system SIGINT then ends a rank at once, even one that waits for another.
    """
    under_torchrun = TORCHRUN in os.environ
    if under_torchrun:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux" and (under_torchrun or os.environ.get(END_WITH_PARENT)):
        parent = os.getppid()
        if under_torchrun and not _is_launcher(parent):
            os._exit(1)  # torchrun was killed before this rank came so far
        tie_to(parent)()


def _is_launcher(pid: int) -> bool:
    """Whether a process may have started ranks: an orphan's new parent is no Python program."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # unknown
    return any(word in command for word in (b"python", b"torch", b"accelerate"))


def tie_to(parent: int) -> Callable[[], None]:
    """A function that, called in a child, makes it end with the process `parent` (Linux)."""
    libc = ctypes.CDLL(None)  # loaded before the fork, after which little is safe to do

    def tie() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the line above took effect
            os._exit(1)

    return tie
