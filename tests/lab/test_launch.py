"""Children of `launch.run`: streamed, ended with their parent, and loud when they fail."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ec2face_core.io.paths import ROOT
from ec2face_lab import launch
from ec2face_lab.gallery import last_states


@pytest.fixture
def module(tmp_path):
    """Makes a module of some code that children can run; returns the arguments of `run`."""

    def make(name: str, code: str) -> tuple[str, dict[str, str]]:
        (tmp_path / f"{name}.py").write_text(code)
        return name, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    return make


def test_output_arrives_line_by_line_with_the_wanted_environment(module, monkeypatch):
    name, env = module(
        "talks",
        "import os, sys, time\n"
        "print('one', os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])\n"
        "time.sleep(0.5)\n"
        "print('two', sys.argv[1:], os.environ['MINE'], os.getcwd(), file=sys.stderr)\n",
    )
    seen = []
    monkeypatch.setattr(
        "builtins.print", lambda *args, **_: seen.append((time.monotonic(), str(args[0])))
    )
    launch.run(name, "--steps", "3", env=env | {"MINE": "x"})
    (_, command), (first, one), (second, two) = seen
    assert command == f"$ python -m {name} --steps 3"
    assert one == "one PASSIVE 0\n"
    assert two == f"two ['--steps', '3'] x {ROOT}\n"
    assert second - first > 0.3  # not all at the end


def test_a_progress_bar_stays_one_line(module, capsys):
    name, env = module(
        "counts",
        "import sys\n"
        "from tqdm import tqdm\n"
        "for _ in tqdm(range(300), mininterval=0): pass\n"
        "sys.stderr.write('after\\nhalf\\rwhole\\n')\n",
    )
    starts = {1: f"$ python -m {name}", 2: f"$ torchrun --nproc-per-node=2 -m {name}"}
    for processes, start in starts.items():  # torchrun writes each state as a line of its own
        launch.run(name, env=env, num_processes=processes)
        command, *shown = last_states(capsys.readouterr().out).splitlines()
        assert command == start
        bars = [line for line in shown if "300/300" in line]
        assert len(bars) == 1 and not any("299/300" in line for line in shown)
        others = [line for line in shown if line not in bars and line != "half"]
        assert others == ["after", "whole"] and ("half" in shown) == (processes == 2)
        assert not any("[rank0]" in line for line in shown)


def test_a_failure_carries_the_last_lines(module, capsys):
    name, env = module("fails", "for i in range(50): print('line', i)\nraise SystemExit(2)\n")
    with pytest.raises(subprocess.CalledProcessError) as error:
        launch.run(name, env=env, title="fifty lines")
    assert error.value.returncode == 2
    assert "line 49" in str(error.value) and "line 5\n" not in str(error.value)
    out = capsys.readouterr().out
    assert out.startswith("fifty lines\nline 0\n") and "line 5\n" in out


def test_command_lines():
    assert launch.command_line("m", "-a", num_processes=1) == [sys.executable, "-m", "m", "-a"]
    many = launch.command_line("m", "-a", num_processes=3)
    assert many[-3:] == ["-m", "m", "-a"]
    assert "--nproc-per-node=3" in many and "--standalone" in many
    with pytest.raises(ValueError, match="at least 1"):
        launch.command_line("m", num_processes=0)


def test_lines_for_the_shell():
    one = launch.command("m", "--set", "a=b c", num_processes=8)
    assert shlex.split(one)[-4:] == ["-m", "m", "--set", "a=b c"]
    assert one.startswith("torchrun --standalone --nproc-per-node=8 ") and "nnodes" not in one
    two = launch.command("m", num_processes=16, machines=2, host="node0", port=29501)
    assert "--nnodes=2" in two and "--nproc-per-node=8" in two and "standalone" not in two
    assert "--rdzv-backend=c10d --rdzv-endpoint=node0:29501" in two
    with pytest.raises(ValueError, match="8 processes cannot be shared by 3 machines"):
        launch.command("m", num_processes=8, machines=3, host="node0")
    with pytest.raises(ValueError, match="host"):
        launch.command("m", num_processes=8, machines=2)


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux only")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_child_ends_with_its_parent(module, tmp_path, monkeypatch, end):
    pid_file = tmp_path / "pid"
    name, env = module(
        "waits",
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(120)\n",
    )
    monkeypatch.setenv("PYTHONPATH", env["PYTHONPATH"])
    fork = multiprocessing.get_context("fork")  # a parent that does not import torch again
    parent = fork.Process(target=run_interruptibly, args=(name, str(pid_file)))
    parent.start()
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    child = Path(f"/proc/{pid_file.read_text()}")
    assert child.exists()
    os.kill(parent.pid, end)
    parent.join(60)
    wait_for(lambda: not child.exists() or "\nState:\tZ" in (child / "status").read_text())


def test_children_side_by_side_end_with_an_error_or_an_interrupt(module, tmp_path):
    """Two run at a time; the others are never started."""
    name, env = module(
        "sleeps",
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(120)\n",
    )
    files = [tmp_path / str(k) for k in range(4)]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), launch.side_by_side(2) as pool:
        futures = [pool.submit(launch.run, name, str(file), env=env) for file in files]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files[:2]))
        raise KeyboardInterrupt
    assert time.monotonic() - began < 60
    for file in files[:2]:
        child = Path(f"/proc/{file.read_text()}")
        assert not child.exists() or "\nState:\tZ" in (child / "status").read_text()
    assert not files[2].exists() and not files[3].exists()
    assert all(future.done() for future in futures)


RANK = """
import os, sys, time
print("hello of rank", os.environ["RANK"], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last_words", "message"),
    [
        ("raise RuntimeError('the loss is purple')", "rank 1 failed with exit code 1.*is purple"),
        ("os.kill(os.getpid(), 9)", "rank 1 was ended by SIGKILL .*memory is short.*of rank 1"),
    ],
    ids=["raises", "killed"],
)  # fmt: skip
def test_a_rank_that_dies_is_named_with_its_log(module, tmp_path, capfd, last_words, message):
    dies = f"if os.environ['RANK'] == '1': {last_words}\ntime.sleep(600)\n"
    name, env = module("dies", RANK + dies)
    with pytest.raises(launch.LaunchError, match=f"(?s){message}") as error:
        launch.run(name, num_processes=2, env=env, logs=tmp_path / "logs")
    assert error.value.rank == 1 and "The same call again resumes" in str(error.value)
    log = error.value.log
    assert log.is_relative_to(tmp_path / "logs") and str(log) in str(error.value)
    assert error.value.output in log.read_text() + "\n"
    out = capfd.readouterr().out
    assert "\nhello of rank 0\n" in out and "hello of rank 1" not in out


@pytest.mark.slow
def test_two_processes_are_two_ranks(module, tmp_path, capfd):
    name, env = module(
        "ranks",
        "import torch\n"
        "from accelerate import Accelerator\n"
        "a = Accelerator(cpu=True)\n"
        "total = a.reduce(torch.tensor([1.0 + a.process_index]))\n"
        "print(f'rank {a.process_index} of {a.num_processes} sum {total.item()}\\n', end='')\n"
        "a.end_training()\n",
    )
    launch.run(name, num_processes=2, env=env, logs=tmp_path / "logs")
    out = capfd.readouterr().out
    assert "\nrank 0 of 2 sum 3.0" in out and "rank 1" not in out
    assert not any((tmp_path / "logs").iterdir())  # kept only where something failed


@pytest.mark.slow
def test_the_line_for_several_machines_works(module, tmp_path):
    """Two launchers on this machine stand for two machines."""
    name, env = module(
        "meets",
        "import torch.distributed as d\n"
        "d.init_process_group('gloo')\n"
        "print(f'rank {d.get_rank()} of {d.get_world_size()}')\n"
        "d.destroy_process_group()\n",
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = launch.command(name, num_processes=2, machines=2, host="localhost", port=port)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = {"cwd": tmp_path, "env": launch.child_environment() | env | {"PATH": path}}
    machines = [
        subprocess.Popen(shlex.split(line), stdout=subprocess.PIPE, text=True, **start)
        for _ in range(2)
    ]
    output = "".join(machine.communicate(timeout=300)[0] for machine in machines)
    assert [machine.returncode for machine in machines] == [0, 0]
    assert "rank 0 of 2" in output and "rank 1 of 2" in output
    assert (tmp_path / "runs" / "logs").is_dir()


def run_interruptibly(*args):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    launch.run(*args)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_lines_of_two_streams_that_run_into_each_other_are_told_apart(capsys):
    pieces = ["[rank0]: 35%|### | 1/3 [00:00<00:01][rank0]:after\n", "[rank0]:next\n"]
    assert list(launch._shown(pieces)) == ["after\n", "next\n"]
    assert "[rank0]" not in capsys.readouterr().out
