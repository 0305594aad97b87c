"""`benchmarks/gpu/step.py` on tiny networks: its rows, and that the same command goes on."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from ec2face_core.io.paths import ROOT
from ec2face_lab import launch


@pytest.mark.slow
def test_rows_are_measured_once(tmp_path):
    script = ROOT / "benchmarks" / "gpu" / "step.py"
    command = [sys.executable, str(script), "--size", "tiny", "--device", "cpu", "--repeats", "1"]
    command += ["--out", str(tmp_path), "--seconds", "25"]
    path = f"{ROOT / 'benchmarks'}:{ROOT}"
    tables = []
    for _ in range(2):
        subprocess.run(command, check=True, env=launch.child_environment() | {"PYTHONPATH": path})
        with open(tmp_path / "step-tiny.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    first, second = tables
    step = first[0]
    assert (step["what"], step["attention"], step["batch"]) == ("training step", "joint", "2")
    assert float(step["ms_a_sample"]) == pytest.approx(float(step["ms"]) / 2, rel=1e-3)
    assert 0.001 < float(step["TF_a_sample"]) < 0.01
    assert second[: len(first)] == first
