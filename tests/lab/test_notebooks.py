"""All notebooks through the runner in the smoke profile: they run, and keep what they promise."""

from __future__ import annotations

import json

import pytest

from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT
from ec2face_lab.__main__ import main

FIGURES = [*(f"fig{i}" for i in range(1, 9)), "newer"]
TABLES = [*(f"table{i}" for i in range(1, 5)), "table1_lead", "table2_lead"]
PROMISED = [f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "pdf", "json")]
PROMISED += [f"{name}.{suffix}" for name in TABLES for suffix in ("csv", "md", "tex", "json")]


@pytest.mark.slow
def test_all_notebooks_run_in_the_smoke_profile_and_keep_every_figure_and_table(capsys):
    code = main(["reproduce", "--profile", "smoke", "--keep-going"])
    report = capsys.readouterr().out
    assert code == 0, report

    folder = load_profile("smoke").figure_dir
    missing = [f for f in PROMISED if not (folder / f).exists() or not (folder / f).stat().st_size]
    assert not missing, missing
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    for name in FIGURES + TABLES:
        record = json.loads((folder / f"{name}.json").read_text())
        assert record["profile"] == "smoke" and record["notebook"] in notebooks, name
        assert "absent" not in record["inputs"].values(), name

    assert main(["reproduce", "--profile", "smoke"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:2].isdigit()]
    lines = [line for line in lines if line.split()[0] in notebooks]
    assert len(lines) == len(notebooks)
    assert all("up to date" in line for line in lines), lines
