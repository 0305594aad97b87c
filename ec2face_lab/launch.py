"""Start a module as a child process: from a notebook, on one process or on many.

The child ends with its parent, so that a notebook kernel that dies leaves no training behind. Its
output arrives line by line, a progress bar as one line that is redrawn, and a failure is an
exception with the child's last lines. It is a subprocess, not a fork of the kernel: its memory is
freed when it ends, its crash cannot end the kernel, and the same command works in a terminal, also
on several machines (`command`).
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ec2face_core.guards.parent import END_WITH_PARENT, tie_to
from ec2face_core.io.paths import CODE, ROOT

LAST_LINES = 30
LOGS = ROOT / "runs" / "logs"
_running: set[subprocess.Popen] = set()  # children of `run`, in all threads
ROLE = "rank"  # torchrun begins rank 0's lines with [rank0]:
BAR = re.compile(r"\d+%\|.*\| *\S+/\S+ \[")  # tqdm; torchrun ends each of its states with a line


class LaunchError(subprocess.CalledProcessError):
    """A child failed; the message ends with the last lines that it printed.

    With several processes, `rank` and `log` name the first one that failed and the file of its
    output.
    """

    rank: int | None = None
    log: Path | None = None

    def __str__(self) -> str:
        if self.rank is None:
            return f"{super().__str__()} Its last lines:\n{self.output}"
        reason = f"failed with exit code {self.returncode}"
        if self.returncode < 0:
            reason = f"was ended by {signal.Signals(-self.returncode).name}"
        if self.returncode == -signal.SIGKILL:
            reason += " (so the system ends processes when memory is short)"
        return (
            f"rank {self.rank} {reason}; the others were stopped. The same call again resumes. Its "
            f"log is {self.log}, the last lines:\n{self.output}"
        )


def run(
    module: str,
    *args: str,
    num_processes: int = 1,
    env: Mapping[str, str] | None = None,
    logs: Path = LOGS,
    title: str = "",
) -> None:
    """Run `python -m module args` in the repository root and print its output as it comes.

    Args:
        module: module to run, for example `ec2face_core.train`.
        args: its command line.
        num_processes: 1 runs plain Python, N runs N ranks under torchrun, on CPU (gloo) or GPU;
            the output of rank 0 is printed, and each rank has a log.
        env: variables to set besides those of this process.
        logs: folder for the logs of several ranks, kept if the child fails.
        title: printed first; empty: the command as one types it in a shell.

    Raises:
        LaunchError: the child's exit code was not 0.
    """
    folder = None
    if num_processes > 1:
        logs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{module}-", dir=logs))
    command = command_line(module, *args, num_processes=num_processes, logs=folder)
    start = ["python"] if num_processes == 1 else ["torchrun", f"--nproc-per-node={num_processes}"]
    print(title or f"$ {shlex.join([*start, '-m', module, *args])}", flush=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        cwd=CODE,  # the packages are imported from there
        env=child_environment(num_processes) | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=tied(),
    )
    _running.add(process)
    try:
        for line in _shown(io.TextIOWrapper(process.stdout, errors="replace", newline="")):
            last.append(line)
        code = process.wait()
    except BaseException:  # also an interrupted notebook cell: the child must end with it
        stop(process)
        raise
    finally:
        _running.discard(process)
    if code:
        raise _failure(code, command, last, folder)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(output: Iterable[str]) -> Iterator[str]:
    """Print a child's output and yield its lines; states of a progress bar redraw one line.

    output: pieces that end with a line feed, or with a carriage return where the line is redrawn.
    """
    drawn = ""  # the state that stands in the last line
    mark = f"[{ROLE}0]:"
    # torchrun copies two streams, so a line of one may begin within a line of the other
    pieces = (part for piece in output for part in piece.replace(mark, f"\0{mark}").split("\0"))
    for piece in filter(None, pieces):
        text = piece.removeprefix(mark).rstrip("\r\n")
        if (not text and piece != "\n") or piece.endswith("\r") or BAR.search(text):
            if text.strip():
                print(f"\r{text}", end="", flush=True)
                drawn = piece
            continue
        if drawn:  # ends its line, unless what follows was written over it
            print("\r" if drawn.endswith("\r") and text else "\n", end="", flush=True)
            drawn = ""
            if not text:
                continue
        print(f"{text}\n", end="", flush=True)
        yield f"{text}\n"
    if drawn:
        print(flush=True)


def tied() -> Callable[[], None] | None:
    """`preexec_fn` of a child that shall end with this process (Linux; elsewhere None)."""
    return tie_to(os.getpid()) if sys.platform == "linux" else None


@contextmanager
def side_by_side(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that call `run`; an interrupt or an error ends the children, too.

    workers: threads; None: one for each core.
    """
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            stop(process)
        raise
    finally:
        pool.shutdown()


def command_line(
    module: str, *args: str, num_processes: int = 1, logs: Path | None = None
) -> list[str]:
    """The command that `run` executes.

    Several ranks need torchrun, because `accelerate launch --cpu --num_processes 2` silently runs
    one process. They use gloo as soon as the module builds `Accelerator(cpu=True)`.

    Args:
        module: module to run.
        args: its command line.
        num_processes: ranks.
        logs: folder of the ranks' logs; without one nothing is logged.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    if num_processes == 1:
        return [sys.executable, "-m", module, *args]
    torchrun = ["--standalone", f"--nproc-per-node={num_processes}", f"--role={ROLE}"]
    if logs:
        torchrun += ["--tee=3", f"--log-dir={logs}", "--local-ranks-filter=0"]
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", module, *args]


def command(
    module: str,
    *args: str,
    num_processes: int,
    machines: int = 1,
    host: str = "",
    port: int = 29500,
) -> str:
    """The shell command that runs a module on many GPUs, the same on each of several machines.

    Args:
        module: for example `ec2face_core.train`.
        args: its command line; training also needs `--set trainer.num_processes=...`.
        num_processes: number of GPUs of all machines together.
        machines: number of machines, each with equally many GPUs and the same repository path.
        host: name or address of the machine where they meet.
        port: a free port on that machine.

    Raises:
        ValueError: the processes cannot be divided among the machines, or host is missing.
    """
    if machines < 1 or num_processes < 1 or num_processes % machines:
        raise ValueError(f"{num_processes} processes cannot be shared by {machines} machines")
    if machines > 1 and not host:
        raise ValueError("several machines need host: the name of the machine where they meet")
    rendezvous = ["--standalone"]
    if machines > 1:
        rendezvous = [f"--nnodes={machines}", "--rdzv-backend=c10d"]
        rendezvous += [f"--rdzv-endpoint={host}:{port}", f"--rdzv-id={module}"]
    shared = [f"--nproc-per-node={num_processes // machines}", "--tee=3", "--log-dir=runs/logs"]
    return shlex.join(["torchrun", *rendezvous, *shared, "-m", module, *args])


def child_environment(num_processes: int = 1) -> dict[str, str]:
    """This process's variables and those that a training child needs.

    Spinning OpenMP threads slow a small model down tenfold on shared cores, hence the first two.
    Ranks on one machine share its cores.
    """
    settings = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "PYTHONUNBUFFERED": "1",
        END_WITH_PARENT: "1",
    }
    if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        settings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    return dict(os.environ) | settings


def _failure(code: int, command: list[str], last: Sequence[str], logs: Path | None) -> LaunchError:
    """The error of the first rank that failed, if torchrun's report names it."""
    output = "".join(last)
    report = r"Root Cause.*?rank +: (\d+) \(local_rank: (\d+)\)\s+exitcode +: (-?\d+)"
    match = re.search(report, output, re.DOTALL)
    if logs is None or match is None:
        return LaunchError(code, command, output=output)
    rank, local, code = map(int, match.groups())
    files = sorted(logs.glob(f"*/attempt_*/{local}/std*.log"))  # stderr before stdout
    file = next((f for f in files if f.stat().st_size), logs)
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    error = LaunchError(code, command, output="\n".join(lines[-LAST_LINES:]))
    error.rank = rank
    error.log = file
    return error


def stop(process: subprocess.Popen) -> None:
    """End a process: by SIGTERM, and if that does not help in 20 seconds, by SIGKILL."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
