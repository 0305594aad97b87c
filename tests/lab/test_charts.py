"""Charts: values, intervals and labels are those of the data; every chart legible."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from figure_checks import assert_legible, images, texts

from ec2face_core.attributes import CLASSES, NUM_CLASSES
from ec2face_core.losses import beta
from ec2face_lab.plots import charts

TIMES = [0.1, 0.5, 0.9]


def curves() -> pd.DataFrame:
    rows = [
        {"t": t, "metric": m, "value": 1 - t, "ci_low": 0.9 - t, "ci_high": 1.1 - t}
        for m in ("PSNR (dB)", "LPIPS")
        for t in TIMES
    ]
    return pd.DataFrame(rows)


def class_rows() -> pd.DataFrame:
    rows = [
        {"method": m, "metric": c, "value": 50.0 + k, "ci_low": 45.0, "ci_high": 90.0, "n": 10}
        for k, m in enumerate(("without_ltal", "with_ltal", "real"))
        for c in CLASSES
    ]
    return pd.DataFrame(rows)


def metrics() -> pd.DataFrame:
    step = np.arange(20)
    return pd.DataFrame({"step": step, "total": 1.0 / (step + 1), "flow": 0.5, "mask": 0.1})


def frequency() -> pd.DataFrame:
    share = np.geomspace(40, 0.01, NUM_CLASSES)
    return pd.DataFrame({"class": CLASSES, "pixel_share": share, "image_share": 50.0})


ALL = {
    "reliability": lambda: charts.reliability_figure(images(2, 3), TIMES, curves()),
    "beta": lambda: charts.beta_curves([(10, 0.4), (5, 0.4)], curves()),
    "training": lambda: charts.training_curves({"none": metrics(), "both": metrics()}),
    "long tail": lambda: charts.long_tail_distribution(frequency()),
    "class accuracy": lambda: charts.class_accuracy(
        class_rows(), {"without_ltal": "without LTAL", "with_ltal": "with LTAL"}
    ),
    "class accuracy with details": lambda: charts.class_accuracy(
        class_rows(),
        {"without_ltal": "without LTAL", "with_ltal": "with LTAL"},
        details={"mask": [np.zeros((8, 8, 3))] * 3, "with LTAL": [np.ones((8, 8, 3))] * 3},
    ),
    "class table": lambda: charts.class_table(class_rows(), {"with_ltal": "with", "real": "real"}),
}


@pytest.mark.parametrize("name", ALL)
def test_every_chart_is_legible(name):
    assert_legible(ALL[name])


def test_reliability_shows_estimates_bands_and_beta():
    fig = ALL["reliability"]()
    shown = [ax for sub in fig.subfigs for ax in sub.axes if ax.images]
    assert len(shown) == 2 * 3
    charts = [ax for ax in fig.subfigs[1].axes if ax.lines]
    bands = [patch for ax in charts for patch in ax.patches]
    assert len(bands) == 2  # one for each metric
    ends = bands[0].get_path().vertices[:, 1]
    assert ends.min() == pytest.approx(0) and ends.max() == pytest.approx(1)
    (line,) = charts[-1].lines
    t = torch.tensor(line.get_xdata())
    assert np.allclose(line.get_ydata(), beta(t).numpy())
    assert any("t_c$ = 0.4" in text for text in texts(fig))


def test_reliability_has_the_axes_of_another_figure():
    wider = curves().assign(value=curves()["value"] * 3)
    plots = [
        charts.reliability_figure(images(1, 3), TIMES, first, beside=second)
        for first, second in ((curves(), wider), (wider, curves()))
    ]
    limits = [[ax.get_ylim() for ax in fig.subfigs[1].axes] for fig in plots]
    assert limits[0] == limits[1]


def test_training_curves_read_the_file_and_smooth(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in metrics().to_dict("records")))
    fig = charts.training_curves({"both": path}, smoothing=0.5)
    assert [ax.get_title().split(" ")[0] for ax in fig.axes] == ["total", "flow", "mask"]
    logged, mean = (line.get_ydata() for line in fig.axes[0].lines)
    assert np.allclose(logged, metrics()["total"])
    assert mean[0] == logged[0] and mean[1] == pytest.approx((logged[1] + logged[0] / 2) / 1.5)


def test_long_tail_bars_are_sorted_and_coloured_by_group():
    top, bottom = ALL["long tail"]().axes
    bars = sorted((bar for bar in top.patches if bar.get_height()), key=lambda bar: bar.get_x())
    assert np.allclose([bar.get_height() for bar in bars], frequency()["pixel_share"])
    names = [label.get_text() for label in bottom.get_xticklabels()]
    assert names[0] == "background" and {"earring", "necklace", "glasses"} <= set(names)
    colours = {n: bar.get_facecolor() for n, bar in zip(names, bars, strict=True)}
    assert colours["earring"] == colours["necklace"] != colours["cloth"]


def test_class_accuracy_shows_values_intervals_and_the_ceiling():
    fig = ALL["class accuracy"]()
    (ax,) = fig.axes
    heights = [bar.get_height() for bar in ax.patches]
    assert heights.count(50.0) == heights.count(51.0) == NUM_CLASSES
    intervals, ceilings = ax.collections
    assert np.allclose([segment[:, 1] for segment in intervals.get_segments()], [45, 90])
    assert np.allclose([segment[:, 1] for segment in ceilings.get_segments()], 52)
    assert "ceiling: real images" in texts(fig)


def test_class_table_prints_every_value_and_the_support():
    shown = texts(ALL["class table"]())
    assert shown.count("51.0") == NUM_CLASSES and shown.count("52.0") == NUM_CLASSES
    assert "earring  (n = 10)" in shown
    rare = class_rows()[lambda rows: rows["metric"] != "neck_l"]
    assert not any("necklace" in t for t in texts(charts.class_table(rare, {"real": "real"})))
