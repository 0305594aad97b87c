"""Figures of differences: the effect of a loss, a setting, a guide or an altered mask.

Points are means with 95 % intervals, over faces where a method has one training; the legend says
so. A grey band is the range of other training seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import seaborn.objects as so

from .style import BLUE, CYCLE, GREY, ORANGE, SKY, chart, new_figure, outside_legend, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


SERIES = [SKY, *CYCLE[:-1]]
BLACK = "0.15"


@styled
def difference_figure(
    rows: DataFrame,
    seeds: DataFrame,
    paper: DataFrame,
    metrics: Sequence[str] = ("RFA", "OAA", "Text"),
    over: str = "faces",
) -> Figure:
    """Differences of methods: the mean over seeds with its 95 % interval, each seed, the paper.

    Args:
        rows: long rows of one perception model; a method is a difference such as `mask - none`.
        seeds: the same for each seed alone, methods `mask - none, seed 43`.
        paper: columns method, metric, value.
        metrics: one panel each; values are in points.
        over: what the interval is over, for the legend.
    """
    marks = {"each training seed": ("|", SKY), f"ours, 95 % interval over {over}": ("o", BLUE),
             "paper": ("D", ORANGE)}  # fmt: skip
    alone = seeds.assign(method=seeds["method"].str.rpartition(", seed ")[0])
    means = ["method", "metric", "value"]
    parts = zip(marks, (alone[means], rows, paper[means]), strict=True)
    shown = pd.concat([part.assign(series=name) for name, part in parts])
    labels = list(dict.fromkeys(rows["method"]))
    fig = _dots(shown, labels, marks, metrics, "difference (points)", 0.9 + 0.45 * len(labels))
    for ax in fig.axes:
        ax.axvline(0, color="0.4", lw=1, zorder=0.9)
    outside_legend(fig, 3)
    return fig


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
    marks = {"this setting, 95 % interval over faces": ("o", BLUE)}
    shown = rows.assign(method=rows["method"].map(labels), series=next(iter(marks)))
    names = list(labels.values())
    fig = _dots(shown, names, marks, metrics, "difference (points)", 1.0 + 0.32 * len(names))
    for ax, metric in zip(fig.axes, metrics, strict=True):
        ax.axvspan(*noise_band(noise, metric), color=GREY, alpha=0.25, lw=0, zorder=0.4,
                   label="range of other training seeds")  # fmt: skip
        ax.axvline(0, color="0.4", lw=1, zorder=0.9, label=f"reference: {reference}")
    outside_legend(fig, 3)
    return fig


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
    points = [(x, point, label) for label, pairs in series.items() for x, point in pairs]
    shown = pd.DataFrame(points, columns=["x", "method", "series"]).merge(rows, on="method")
    ticks = so.Continuous(trans="log").tick(at=sorted(set(shown["x"])))
    fig = new_figure(9, 2.9 if len(series) < 4 else 3.4)
    plot = chart(shown[shown["metric"].isin(metrics)], x="x", y="value", color="series")
    plot = plot.facet("metric", order=list(metrics)).share(y=False)
    plot = plot.add(so.Band(), ymin="ci_low", ymax="ci_high", legend=False)
    plot = plot.add(so.Line(marker="o", pointsize=4)).label(x=xlabel, y="accuracy (%)")
    colours = so.Nominal(SERIES[: len(series)], order=list(series))
    plot.scale(x=ticks.label(like="{x:g}"), color=colours).on(fig).plot()
    for ax in fig.axes:
        ax.minorticks_off()
    outside_legend(fig, min(len(series), 7))
    return fig


@styled
def trade_figure(trade: DataFrame) -> Figure:
    """Recall of the rare classes against their precision and against HFA; the front is filled.

    Points have numbers, which the list on the right explains: labels beside them would overlap.

    trade: of `sweeps.rare_trade`.
    """
    from matplotlib.lines import Line2D

    fig = new_figure(9, 3.8)
    rows = trade.to_dict("records")
    for ax, other in zip(fig.subplots(1, 2, sharey=True), ("precision", "HFA"), strict=True):
        for number, row in enumerate(rows, 1):
            place = (row[other], row["recall"])
            ax.plot(*place, "o", color=BLUE, mfc=BLUE if row["front"] else "white", ms=10)
            ink = "white" if row["front"] else BLACK
            ax.annotate(str(number), place, ha="center", va="center_baseline", color=ink, size=6.5)
        ax.set_xlabel("precision of RFA (%)" if other == "precision" else "HFA (%)")
        ax.margins(0.08)
    fig.axes[0].set_ylabel("RFA, recall (%)")
    marks = [
        Line2D([], [], ls="", label=f"{number}  {row['label']}")
        for number, row in enumerate(rows, 1)
    ]
    fig.legend(handles=marks, loc="outside center right", handlelength=0, handletextpad=0)
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
    parts = rows["method"].str.rpartition(", ")
    systems = {name: system for system, name in names.items()}
    words = {condition: label for condition, (label, *_) in conditions.items()}
    shown = rows.assign(method=parts[0].map(systems), series=parts[2].map(words))
    shown = shown.dropna(subset=["method", "series"])
    marks = {label: m for label, *m in conditions.values() if label in set(shown["series"])}
    height = 1.1 + 0.14 * (len(marks) + 1) * len(names)
    fig = _dots(shown, list(names), marks, metrics, "EC²Face minus system (points)", height)
    for ax, metric in zip(fig.axes, metrics, strict=True):
        ax.axvline(0, color=BLACK, lw=1, zorder=0.9)
        for edge in range(1, len(names)):
            ax.axhline(edge - 0.5, color="0.9", lw=0.7)
        faces = rows[rows["metric"] == metric]["n"].max()
        ax.set_title(f"{metric} (n = {faces:,.0f} faces)")
    outside_legend(fig, 3)
    return fig


@styled
def guide_gain_figure(
    rows: DataFrame, labels: Mapping[str, str], metrics: Sequence[str] = ("Text", "OAA", "RFA")
) -> Figure:
    """Paired differences by the guides of training beside those by the independent evaluators.

    A guide's dot to the right of the evaluator's dot means overfitting to the guide.

    Args:
        rows: long rows of paired differences by both perception models.
        labels: method (a difference such as `mask - none`) -> its label, from top to bottom.
        metrics: one panel each.
    """
    marks = {"independent evaluator": ("o", BLUE), "guide of training": ("o", ORANGE)}
    series = dict(zip(("independent", "guiding"), marks, strict=True))
    shown = rows.assign(method=rows["method"].map(labels), series=rows["critic"].map(series))
    names = list(labels.values())
    fig = _dots(shown, names, marks, metrics, "difference (points)", 1.0 + 0.38 * len(names))
    for ax in fig.axes:
        ax.axvline(0, color="0.4", lw=1, zorder=0.9)
    outside_legend(fig, 2)
    return fig


def _dots(
    rows: DataFrame,
    labels: Sequence[str],
    marks: Mapping[str, Sequence[str]],
    metrics: Sequence[str],
    xlabel: str,
    height: float,
) -> Figure:
    """Dots with intervals, a panel for each metric.

    Args:
        rows: method, metric, series, value, ci_low and ci_high (NaN: no interval).
        labels: the methods, from top to bottom; others are left out.
        marks: series -> (marker, colour), from top to bottom within a method.
        metrics: one panel each.
        xlabel: of every panel.
        height: of the figure in inches.
    """
    fig = new_figure(9, height)
    shown = rows[rows["method"].isin(labels) & rows["metric"].isin(metrics)]
    markers = so.Nominal([marker for marker, _ in marks.values()], order=list(marks))
    colours = so.Nominal([colour for _, colour in marks.values()], order=list(marks))
    side = so.Dodge(by=["color"])
    plot = chart(shown, "x", x="value", y="method", color="series", marker="series")
    plot = plot.facet("metric", order=list(metrics)).share(x=False)
    plot = plot.label(x=xlabel, y="", title=lambda name: name.replace("F1_", "F1 of "))
    interval = so.Range({"capstyle": "butt"})
    plot = plot.add(interval, side, xmin="ci_low", xmax="ci_high", legend=False)
    plot = plot.add(so.Dot(stroke=1.5), side)
    plot = plot.scale(y=so.Nominal(order=list(labels)), color=colours, marker=markers)
    plot.on(fig).plot()
    return fig
