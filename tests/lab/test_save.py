"""Figures and tables as they are kept: byte-stable, with provenance, rendered from the CSV."""

from __future__ import annotations

import json
import re
import subprocess

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ec2face_core.config import ROOT, load_profile
from ec2face_lab.plots import save as results


@pytest.fixture
def config(tmp_path):
    return load_profile("mini", profile=str(tmp_path / "run"))


def a_figure() -> Figure:
    fig = Figure(figsize=(2, 1.5), layout="constrained")
    ax = fig.subplots()
    ax.plot([0, 1, 2], [0, 1, 4], label="β")
    ax.imshow(np.arange(9).reshape(3, 3), extent=(0, 1, 0, 1))
    ax.legend()
    return fig


def some_rows(**changes) -> pd.DataFrame:
    cell = {"method": "EC2Face", "dataset": "faces", "n": 300, "seeds": "42"}
    rows = [
        {**cell, "metric": "OAA", "critic": "independent", "value": 71.234, "ci_low": 70.5,
         "ci_high": 72.0},
        {**cell, "metric": "OAA", "critic": "guiding", "value": 76.5},
        {**cell, "metric": "LPIPS", "value": 0.31415},
        {**cell, "metric": "OAA", "critic": "independent", "value": 90.0, "method": "real"},
        {**cell, "metric": "ear_r", "critic": "independent", "value": 55.5, "n": 80},
    ]  # fmt: skip
    return pd.DataFrame([row | changes for row in rows])


def cells(markdown: str, start: str) -> list[str]:
    """The cells of the first Markdown line that starts with a text."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------------------------- figures


def test_figure_files_are_the_same_bytes_every_time(config):
    path = results.save_figure(a_figure(), "fig", config, seconds=1.0)
    first = {p.suffix: p.read_bytes() for p in config.figure_dir.iterdir()}
    assert set(first) == {".png", ".pdf", ".json"} and path.suffix == ".png"
    results.save_figure(a_figure(), "fig", config, seconds=9.0)
    second = {p.suffix: p.read_bytes() for p in config.figure_dir.iterdir()}
    assert first[".png"] == second[".png"] and first[".pdf"] == second[".pdf"]
    assert matplotlib.rcParams["pdf.fonttype"] == 3  # the caller's setting is left alone


def test_png_says_what_it_is(config):
    text = Image.open(results.save_figure(a_figure(), "fig", config)).text
    assert text["Title"] == "fig" and config.digest() in text["Source"]
    assert "synthetic" in text["Disclaimer"] and config.backbone.path in text["Disclaimer"]


def test_provenance_names_everything_that_made_the_result(config, monkeypatch):
    monkeypatch.setenv("EC2FACE_NOTEBOOK", "05_quantitative")
    table = ROOT / "data" / "paper" / "table1.csv"
    results.save_figure(
        a_figure(), "fig", config, seconds=1.234, inputs=[table, "no/such/file"], faces=3
    )
    record = json.loads((config.figure_dir / "fig.json").read_text())
    assert set(record) == {
        "notebook", "profile", "seeds", "parameters", "commit", "dirty", "config_hash", "inputs",
        "packages", "device", "seconds",
    }  # fmt: skip
    assert record["notebook"] == "05_quantitative" and record["parameters"] == {"faces": 3}
    assert record["config_hash"] == config.digest() and record["seconds"] == 1.23
    assert record["inputs"]["data/paper/table1.csv"] == results.path_digest(table)
    assert record["inputs"]["no/such/file"] == "absent"
    assert {"torch", "diffusers", "numpy", "python"} <= set(record["packages"])


def test_only_changes_outside_figures_make_a_tree_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results._git_state() == (None, None)  # no repository: unknown, not clean

    def git(*command):
        user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *user, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "fig.png").write_bytes(b"new")
    commit, dirty = results._git_state()
    assert re.fullmatch(r"[0-9a-f]{40}", commit) and dirty is False
    (tmp_path / "code.py").write_text("x = 2\n")
    assert results._git_state()[1] is True


def test_path_digest_follows_content_and_names(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "x.bin").write_bytes(b"1")
    assert results.path_digest(a) == results.path_digest(b)
    (b / "x.bin").write_bytes(b"2")
    assert results.path_digest(a) != results.path_digest(b)
    (b / "x.bin").rename(b / "y.bin")
    (b / "y.bin").write_bytes(b"1")
    assert results.path_digest(a) != results.path_digest(b)
    assert results.path_digest(tmp_path / "c") == "absent"


# ----------------------------------------------------------------------------------- tables


def test_csv_is_the_truth_and_holds_the_paper_too(config):
    path = results.save_table(some_rows(), "table1", config, caption="LPIPS: random trunk.")
    stored = results.read_rows(path.with_suffix(".csv"))
    assert list(stored.columns) == list(results.COLUMNS)
    ours = stored[stored["source"] == "ours"]
    assert len(ours) == 5 and set(ours["table"]) == {"table1"}
    assert ours["value"].tolist() == [71.234, 76.5, 0.31415, 90.0, 55.5]
    pd.testing.assert_frame_equal(
        stored[stored["source"] == "paper"].reset_index(drop=True), results.paper_table(1)
    )
    assert results.render_markdown(stored, "LPIPS: random trunk.") == path.read_text()
    before = {p.name: p.read_bytes() for p in config.figure_dir.iterdir()}
    assert set(before) == {"table1.csv", "table1.md", "table1.tex", "table1.json"}
    results.save_table(some_rows(), "table1", config, caption="LPIPS: random trunk.")
    assert before == {p.name: p.read_bytes() for p in config.figure_dir.iterdir()}


def test_markdown_puts_the_paper_beside_ours(config):
    markdown = results.save_table(some_rows(), "table1", config, caption="Substitutes.").read_text()
    assert markdown.startswith("**Table 1.** Substitutes.")
    header = cells(markdown, "Method")
    mine = cells(markdown, "EC²Face")
    row = dict(zip(header, mine, strict=True))
    assert row["Critic"] == "independent" and row["n"] == "300"
    assert row["OAA (%) ↑"] == "71.23 [70.50, 72.00]" and row["paper: OAA"] == "88.64"
    assert row["LPIPS ↓"] == "0.314" and row["HFA (%) ↑"] == "–" and row["paper: NIQE"] == "3.55"
    other = dict(zip(header, cells(markdown, " | guiding"), strict=True))
    assert other["OAA (%) ↑"] == "76.50" and other["paper: OAA"] == "" and other["LPIPS ↓"] == "–"
    rival = dict(zip(header, cells(markdown, "TediGAN"), strict=True))
    assert rival["OAA (%) ↑"] == "–" and rival["paper: OAA"] == "66.58"
    assert cells(markdown, "earring") == ["earring", "RFA", "80", "55.50"]
    order = [markdown.index(name) for name in ("TediGAN", "MM2Latent", "EC²Face", "real images")]
    assert order == sorted(order)


def test_latex_is_escaped_and_complete(config):
    path = results.save_table(some_rows(), "table4", config, caption="100 % of a_b.")
    latex = path.with_suffix(".tex").read_text()
    assert r"100 \% of a\_b." in latex and r"\label{tab:table4}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert not re.search(r"(?<!\\)[%_]", latex) and not set("²↑↓–") & set(latex)
    for block in re.findall(r"\\toprule\n(.*?)\\bottomrule", latex, re.S):
        counts = {line.count("&") for line in block.splitlines() if line.endswith(r"\\")}
        assert len(counts) == 1


def test_the_misprint_of_table_4_is_flagged(config):
    markdown = results.save_table(some_rows(method="none", metric="OAA").head(1), "table4", config)
    assert "61.62" in markdown.read_text() and "require 61.12" in markdown.read_text()


def test_other_tables_have_no_paper_columns(config):
    text = results.save_table(some_rows(), "ablation_differences", config).read_text()
    assert text.startswith("**Ablation differences.**") and "paper" not in text


def test_rows_that_make_no_table_are_refused(config):
    with pytest.raises(results.ResultsError, match="unknown columns \\['score'\\]"):
        results.save_table(some_rows(score=1), "table1", config)
    with pytest.raises(results.ResultsError, match="more than one row for a cell"):
        results.save_table(some_rows(metric="OAA", critic="guiding"), "table1", config)
    assert not config.figure_dir.exists()
