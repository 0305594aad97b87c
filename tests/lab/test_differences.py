"""Figures of differences: every one legible, the noise band, what is left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figure_checks import assert_legible, texts
from matplotlib.figure import Figure

from ec2face_lab.plots import differences
from ec2face_lab.plots.style import BLUE, SKY

METRICS = ("RFA", "OAA", "Text")


def rows(**changes) -> pd.DataFrame:
    """Long rows of two differences."""
    cell = {"value": 1.0, "ci_low": 0.5, "ci_high": 1.7, "n": 7} | changes
    methods = ("mask - none", "text - none")
    return pd.DataFrame([{"method": a, "metric": m} | cell for a in methods for m in METRICS])


def of_seeds() -> pd.DataFrame:
    """The same of each of two seeds alone."""
    method = rows()["method"]
    return pd.concat([rows().assign(method=method + f", seed {seed}") for seed in (42, 43)])


def fairness() -> Figure:
    once = pd.concat([rows()[:3].assign(method=f"{name}, once") for name in "AB"])
    conditions = {"once": ("once", "o", BLUE), "half": ("half", "<", SKY)}
    return differences.fairness_figure(once, {"first": "A", "second": "B"}, conditions)


def guide_gain() -> Figure:
    both = pd.concat([rows(critic=role) for role in ("independent", "guiding")])
    return differences.guide_gain_figure(both, {"mask - none": "mask"})


ALL = {
    "differences": lambda: differences.difference_figure(rows(), of_seeds(), rows()[:2]),
    "sweep": lambda: differences.sweep_figure(
        rows(), of_seeds(), {"mask - none": "γ = 5", "text - none": "β ≡ 1"}, "γ = 10"
    ),
    "length": lambda: differences.length_figure(
        rows(), {"with": [(300, "mask - none"), (1200, "text - none")]}, "steps", METRICS
    ),
    "fairness": fairness,
    "guide gain": guide_gain,
}


@pytest.mark.parametrize("name", ALL)
def test_every_figure_is_legible(name):
    assert_legible(ALL[name])


def test_the_noise_band_is_the_range_of_other_seeds_with_0():
    noise = pd.DataFrame({"metric": ["RFA", "RFA", "OAA"], "value": [1.5, 0.5, -2.0]})
    assert differences.noise_band(noise, "RFA") == (0.0, 1.5)
    assert differences.noise_band(noise, "OAA") == (-2.0, 0.0)


def test_conditions_without_rows_are_left_out():
    shown = texts(fairness())
    assert "once" in shown and "half" not in shown and "RFA (n = 7 faces)" in shown


def test_guides_and_evaluators_have_a_difference_each():
    fig = guide_gain()
    intervals, dots = fig.axes[0].collections
    expected = rows()[lambda r: (r["method"] == "mask - none") & (r["metric"] == "Text")].iloc[0]
    assert np.allclose(dots.get_offsets()[:, 0], [expected["value"]] * 2)
    ends = [expected["ci_low"], expected["ci_high"]]
    assert np.allclose([segment[:, 0] for segment in intervals.get_segments()], [ends] * 2)
    assert {"guide of training", "independent evaluator"} <= set(texts(fig))
