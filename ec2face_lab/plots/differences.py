"""Figures of differences: the effect of a loss, a setting, a guide or an altered mask.

Points are means with 95 % intervals over faces. A grey band is the range of other training seeds;
a setting counts only if its difference lies outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import BLUE, CYCLE, GREY, ORANGE, SKY, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


SERIES = (SKY, *CYCLE[:-1])
BLACK = "0.15"


@styled
def difference_figure(
    rows: DataFrame,
    seeds: DataFrame,
    paper: DataFrame,
    metrics: Sequence[str] = ("RFA", "OAA", "Text"),
) -> Figure:
    """Differences of methods: the mean over seeds with its 95 % interval, each seed, the paper.

    Args:
        rows: long rows of one perception model; a method is a difference such as `mask - none`.
        seeds: the same for each seed alone, methods `mask - none, seed 43`.
        paper: columns method, metric, value.
        metrics: one panel each; values are in points.
    """
    labels = list(dict.fromkeys(rows["method"]))
    fig = new_figure(9, 0.9 + 0.45 * len(labels))
    panels = fig.subplots(1, len(metrics), sharey=True)
    y = np.arange(len(labels))
    for ax, metric in zip(panels, metrics, strict=True):
        ax.axvline(0, color="0.4", lw=1)
        _dots(
            ax,
            rows,
            metric,
            labels,
            y,
            color=BLUE,
            label="ours, 95 % interval over faces",
            ms=6,
            lw=2,
        )
        each = seeds[seeds["metric"] == metric]
        rise = [labels.index(method.rpartition(", seed ")[0]) - 0.22 for method in each["method"]]
        ax.plot(each["value"], rise, "o", mfc="none", mec=SKY, ms=4.5, label="each training seed")
        printed = paper[paper["metric"] == metric]
        rise = [labels.index(method) + 0.22 for method in printed["method"]]
        ax.plot(printed["value"], rise, "D", color=ORANGE, ms=5, label="paper")
        ax.set(title=metric, xlabel="difference (points)")
        ax.grid(axis="x")
    return _labelled(fig, labels, 3)


def noise_band(noise: DataFrame, metric: str) -> tuple[float, float]:
    """Smallest and largest difference between seeds of the same training, including 0."""
    values = [0.0, *noise[noise["metric"] == metric]["value"]]
    return min(values), max(values)


@styled
def sweep_figure(
    rows: DataFrame,
    noise: DataFrame,
    labels: Mapping[str, str],
    reference: str,
    metrics: Sequence[str] = ("RFA", "OAA", "Text"),
) -> Figure:
    """Paired differences of a sweep's points to its reference, one panel a metric.

    Args:
        rows: long rows of one perception model, method = point; differences in points.
        noise: the same for other training seeds of the reference; their range is the grey band.
        labels: point -> its label, from top to bottom.
        reference: label of the point that is subtracted.
        metrics: one panel each.
    """
    names = list(labels)
    fig = new_figure(9, 1.0 + 0.32 * len(names))
    panels = fig.subplots(1, len(metrics), sharey=True)
    y = np.arange(len(names))
    for ax, metric in zip(panels, metrics, strict=True):
        ax.axvspan(*noise_band(noise, metric), color=GREY, alpha=0.25, lw=0,
                   label="range of other training seeds")  # fmt: skip
        _dots(
            ax, rows, metric, names, y, color=BLUE, label="this setting, 95 % interval over faces"
        )
        ax.axvline(0, color="0.4", lw=1, label=f"reference: {reference}")
        ax.set(title=metric, xlabel="difference (points)")
        ax.grid(axis="x")
    return _labelled(fig, list(labels.values()), 3)


@styled
def length_figure(
    rows: DataFrame,
    series: Mapping[str, Sequence[tuple[float, str]]],
    xlabel: str,
    metrics: Sequence[str] = ("RFA", "OAA", "HFA"),
) -> Figure:
    """Metrics against a number, a line with its 95 % band for each series.

    Args:
        rows: long rows of one perception model, method = point.
        series: legend text -> (x, point) of its points; at most seven.
        xlabel: label of the number.
        metrics: one panel each.
    """
    fig = new_figure(9, 2.9 if len(series) < 4 else 3.4)
    for ax, metric in zip(fig.subplots(1, len(metrics)), metrics, strict=True):
        scores = rows[rows["metric"] == metric].set_index("method")
        for (label, points), colour in zip(series.items(), SERIES, strict=False):
            x, names = zip(*sorted(points), strict=True)
            line = scores.reindex(list(names))
            ax.fill_between(x, line["ci_low"].to_numpy(float), line["ci_high"].to_numpy(float),
                            color=colour, alpha=0.18, lw=0)  # fmt: skip
            ax.plot(x, line["value"].to_numpy(float), "o-", color=colour, label=label, ms=4)
        ax.set_xscale("log")
        ax.set_xticks(sorted({x for points in series.values() for x, _ in points}))
        ax.get_xaxis().set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.set(title=metric, xlabel=xlabel)
        ax.grid(axis="y")
    fig.axes[0].set_ylabel("accuracy (%)")
    handles, texts = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, texts, loc="outside upper center", ncols=min(len(texts), 7))
    return fig


@styled
def fairness_figure(
    rows: DataFrame,
    names: Mapping[str, str],
    conditions: Mapping[str, tuple[str, str, str]],
    metrics: Sequence[str] = ("RFA", "OAA", "Text"),
) -> Figure:
    """Paired differences to comparison systems, a marker for each condition of the comparison.

    Args:
        rows: long rows of paired differences, one perception model; a method is
            `<difference>, <condition>`.
        names: system -> its difference, from top to bottom.
        conditions: how the systems were trained or evaluated: condition -> (legend text, marker,
            colour); those without rows are left out.
        metrics: one panel each.
    """
    methods = set(rows["method"])
    marks = {
        condition: mark
        for condition, mark in conditions.items()
        if any(f"{name}, {condition}" in methods for name in names.values())
    }
    fig = new_figure(9, 1.1 + 0.14 * (len(marks) + 1) * len(names))
    rise = np.linspace(-0.34, 0.34, len(marks)) if len(marks) > 1 else [0.0]
    for ax, metric in zip(fig.subplots(1, len(metrics), sharey=True), metrics, strict=True):
        ax.axvline(0, color=BLACK, lw=1)
        for dy, (condition, (label, marker, colour)) in zip(rise, marks.items(), strict=True):
            points = [f"{name}, {condition}" for name in names.values()]
            y = np.arange(len(names)) + dy
            style = {"color": colour, "label": label, "fmt": marker, "lw": 1.2}
            _dots(ax, rows, metric, points, y, **style)
        for edge in range(1, len(names)):
            ax.axhline(edge - 0.5, color="0.9", lw=0.7)
        faces = rows[rows["metric"] == metric]["n"].max()
        ax.set(title=f"{metric} (n = {faces:,.0f} faces)", xlabel="EC²Face minus system (points)")
        ax.grid(axis="x")
    return _labelled(fig, list(names), 3)


@styled
def guide_gain_figure(
    rows: DataFrame,
    labels: Mapping[str, str],
    ceiling: str = "real",
    metrics: Sequence[str] = ("Text", "OAA", "RFA"),
) -> Figure:
    """Scores by the guides of training beside those by the independent evaluators.

    Each score is a share of the same model's score of the real images, which makes models with
    different scales comparable. A guide's dot to the right of the evaluator's dot means overfitting
    to the guide, unless methods that were never guided show the same.

    Args:
        rows: long rows of both perception models, including the method `ceiling`.
        labels: method -> its label, from top to bottom.
        ceiling: the method of the real images.
        metrics: one panel each.
    """
    names = list(labels)
    fig = new_figure(9, 1.0 + 0.38 * len(names))
    panels = fig.subplots(1, len(metrics), sharey=True)
    y = np.arange(len(names))
    roles = {"independent": (BLUE, -0.13), "guiding": (ORANGE, 0.13)}
    for ax, metric in zip(panels, metrics, strict=True):
        for role, (colour, shift) in roles.items():
            scores = rows[(rows["critic"] == role) & (rows["metric"] == metric)]
            top = scores[scores["method"] == ceiling]["value"].iloc[0] / 100
            share = scores.assign(**{k: scores[k] / top for k in ("value", "ci_low", "ci_high")})
            _dots(ax, share, metric, names, y + shift, color=colour, label=f"{role} critic")
        ax.set(title=metric, xlabel="% of the real images' score")
        ax.grid(axis="x")
    return _labelled(fig, list(labels.values()), 2)


def _labelled(fig: Figure, labels: Sequence[str], columns: int) -> Figure:
    """Label the rows from top to bottom, and add one legend for all panels."""
    first = fig.axes[0]
    first.set_yticks(range(len(labels)), labels)
    first.set_ylim(len(labels) - 0.5, -0.5)
    handles, names = first.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=columns)
    return fig


def _dots(
    ax: Axes,
    rows: DataFrame,
    metric: str,
    names: list[str],
    y: np.ndarray,
    **style: Any,
) -> None:
    """Plot the value and the interval of each method at a height; `style` is of `errorbar`."""
    scores = rows[rows["metric"] == metric].set_index("method").reindex(names)
    below = scores["value"] - scores["ci_low"]
    above = scores["ci_high"] - scores["value"]
    errors = np.clip(np.stack([below, above]), 0, None)
    ax.errorbar(scores["value"], y, xerr=errors, **{"fmt": "o", "ms": 5, "lw": 1.8} | style)
