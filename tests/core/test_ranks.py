"""One training per folder; ranks that see different things do not begin; nothing outlives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import wait_for_end

from ec2face_core.config import ConfigError, load_profile
from ec2face_core.guards.ranks import agree, locked, make_accelerator
from ec2face_core.guards.signals import ENDING, on_signals
from ec2face_core.io.paths import ROOT


def test_a_second_training_is_refused_with_the_name_of_the_first(tmp_path):
    holder = f"process {os.getpid()} on "
    with locked(tmp_path / "run"):
        with pytest.raises(ConfigError, match=holder), locked(tmp_path / "run"):
            pytest.fail("two trainings")
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_training_is_lifted(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ec2face_core.guards.ranks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {child.pid} on "), locked(tmp_path):
        pytest.fail("two trainings")
    child.kill()
    child.wait()
    with locked(tmp_path):
        pass


def test_ranks_that_see_different_checkpoints_do_not_begin(monkeypatch):
    views = [{"step": 4, "sha256": "a"}, {"step": 2, "sha256": "b"}]
    ranks = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda _: views)
    with pytest.raises(ConfigError, match=r"rank 0 \{'step': 4.*rank 1 \{'step': 2"):
        agree(ranks, views[1], "checkpoints")
    views[1] = dict(views[0])
    agree(ranks, views[0], "checkpoints")
    agree(SimpleNamespace(num_processes=1), {}, "nothing to compare")


CHILD = (
    "import time; from ec2face_core.guards.parent import end_with_parent\n"
    "end_with_parent(); print('up', flush=True); time.sleep(60)"
)


RANK = (
    "from torch.distributed import TCPStore\n"
    "from ec2face_core.guards.parent import end_with_parent\n"
    "end_with_parent()\n"
    "store = TCPStore('localhost', 0, is_master=True, wait_for_workers=False)\n"
    "print('up', flush=True); store.wait(['what no other rank writes'])"
)


@pytest.mark.slow
def test_a_rank_that_waits_for_another_ends_at_ctrl_c():
    """Python would call its handler after the wait, which takes minutes."""
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "1"},
    )  # fmt: skip
    try:
        assert rank.stdout.readline() == "up\n"
        time.sleep(0.5)
        rank.send_signal(signal.SIGINT)
        assert rank.wait(5) == -signal.SIGINT
    finally:
        rank.kill()


def test_signals_get_their_former_handlers_back():
    before = [signal.getsignal(sent) for sent in ENDING]
    heard = []
    with on_signals(lambda sent, _: heard.append(sent)):
        for sent in ENDING:
            os.kill(os.getpid(), sent)
        with on_signals(signal.SIG_DFL):
            assert [signal.getsignal(sent) for sent in ENDING] == [signal.SIG_DFL] * 2
    assert heard == list(ENDING) and [signal.getsignal(sent) for sent in ENDING] == before


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "EC2FACE_END_WITH_PARENT"])
def test_a_child_ends_with_a_killed_parent(tmp_path, variable):
    """As a rank under torchrun, and as a process that we launched."""
    parent = (
        "import os, subprocess, sys, time\n"
        f"os.environ[{variable!r}] = '1'\n"
        f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    os.kill(pid, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_end(pid)


def test_a_mac_is_told_that_its_gpu_is_not_used(monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.warns(UserWarning, match="does not use this Mac's GPU"):
        make_accelerator(load_profile("mini").trainer)
