"""Start a module of this package as a child process: from a notebook, on one process or on many.

The child ends with its parent (a notebook kernel that dies leaves no training behind), its output
arrives line by line, and a failure is an exception that carries the child's last lines. A
subprocess, not a fork of the kernel: memory is freed when it ends, a crash cannot take the kernel
along, and the same command works in a terminal, also on several machines (`command`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from ec2face_core.config import ROOT
from ec2face_core.train import END_WITH_PARENT, _end_with

LAST_LINES = 30

LOGS = ROOT / "runs" / "logs"

ROLE = "rank"  # torchrun begins rank 0's lines with [rank0]:


class LaunchError(subprocess.CalledProcessError):
    """A child that failed; the message ends with the last lines that it printed.

    `rank` and `log` name the first of several processes that failed and the file of its messages;
    None for a single one.
    """

    rank: int | None = None
    log: Path | None = None

    def __str__(self) -> str:
        if self.rank is None:
            return f"{super().__str__()} Its last lines:\n{self.output}"
        how = f"failed with exit code {self.returncode}"
        if self.returncode < 0:
            how = f"was ended by {signal.Signals(-self.returncode).name}"
        if self.returncode == -signal.SIGKILL:
            how += " (so the system ends processes when memory is short)"
        return (
            f"rank {self.rank} {how}; the others were stopped. The same call again resumes. Its "
            f"log is {self.log}, the last lines:\n{self.output}"
        )


def run(
    module: str,
    *args: str,
    num_processes: int = 1,
    env: Mapping[str, str] | None = None,
    logs: Path = LOGS,
) -> None:
    """Run `python -m module args` in the repository root and print its output as it comes.

    Args:
        module: module to run, for example `ec2face_core.train`.
        args: its command line.
        num_processes: 1 runs plain Python, N runs N ranks under torchrun, on CPU (gloo) or GPU;
            rank 0 is heard, each rank has a log.
        env: variables to set besides those of this process.
        logs: folder for the logs of several ranks, kept if the child fails.

    Raises:
        LaunchError: the child ended with another code than 0 (a `CalledProcessError`).
    """
    folder = None
    if num_processes > 1:
        logs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{module}-", dir=logs))
    command = command_line(module, *args, num_processes=num_processes, logs=folder)
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
            line = line.removeprefix(f"[{ROLE}0]:")
            print(line, end="", flush=True)
            last.append(line)
        code = process.wait()
    except BaseException:  # also an interrupted notebook cell: the child must not train on alone
        _stop(process)
        raise
    if code:
        raise _failure(code, command, last, folder)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def command_line(
    module: str, *args: str, num_processes: int = 1, logs: Path | None = None
) -> list[str]:
    """The command that `run` executes.

    Several ranks are torchrun's: `accelerate launch --cpu --num_processes 2` silently runs one
    process, while these talk by gloo as soon as the module builds `Accelerator(cpu=True)`.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    if num_processes == 1:
        return [sys.executable, "-m", module, *args]
    heard = ["--tee=3", f"--log-dir={logs}", "--local-ranks-filter=0"] if logs else []
    torchrun = ["--standalone", f"--nproc-per-node={num_processes}", f"--role={ROLE}", *heard]
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", module, *args]


def command(
    module: str,
    *args: str,
    num_processes: int,
    machines: int = 1,
    host: str = "",
    port: int = 29500,
) -> str:
    """The shell line that runs a module on many GPUs; on several machines the same line on each.

    Args:
        module: for example `ec2face_core.train`.
        args: its command line; training wants `--set trainer.num_processes=...`, too.
        num_processes: GPUs of all machines together.
        machines: with equally many GPUs each, and the repository at the same place.
        host: name or address of one of them, where they find each other.
        port: free on that machine.

    Raises:
        ValueError: the numbers do not go together, or host is missing.
    """
    if machines < 1 or num_processes < 1 or num_processes % machines:
        raise ValueError(f"{num_processes} processes cannot be shared by {machines} machines")
    if machines > 1 and not host:
        raise ValueError("several machines need host: where they find each other")
    meet = ["--standalone"]
    if machines > 1:
        meet = [f"--nnodes={machines}", "--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}"]
        meet += [f"--rdzv-id={module}"]
    shared = [f"--nproc-per-node={num_processes // machines}", "--tee=3", "--log-dir=runs/logs"]
    return shlex.join(["torchrun", *meet, *shared, "-m", module, *args])


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


def _failure(code: int, command: list[str], last: Sequence[str], logs: Path | None) -> LaunchError:
    """The error of the first rank that failed, if torchrun's report names it."""
    said = "".join(last)
    report = r"Root Cause.*?rank +: (\d+) \(local_rank: (\d+)\)\s+exitcode +: (-?\d+)"
    found = re.search(report, said, re.DOTALL)
    if logs is None or found is None:
        return LaunchError(code, command, output=said)
    rank, local, code = map(int, found.groups())
    files = sorted(logs.glob(f"*/attempt_*/{local}/std*.log"))  # stderr before stdout
    file = next((f for f in files if f.stat().st_size), logs)
    said = file.read_text(errors="replace") if file.is_file() else ""
    error = LaunchError(code, command, output="\n".join(said.splitlines()[-LAST_LINES:]))
    error.rank, error.log = rank, file
    return error


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
