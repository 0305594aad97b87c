"""Start a module of this package as a child process: from a notebook, on one process or on many.

The child ends with its parent (a notebook kernel that dies leaves no training behind), its output
arrives line by line, and a failure is an exception that carries the child's last lines. A
subprocess, not a fork of the kernel: memory is freed when it ends, a crash cannot take the kernel
along, and the same command works in a terminal.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping

from .config import ROOT

END_WITH_PARENT = "EC2FACE_END_WITH_PARENT"  # set for our children; `end_with_parent` obeys it
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAST_LINES = 30


class LaunchError(subprocess.CalledProcessError):
    """A child that failed; the message ends with the last lines that it printed."""

    def __str__(self) -> str:
        return f"{super().__str__()} Its last lines:\n{self.output}"


def run(
    module: str, *args: str, num_processes: int = 1, env: Mapping[str, str] | None = None
) -> None:
    """Run `python -m module args` in the repository root and print its output as it comes.

    Args:
        module: module to run, for example `ec2face_core.train`.
        args: its command line.
        num_processes: 1 runs plain Python, N runs N ranks under accelerate, on CPU (gloo) or GPU.
        env: variables to set besides those of this process.

    Raises:
        LaunchError: the child ended with another code than 0 (a `CalledProcessError`).
    """
    command = command_line(module, *args, num_processes=num_processes)
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(num_processes) | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=_end_with(os.getpid()) if sys.platform == "linux" else None,
    )
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line)
        code = process.wait()
    except BaseException:  # also an interrupted notebook cell: the child must not train on alone
        _stop(process)
        raise
    if code:
        raise LaunchError(code, command, output="".join(last))


def command_line(module: str, *args: str, num_processes: int = 1) -> list[str]:
    """The command that `run` executes.

    `--multi_gpu` is right without a GPU too: `accelerate launch --cpu --num_processes 2` silently
    runs one process, while this starts two ranks that talk by gloo as soon as the module builds
    `Accelerator(cpu=True)`. Port 0 takes a free port.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    if num_processes == 1:
        return [sys.executable, "-m", module, *args]
    accelerate = (
        f"-m accelerate.commands.launch --multi_gpu --num_processes {num_processes} "
        "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 -m"
    )
    return [sys.executable, *accelerate.split(), module, *args]


def child_environment(num_processes: int = 1) -> dict[str, str]:
    """This process's variables and those that a training child wants.

    Spinning OpenMP threads on shared cores slow a small model down tenfold, hence the first two;
    ranks on one machine share its cores.
    """
    wanted = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "PYTHONUNBUFFERED": "1",
        END_WITH_PARENT: "1",
    }
    if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    return dict(os.environ) | wanted


def end_with_parent() -> None:
    """Make this process end when its parent does, if `run` started it (Linux; elsewhere nothing).

    The ranks of a training are children of accelerate's launcher, so each asks for it itself.
    """
    if sys.platform == "linux" and os.environ.get(END_WITH_PARENT):
        _end_with(os.getppid())()


def _end_with(parent: int):
    """A function that, called in a child, ties it to the process `parent`."""
    libc = ctypes.CDLL(None)  # loaded before the fork: little is safe to do after it

    def tie() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the line above took effect
            os._exit(1)

    return tie


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
