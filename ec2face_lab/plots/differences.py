"""Figures of differences: what a part, a setting, a critic or an altered mask changes.

The style is `plotting.py`'s. Points are means with 95 % intervals over faces; a grey band is what
another training seed changes by itself, so that a setting has to leave it to count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import BLUE, CYCLE, GREY, ORANGE, SKY, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


SERIES, BLACK = (SKY, *CYCLE[:-1]), "0.15"


@styled
def difference_figure(
    rows: DataFrame,
    seeds: DataFrame,
    paper: DataFrame,
    metrics: Sequence[str] = ("RFA", "OAA", "Text"),
) -> Figure:
    """Differences of variants: the mean over seeds with its 95 % interval, each seed, the paper.

    Args:
        rows: long rows of one critic; a method is a difference such as `mask - none`.
        seeds: the same of each seed alone, methods `mask - none, seed 43`.
        paper: method, metric, value.
        metrics: one panel each; in points.
    """
    labels = list(dict.fromkeys(rows["method"]))
    fig = new_figure(9, 0.9 + 0.45 * len(labels))
    panels = fig.subplots(1, len(metrics), sharey=True)
    y = np.arange(len(labels))
    for ax, metric in zip(panels, metrics, strict=True):
        ax.axvline(0, color="0.4", lw=1)
        _dots(ax, rows, metric, labels, y, BLUE, "ours, 95 % interval over faces", ms=6, lw=2)
        each = seeds[seeds["metric"] == metric]
        at = [labels.index(method.rpartition(", seed ")[0]) - 0.22 for method in each["method"]]
        ax.plot(each["value"], at, "o", mfc="none", mec=SKY, ms=4.5, label="each training seed")
        theirs = paper[paper["metric"] == metric]
        at = [labels.index(method) + 0.22 for method in theirs["method"]]
        ax.plot(theirs["value"], at, "D", color=ORANGE, ms=5, label="paper")
        ax.set(title=metric, xlabel="difference (points)")
        ax.grid(axis="x")
    return _labelled(fig, labels, 3)


def noise_band(noise: DataFrame, metric: str) -> tuple[float, float]:
    """Least and greatest difference that another seed of the same training makes, 0 included."""
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
        rows: long rows of one critic, method = point; differences in points.
        noise: the same of other training seeds of the reference: their range is the grey band.
        labels: point -> what to print, in drawing order.
        reference: what to print for the point that is subtracted.
    """
    names = list(labels)
    fig = new_figure(9, 1.0 + 0.32 * len(names))
    panels = fig.subplots(1, len(metrics), sharey=True)
    y = np.arange(len(names))
    for ax, metric in zip(panels, metrics, strict=True):
        ax.axvspan(*noise_band(noise, metric), color=GREY, alpha=0.25, lw=0,
                   label="range of other training seeds")  # fmt: skip
        _dots(ax, rows, metric, names, y, BLUE, "this setting, 95 % interval over faces")
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
        rows: long rows of one critic, method = point.
        series: legend text -> (x, point) of its points; at most seven.
    """
    fig = new_figure(9, 2.9 if len(series) < 4 else 3.4)
    for ax, metric in zip(fig.subplots(1, len(metrics)), metrics, strict=True):
        of = rows[rows["metric"] == metric].set_index("method")
        for (label, points), colour in zip(series.items(), SERIES, strict=False):
            x, names = zip(*sorted(points), strict=True)
            line = of.reindex(list(names))
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
    ways: Mapping[str, tuple[str, str, str]],
    metrics: Sequence[str] = ("RFA", "OAA", "Text"),
) -> Figure:
    """Systems down, a mark with its interval for each way in which they were trained or seen.

    Args:
        rows: long rows of paired differences, one critic; a method is `<difference>, <way>`.
        names: system -> its difference, in drawing order.
        ways: way -> (legend text, marker, colour); those without rows are left out.
    """
    have = set(rows["method"])
    ways = {way: how for way, how in ways.items()
            if any(f"{name}, {way}" in have for name in names.values())}  # fmt: skip
    fig = new_figure(9, 1.1 + 0.14 * (len(ways) + 1) * len(names))
    rise = np.linspace(-0.34, 0.34, len(ways)) if len(ways) > 1 else [0.0]
    for ax, metric in zip(fig.subplots(1, len(metrics), sharey=True), metrics, strict=True):
        ax.axvline(0, color=BLACK, lw=1)
        for dy, (way, (label, marker, colour)) in zip(rise, ways.items(), strict=True):
            methods = [f"{name}, {way}" for name in names.values()]
            y = np.arange(len(names)) + dy
            _dots(ax, rows, metric, methods, y, colour, label, fmt=marker, lw=1.2)
        for edge in range(1, len(names)):
            ax.axhline(edge - 0.5, color="0.9", lw=0.7)
        faces = rows[rows["metric"] == metric]["n"].max()
        ax.set(title=f"{metric} (n = {faces:,.0f} faces)", xlabel="EC²Face minus system (points)")
        ax.grid(axis="x")
    return _labelled(fig, list(names), 3)


@styled
def critic_figure(
    rows: DataFrame,
    labels: Mapping[str, str],
    ceiling: str = "real",
    metrics: Sequence[str] = ("Text", "OAA", "RFA"),
) -> Figure:
    """Do the critics that guide training see more than the independent ones?

    Each score as a share of what the same critic gives the real images, so that critics with other
    scales can be compared. A guiding dot right of its independent one is overfitting to the critic
    if the methods that were never guided do not show it, too.

    Args:
        rows: long rows of both critics, with the method `ceiling`.
        labels: method -> what to print, in drawing order.
    """
    names = list(labels)
    fig = new_figure(9, 1.0 + 0.38 * len(names))
    panels = fig.subplots(1, len(metrics), sharey=True)
    y = np.arange(len(names))
    shown = {"independent": (BLUE, -0.13), "guiding": (ORANGE, 0.13)}
    for ax, metric in zip(panels, metrics, strict=True):
        for critic, (colour, shift) in shown.items():
            of = rows[(rows["critic"] == critic) & (rows["metric"] == metric)]
            top = of[of["method"] == ceiling]["value"].iloc[0] / 100
            share = of.assign(**{k: of[k] / top for k in ("value", "ci_low", "ci_high")})
            _dots(ax, share, metric, names, y + shift, colour, f"{critic} critic")
        ax.set(title=metric, xlabel="% of the real images' score")
        ax.grid(axis="x")
    return _labelled(fig, list(labels.values()), 2)


def _labelled(fig: Figure, labels: Sequence[str], columns: int) -> Figure:
    """Rows named from top to bottom, and one legend for all panels."""
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
    colour: str,
    label: str,
    fmt: str = "o",
    ms: float = 5,
    lw: float = 1.8,
) -> None:
    """Values with their intervals, one a method."""
    of = rows[rows["metric"] == metric].set_index("method").reindex(names)
    errors = np.stack([of["value"] - of["ci_low"], of["ci_high"] - of["value"]])
    ax.errorbar(of["value"], y, xerr=np.clip(errors, 0, None), fmt=fmt, color=colour, ms=ms,
                lw=lw, label=label)  # fmt: skip
