"""Children of `launch.run`: streamed, ended with their parent, and loud when they fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ec2face_core import launch
from ec2face_core.config import ROOT


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


def test_a_failure_carries_the_last_lines(module, capsys):
    name, env = module("fails", "for i in range(50): print('line', i)\nraise SystemExit(2)\n")
    with pytest.raises(subprocess.CalledProcessError) as error:
        launch.run(name, env=env)
    assert error.value.returncode == 2
    assert "line 49" in str(error.value) and "line 5\n" not in str(error.value)
    assert "line 5\n" in capsys.readouterr().out


def test_command_lines():
    assert launch.command_line("m", "-a", num_processes=1) == [sys.executable, "-m", "m", "-a"]
    many = launch.command_line("m", "-a", num_processes=3)
    assert many[-3:] == ["-m", "m", "-a"]
    assert many[many.index("--num_processes") + 1] == "3" and "--cpu" not in many
    with pytest.raises(ValueError, match="at least 1"):
        launch.command_line("m", num_processes=0)


@pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent on Linux only")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_child_ends_with_its_parent(module, tmp_path, monkeypatch, how):
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
    os.kill(parent.pid, how)
    parent.join(60)
    wait_for(lambda: not child.exists() or "\nState:\tZ" in (child / "status").read_text())


@pytest.mark.slow
def test_two_processes_are_two_ranks(module, capfd):
    name, env = module(
        "ranks",
        "import torch\n"
        "from accelerate import Accelerator\n"
        "a = Accelerator(cpu=True)\n"
        "total = a.reduce(torch.tensor([1.0 + a.process_index]))\n"
        "print(f'rank {a.process_index} of {a.num_processes} sum {total.item()}\\n', end='')\n",
    )
    launch.run(name, num_processes=2, env=env)
    out = capfd.readouterr().out
    assert "rank 0 of 2 sum 3.0" in out and "rank 1 of 2 sum 3.0" in out


def run_interruptibly(*args):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    launch.run(*args)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
