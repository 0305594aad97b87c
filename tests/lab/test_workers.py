"""Worker processes: results in order, and none outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import wait_for_end

from ec2face_core.io.paths import ROOT
from ec2face_lab.workers import in_processes


def test_results_come_in_order():
    assert list(in_processes(abs, range(-20, 20))) == [abs(x) for x in range(-20, 20)]
    assert list(in_processes(abs, [])) == []


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import os, time\n"
        "from ec2face_lab.workers import in_processes\n"
        "def work(x):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "list(in_processes(work, range(32)))\n"
    )
    path = tmp_path / "work.py"
    path.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    wait_for_end(pid)
