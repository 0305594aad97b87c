"""Charts: reliability and β(t), training curves, the long tail, accuracy of classes.

Every function takes data and returns a `Figure` in the style of `style.py`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import seaborn
import seaborn.objects as so
import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, CLASSES, GROUPS, display_name
from ec2face_core.losses import beta
from ec2face_core.runs import read_metrics

from .style import (
    BLUE,
    CYCLE,
    GREEN,
    GROUP_COLOURS,
    GROUP_NAMES,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    chart,
    new_figure,
    outside_legend,
    picture,
    show,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from pandas import DataFrame


# ------------------------------------------------------------------------------------ curves


@styled
def reliability_figure(
    images: Tensor,
    times: Sequence[float],
    curves: DataFrame,
    steepness: float = 10.0,
    center: float = 0.4,
    beside: DataFrame | None = None,
) -> Figure:
    """Fig. 2: the reverse estimate x̃ at several t, and how its quality falls with t.

    Args:
        images: decoded reverse estimates `(rows, times, 3, h, w)` in [-1, 1].
        times: t of each column of images.
        curves: columns t, metric, value, ci_low, ci_high (the last two may be missing); one panel
            for each metric, and one for β(t).
        steepness: γ_s of Eq. 8.
        center: t_c of Eq. 8.
        beside: curves of another figure that has to have the same axes.
    """
    side = min(9.6 / len(times), 1.25)
    strip = len(images) * side + 0.2
    fig = new_figure(9.6, strip + 2.1)
    top, bottom = fig.subfigures(2, 1, height_ratios=[strip, 2.1])
    for i, row in enumerate(top.subplots(len(images), len(times), squeeze=False)):
        for ax, image, t in zip(row, images[i], times, strict=True):
            show(ax, picture(image))
            if i == 0:
                ax.set_title(f"t = {t:g}", fontsize=8.5, pad=3)
    t = torch.linspace(0, 1, 21)
    schedule = pd.DataFrame({"t": t, "value": beta(t, steepness, center)})
    rows = pd.concat([curves, schedule.assign(metric="β(t) of Eq. 8")], ignore_index=True)
    plot = chart(rows, x="t", y="value", color="metric").facet("metric").share(y=False)
    plot = plot.add(so.Line(), legend=False).label(y="").limit(x=(0, 1))
    if "ci_low" in curves:
        plot = plot.add(so.Band(), ymin="ci_low", ymax="ci_high", legend=False)
    plot.on(bottom).plot()
    settings = f"$\\gamma_s$ = {steepness:g}\n$t_c$ = {center:g}"
    place = {"transform": bottom.axes[-1].transAxes, "ha": "right", "va": "top"}
    bottom.axes[-1].text(0.97, 0.97, settings, fontsize=8.5, **place)
    shown = curves if beside is None else pd.concat([curves, beside], ignore_index=True)
    columns = shown.columns.intersection(["value", "ci_low", "ci_high"])
    for ax, metric in zip(bottom.axes, rows["metric"].unique(), strict=True):
        ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        values = shown.loc[shown["metric"] == metric, columns]
        if len(values):
            low, high = float(values.min().min()), float(values.max().max())
            ax.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    return fig


@styled
def beta_curves(
    settings: Sequence[tuple[float, float]], reliability: DataFrame | None = None
) -> Figure:
    """β(t) of Eq. 8 over measured reliability.

    Args:
        settings: pairs (steepness, center); the first one is emphasised.
        reliability: columns t, metric, value in [0, 1] (1 = as good as at t = 0), optional.
    """
    t = torch.linspace(0, 1, 201)
    names = [f"β: $\\gamma_s$ = {slope:g}, $t_c$ = {center:g}" for slope, center in settings]
    values = [beta(t, *setting).numpy() for setting in settings]
    curves = pd.DataFrame(dict(zip(names, values, strict=True)), index=t.numpy())
    curves = curves.melt(ignore_index=False, var_name="curve").rename_axis("t")
    widths = [2.4] + [1.4] * (len(names) - 1)
    fig = new_figure(5.6, 3.2)
    ax = fig.subplots()
    lines = {"x": "t", "y": "value", "errorbar": None, "ax": ax}
    seaborn.lineplot(curves, hue="curve", palette=list(CYCLE[: len(names)]),
                     size="curve", sizes=widths, **lines)  # fmt: skip
    if reliability is not None:
        measured = reliability.assign(curve="measured: " + reliability["metric"])
        seaborn.lineplot(measured, style="curve", markers=True, dashes=False, ls=":",
                         color="0.35", lw=1, ms=6, **lines)  # fmt: skip
    ax.set(
        xlabel="t  (0 data, 1 noise)",
        ylabel="β(t), and scaled reliability",
        xlim=(0, 1),
        ylim=(-0.02, 1.03),
    )
    ax.grid(axis="y")
    seaborn.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title="")
    return fig


@styled
def training_curves(runs: Mapping[str, Path | DataFrame], smoothing: float = 0.9) -> Figure:
    """The losses of one or several runs against the step, from `metrics.jsonl`.

    Pale lines are the logged values, dark lines their exponential mean.

    Args:
        runs: name -> path of the file, or its rows. There is one panel for each of total, flow,
            text and mask that was logged.
        smoothing: weight of the past in the mean.
    """
    titles = {"total": "total (Eq. 12)", "flow": "flow matching (Eq. 11)",
              "text": "text consistency (Eq. 6)", "mask": "mask consistency (Eq. 7)"}  # fmt: skip
    logged = pd.concat(
        pd.DataFrame(read_metrics(run.parent) if isinstance(run, Path) else run).assign(run=name)
        for name, run in runs.items()
    )
    parts = [part for part in titles if part in logged]
    rows = logged.melt(["run", "step"], parts, "part", "loss").dropna()
    losses = rows.groupby(["run", "part"])["loss"]
    rows["mean"] = losses.transform(lambda loss: loss.ewm(alpha=1 - smoothing).mean())
    fig = new_figure(min(2.5 * len(parts) + 0.3, 10), 2.5 if len(runs) == 1 else 2.8)
    plot = chart(rows, x="step", y="loss", color="run").facet("part").share(y=False)
    plot = plot.add(so.Line(linewidth=0.6, alpha=0.3), legend=False)
    plot = plot.add(so.Line(), y="mean", legend=len(runs) > 1)
    plot.label(title=titles.get, y="").on(fig).plot()
    if len(runs) > 1:
        outside_legend(fig, len(runs), "lower")
    return fig


# ----------------------------------------------------------------------------- distributions


@styled
def long_tail_distribution(frequency: DataFrame) -> Figure:
    """Fig. 5: each class's share of the pixels (bars, log scale) and of the images.

    frequency: rows with class, pixel_share and image_share, the shares in percent.
    """
    rows = frequency.sort_values("pixel_share", ascending=False)
    groups = {CLASSES[i]: f"{g}: {GROUP_NAMES[g]}" for g, ids in GROUPS.items() for i in ids}
    colours = {f"{g}: {GROUP_NAMES[g]}": GROUP_COLOURS[g] for g in GROUPS}
    bars = {"data": rows, "x": "class", "hue": rows["class"].map(groups), "palette": colours,
            "hue_order": list(colours), "saturation": 1, "width": 0.72}  # fmt: skip
    floor = rows["pixel_share"][rows["pixel_share"] > 0].min() / 2
    fig = new_figure(8.4, 4.2)
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    for ax, shares, lowest in ((top, "pixel_share", floor), (bottom, "image_share", 0)):
        seaborn.barplot(y=shares, ax=ax, legend=ax is top, **bars)
        for i, share in enumerate(rows[shares]):
            label = f"{share:.2g}" if share < 10 else f"{share:.0f}"
            ax.annotate(label, (i, max(share, lowest)), (0, 2), textcoords="offset points",
                        ha="center", fontsize=8, color="0.25")  # fmt: skip
    top.set(yscale="log", ylim=(floor, 200), ylabel="pixels (%), log scale")
    bottom.set(ylabel="images (%)", ylim=(0, 125), yticks=range(0, 101, 50), xlabel="")
    _class_ticks(bottom, rows["class"])
    top.get_legend().remove()
    outside_legend(fig, 3)
    return fig


def _class_ticks(ax: Axes, names: Iterable[str]) -> None:
    """Label the positions 0, 1, ... with the names of classes."""
    labels = [display_name(CLASS_ID[name]) for name in names]
    ax.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")


@styled
def class_accuracy(
    rows: DataFrame,
    labels: Mapping[str, str],
    ceiling: str | None = "real",
    classes: Sequence[str] = CLASSES,
    details: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Figure:
    """Fig. 4: accuracy of each class by method with 95 % intervals, and the ceiling as lines.

    Args:
        rows: long rows with method, metric (class name), value, ci_low, ci_high in percent.
        labels: method -> legend text, in the order of the bars.
        ceiling: the method whose accuracy is a black line at each class; None: no lines.
        classes: names of the classes, in order.
        details: name of a row -> pictures `h w 3`, shown above the bars; the same faces and noise.
    """
    bars = rows[rows["method"].isin(labels)].replace({"method": labels})
    colours = dict(zip(labels.values(), (SKY, BLUE, ORANGE, GREEN, PURPLE), strict=False))
    beside = so.Dodge(by=["group"], gap=0.05)
    order = so.Nominal(order=list(classes))
    palette = so.Nominal(colours, order=list(colours))
    plot = chart(bars, x="metric", y="value", ymin="ci_low", ymax="ci_high", group="method")
    plot = plot.add(so.Bar(alpha=1, edgewidth=0), beside, color="method")
    plot = plot.add(so.Range({"capstyle": "butt"}, color="0.2", linewidth=1), beside)
    if ceiling is not None:
        dash = so.Dash({"label": "ceiling: real images"}, color="black", width=0.9, linewidth=1.4)
        plot = plot.add(dash, data=rows[rows["method"] == ceiling])
    plot = plot.scale(x=order, color=palette).label(x="", y="accuracy (recall, %)")
    plot = plot.limit(y=(0, 104))
    below = fig = new_figure(9, 3.3)
    if details:
        strip = 0.85 * len(details) + 0.1
        fig = new_figure(9, strip + 3.3)
        above, below = fig.subfigures(2, 1, height_ratios=[strip, 3.3])
        _detail_rows(above, details)
    plot.on(below).plot()
    if details:  # seaborn gives its legend to the whole figure
        below.legends.extend(fig.legends)
        fig.legends.clear()
    ax = below.axes[0]
    ax.set_xlim(-0.6, len(classes) - 0.4)
    for i, name in enumerate(classes):
        if CLASS_ID[name] in GROUPS["RFA"]:
            ax.axvspan(i - 0.5, i + 0.5, color=RED, alpha=0.12, lw=0, zorder=0)
    _class_ticks(ax, classes)
    outside_legend(below, len(labels) + 1)
    return fig


def _detail_rows(fig: SubFigure, details: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Rows of small pictures with their names on the left."""
    columns = max(len(row) for row in details.values())
    grid = fig.subplots(len(details), columns, squeeze=False)
    for axes, (name, row) in zip(grid, details.items(), strict=True):
        for ax, image in zip(axes, row, strict=True):
            show(ax, image)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5)


@styled
def class_table(rows: DataFrame, labels: Mapping[str, str]) -> Figure:
    """Accuracy of every class (rows) by method (columns), numbers in shaded cells.

    Args:
        rows: long rows with method, metric (class name), value, n.
        labels: method -> heading.
    """
    from matplotlib.colors import PowerNorm

    names = [name for name in CLASSES if (rows["metric"] == name).any()]
    table = rows.pivot(index="metric", columns="method", values="value")
    table = table.reindex(index=names, columns=list(labels)).astype(float)
    support = rows.groupby("metric")["n"].max()
    fig = new_figure(min(2.3 + 1.15 * len(labels), 10), 0.55 + 0.235 * len(names))
    ax = fig.subplots()
    shade = PowerNorm(3, 0, 120)  # more contrast at the top, where most classes lie
    ticks = [f"{display_name(CLASS_ID[n])}  (n = {support[n]:,.0f})" for n in names]
    heads = [textwrap.fill(label, 15) for label in labels.values()]
    cells = {"annot": True, "fmt": ".1f", "annot_kws": {"fontsize": 8.5, "color": "black"}}
    seaborn.heatmap(table, norm=shade, cmap="Blues", cbar=False, xticklabels=heads,
                    yticklabels=ticks, ax=ax, **cells)  # fmt: skip
    for i, j in np.argwhere(table.isna()):
        ax.text(j + 0.5, i + 0.5, "–", ha="center", va="center", fontsize=8.5, color="0.3")
    for tick, name in zip(ax.get_yticklabels(), names, strict=True):
        tick.set_color(RED if CLASS_ID[name] in GROUPS["RFA"] else "0.15")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.tick_params(axis="x", labelsize=8)
    ax.set(xlabel="", ylabel="")
    return fig
