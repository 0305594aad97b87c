"""Saved figures and tables: byte-stable, with provenance, rendered from the CSV."""

from __future__ import annotations

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from figure_checks import some_rows
from matplotlib.figure import Figure
from PIL import Image

from ec2face_core.config import load_profile
from ec2face_lab.plots import save
from ec2face_lab.plots.render_tables import render_markdown


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


def test_figure_files_are_the_same_bytes_every_time(config):
    path = save.save_figure(a_figure(), "fig", config, seconds=1.0)
    first = {p.suffix: p.read_bytes() for p in config.figure_dir.iterdir()}
    assert set(first) == {".png", ".pdf", ".json"} and path.suffix == ".png"
    save.save_figure(a_figure(), "fig", config, seconds=9.0)
    second = {p.suffix: p.read_bytes() for p in config.figure_dir.iterdir()}
    assert first[".png"] == second[".png"] and first[".pdf"] == second[".pdf"]
    assert matplotlib.rcParams["pdf.fonttype"] == 3  # the caller's setting is left alone


def test_png_says_what_it_is(config):
    text = Image.open(save.save_figure(a_figure(), "fig", config)).text
    assert text["Title"] == "fig" and config.digest() in text["Source"]
    assert "synthetic" in text["Disclaimer"] and config.backbone.path in text["Disclaimer"]


def test_provenance_is_saved_beside_the_figure(config):
    save.save_figure(a_figure(), "fig", config, seconds=1.234, faces=3)
    record = json.loads((config.figure_dir / "fig.json").read_text())
    assert record["config_hash"] == config.digest() and record["seconds"] == 1.23
    assert record["parameters"] == {"faces": 3}


def test_the_smallest_text_is_recorded(config):
    fig = a_figure()
    fig.axes[0].set_title("a title", fontsize=5.5)
    fig.axes[0].text(0, 0, "hidden", fontsize=2, visible=False)
    fig.axes[0].text(0, 0, " ", fontsize=1)
    record = json.loads(save.save_figure(fig, "f", config).with_suffix(".json").read_text())
    assert (record["smallest_text_pt"], record["width_in"]) == (5.5, 2)


def test_csv_is_the_truth_and_holds_the_paper_too(config):
    path = save.save_table(some_rows(), "table1", config, caption="LPIPS: random trunk.")
    stored = save.read_rows(path.with_suffix(".csv"))
    assert list(stored.columns) == list(save.COLUMNS)
    ours = stored[stored["source"] == "ours"]
    assert len(ours) == 5 and set(ours["table"]) == {"table1"}
    assert ours["value"].tolist() == [71.234, 76.5, 0.31415, 90.0, 55.5]
    pd.testing.assert_frame_equal(
        stored[stored["source"] == "paper"].reset_index(drop=True), save.paper_table(1)
    )
    shown = save.headline(stored, config)
    assert render_markdown(shown, "LPIPS: random trunk.") == path.read_text()
    before = {p.name: p.read_bytes() for p in config.figure_dir.iterdir()}
    assert set(before) == {"table1.csv", "table1.md", "table1.tex", "table1.json"}
    save.save_table(some_rows(), "table1", config, caption="LPIPS: random trunk.")
    assert before == {p.name: p.read_bytes() for p in config.figure_dir.iterdir()}


def test_a_random_lpips_trunk_stays_in_the_csv_alone(config):
    path = save.save_table(some_rows(), "table1", config)
    first, paper = path.read_text().split("The paper's numbers")
    assert "LPIPS ↓" not in first and "LPIPS ↓" in paper
    assert (save.read_rows(path.with_suffix(".csv"))["metric"] == "LPIPS").sum() > 1
    trained = config.replace(evaluation={"lpips": "alex"})
    text = save.save_table(some_rows(), "table1", trained).read_text()
    assert "| 0.31 |" in text.split("The paper's numbers")[0]


def test_files_without_the_newer_columns_can_be_read(config, tmp_path):
    old = save.read_rows(save.save_table(some_rows(), "table1", config).with_suffix(".csv"))
    old.drop(columns=["joint_low", "joint_high", "t_low", "t_high", "p_holm"]).to_csv(
        tmp_path / "old.csv", index=False
    )
    pd.testing.assert_frame_equal(save.read_rows(tmp_path / "old.csv"), old)


def test_rows_that_make_no_table_are_refused(config):
    with pytest.raises(save.ResultsError, match="unknown columns \\['score'\\]"):
        save.save_table(some_rows(score=1), "table1", config)
    with pytest.raises(save.ResultsError, match="more than one row for a cell"):
        save.save_table(some_rows(metric="OAA", critic="guiding"), "table1", config)
    assert not config.figure_dir.exists()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", "", ".x", "a\0b"])
def test_names_stay_in_the_folder_of_figures(config, name):
    with pytest.raises(save.ResultsError, match="no name of a figure or table"):
        save.save_figure(a_figure(), name, config)
    with pytest.raises(save.ResultsError, match="no name of a figure or table"):
        save.save_table(some_rows(), name, config)
