"""Charts: reliability and β(t), training curves, the long tail, accuracy of classes.

Every function takes data and returns a `Figure` in the style of `style.py`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
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
    new_figure,
    picture,
    show,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


# ------------------------------------------------------------------------------------ curves


@styled
def reliability_figure(
    images: Tensor,
    times: Sequence[float],
    curves: DataFrame,
    steepness: float = 10.0,
    center: float = 0.4,
) -> Figure:
    """Fig. 2: the reverse estimate x̃ at several t, and how its quality falls with t.

    Args:
        images: decoded reverse estimates `(rows, times, 3, h, w)` in [-1, 1].
        times: t of each column of images.
        curves: columns t, metric, value, ci_low, ci_high (the last two may be missing); one panel
            per metric, each with β(t) dashed on a second axis.
        steepness: γ_s of Eq. 8.
        center: t_c of Eq. 8.
    """
    metrics = list(dict.fromkeys(curves["metric"]))
    strip = len(images) * min(9 / len(times), 1.25) + 0.2
    fig = new_figure(9, strip + 2.4)
    top, bottom = fig.subfigures(2, 1, height_ratios=[strip, 2.4])
    for i, row in enumerate(top.subplots(len(images), len(times), squeeze=False)):
        for ax, image, t in zip(row, images[i], times, strict=True):
            show(ax, picture(image))
            if i == 0:
                ax.set_title(f"t = {t:g}", fontsize=8.5, pad=3)
    t = torch.from_numpy(np.linspace(0, 1, 101))
    panels = bottom.subplots(1, len(metrics), squeeze=False)[0]
    for k, (ax, metric) in enumerate(zip(panels, metrics, strict=True)):
        _band(ax, curves[curves["metric"] == metric], "t", CYCLE[k % 7])
        ax.set(title=metric, xlabel="t", xlim=(0, 1))
        twin = ax.twinx()
        (dashed,) = twin.plot(t, beta(t, steepness, center), "--", color="0.45", lw=1.3)
        twin.set(ylim=(0, 1.02), yticks=[0, 0.5, 1] if ax is panels[-1] else [])
        twin.spines["right"].set_visible(ax is panels[-1])
    label = f"β(t), right axis: $\\gamma_s$ = {steepness:g}, $t_c$ = {center:g}"
    fig.legend([dashed], [label], loc="outside lower center")
    return fig


def _band(ax: Axes, rows: DataFrame, x: str, colour: str, label: str | None = None) -> None:
    """A line with its 95 % band."""
    rows = rows.sort_values(x)
    ax.plot(rows[x], rows["value"], color=colour, label=label)
    if "ci_low" in rows:
        ax.fill_between(rows[x], rows["ci_low"], rows["ci_high"], color=colour, alpha=0.2, lw=0)


@styled
def beta_curves(
    settings: Sequence[tuple[float, float]], reliability: DataFrame | None = None
) -> Figure:
    """β(t) of Eq. 8 over measured reliability.

    Args:
        settings: pairs (steepness, center); the first one is emphasised.
        reliability: columns t, metric, value in [0, 1] (1 = as good as at t = 0), optional.
    """
    fig = new_figure(5.6, 3.2)
    ax = fig.subplots()
    t = torch.from_numpy(np.linspace(0, 1, 201))
    for k, (steepness, center) in enumerate(settings):
        label = f"β: $\\gamma_s$ = {steepness:g}, $t_c$ = {center:g}"
        ax.plot(t, beta(t, steepness, center), color=CYCLE[k], lw=2.4 if k == 0 else 1.4,
                label=label)  # fmt: skip
    if reliability is not None:
        for marker, (metric, rows) in zip("os^Dv", reliability.groupby("metric"), strict=False):
            rows = rows.sort_values("t")
            ax.plot(rows["t"], rows["value"], ls=":", lw=1, marker=marker, ms=4, color="0.35",
                    label=f"measured: {metric}")  # fmt: skip
    ax.set(xlabel="t  (0 data, 1 noise)", ylabel="β(t)", xlim=(0, 1), ylim=(-0.02, 1.03))
    ax.grid(axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
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
    import pandas as pd

    tables = {
        name: run if isinstance(run, pd.DataFrame) else pd.DataFrame(read_metrics(run.parent))
        for name, run in runs.items()
    }
    parts = [p for p in ("total", "flow", "text", "mask") if any(p in t for t in tables.values())]
    titles = {"total": "total (Eq. 12)", "flow": "flow matching (Eq. 11)",
              "text": "text consistency (Eq. 6)", "mask": "mask consistency (Eq. 7)"}  # fmt: skip
    fig = new_figure(min(2.5 * len(parts) + 0.3, 10), 2.5 if len(tables) == 1 else 2.8)
    for ax, part in zip(fig.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for k, (name, table) in enumerate(tables.items()):
            if part not in table:
                continue
            logged = table[["step", part]].dropna()
            mean = logged[part].ewm(alpha=1 - smoothing).mean()
            ax.plot(logged["step"], logged[part], color=CYCLE[k % 7], lw=0.6, alpha=0.3)
            ax.plot(logged["step"], mean, color=CYCLE[k % 7], label=name)
        ax.set(title=titles[part], xlabel="step")
        ax.grid(axis="y")
    if len(tables) > 1:
        handles, labels = fig.axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(tables))
    return fig


# ----------------------------------------------------------------------------- distributions


@styled
def long_tail_distribution(frequency: DataFrame) -> Figure:
    """Fig. 5: each class's share of the pixels (bars, log scale) and of the images (points).

    frequency: rows with class, pixel_share and image_share, the shares in percent.
    """
    from matplotlib.patches import Patch

    rows = frequency.sort_values("pixel_share", ascending=False)
    groups = {i: name for name, ids in GROUPS.items() for i in ids}
    ids = [CLASS_ID[name] for name in rows["class"]]
    x = np.arange(len(ids))
    colours = [GROUP_COLOURS[groups[i]] for i in ids]
    fig = new_figure(8.4, 4.2)
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])

    shares = rows["pixel_share"].to_numpy()
    floor = shares[shares > 0].min() / 2
    top.bar(x, shares, color=colours, width=0.72)
    top.set(yscale="log", ylim=(floor, 200), ylabel="pixels (%), log scale")
    for i, share in enumerate(shares):
        label = f"{share:.2g}" if share < 10 else f"{share:.0f}"
        top.text(i, max(share, floor) * 1.15, label, ha="center", fontsize=8, color="0.25")

    images = rows["image_share"].to_numpy()
    bottom.vlines(x, 0, images, color=colours, lw=1.5)
    bottom.scatter(x, images, color=colours, s=28, zorder=3)
    bottom.set(ylabel="images (%)", ylim=(0, 125), yticks=range(0, 101, 50))
    for i, share in enumerate(images):
        bottom.text(i, share + 8, f"{share:.0f}", ha="center", fontsize=8, color="0.25")
    bottom.set_xticks(x, [display_name(i) for i in ids], rotation=40, ha="right",
                      rotation_mode="anchor")  # fmt: skip
    keys = [Patch(color=GROUP_COLOURS[g], label=f"{g}: {GROUP_NAMES[g]}") for g in GROUPS]
    fig.legend(handles=keys, loc="outside upper center", ncols=3)
    return fig


@styled
def class_accuracy(
    rows: DataFrame,
    labels: Mapping[str, str],
    ceiling: str | None = "real",
    classes: Sequence[str] = CLASSES,
) -> Figure:
    """Fig. 4: accuracy of each class by method with 95 % intervals, and the ceiling as lines.

    Args:
        rows: long rows with method, metric (class name), value, ci_low, ci_high in percent.
        labels: method -> legend text, in the order of the bars.
        ceiling: the method whose accuracy is a black line at each class; None: no lines.
        classes: names of the classes, in order.
    """
    fig = new_figure(9, 3.3)
    ax = fig.subplots()
    width = 0.78 / len(labels)
    colours = (SKY, BLUE, ORANGE, GREEN, PURPLE)
    x = np.arange(len(classes))
    for k, (method, label) in enumerate(labels.items()):
        values = rows[rows["method"] == method].set_index("metric").reindex(classes)
        below = values["value"] - values["ci_low"]
        above = values["ci_high"] - values["value"]
        errors = np.clip(np.nan_to_num(np.stack([below, above])), 0, None)
        centres = x + (k - (len(labels) - 1) / 2) * width
        bars = {"color": colours[k], "label": label, "ecolor": "0.2", "error_kw": {"lw": 1}}
        ax.bar(centres, values["value"], width, yerr=errors, **bars)
    if ceiling is not None:
        top = rows[rows["method"] == ceiling].set_index("metric").reindex(classes)["value"]
        ax.hlines(top, x - 0.45, x + 0.45, color="black", lw=1.4, label="ceiling: real images")
    for i, name in enumerate(classes):
        if CLASS_ID[name] in GROUPS["RFA"]:
            ax.axvspan(i - 0.5, i + 0.5, color=RED, alpha=0.12, lw=0, zorder=0)
    ax.set_xticks(x, [display_name(CLASS_ID[name]) for name in classes], rotation=40, ha="right",
                  rotation_mode="anchor")  # fmt: skip
    ax.set(ylabel="accuracy (%)", ylim=(0, 104), xlim=(-0.6, len(classes) - 0.4))
    ax.grid(axis="y")
    fig.legend(loc="outside upper center", ncols=len(labels) + 1)
    return fig


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
    values = table.reindex(index=names, columns=list(labels)).to_numpy(dtype=float)
    support = rows.groupby("metric")["n"].max()
    fig = new_figure(2.3 + 1.15 * len(labels), 0.55 + 0.235 * len(names))
    ax = fig.subplots()
    shade = PowerNorm(3, 0, 110)  # more contrast at the top, where most classes lie
    ax.imshow(values, cmap="Blues", norm=shade, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.1f}"
        colour = "0.3" if np.isnan(value) else "white" if shade(value) > 0.6 else "black"
        ax.text(j, i, text, ha="center", va="center", fontsize=8.5, color=colour)
    ticks = [f"{display_name(CLASS_ID[n])}  (n = {support[n]:,.0f})" for n in names]
    ax.set_yticks(range(len(names)), ticks)
    ax.set_xticks(range(len(labels)), [textwrap.fill(label, 15) for label in labels.values()])
    for tick, name in zip(ax.get_yticklabels(), names, strict=True):
        tick.set_color(RED if CLASS_ID[name] in GROUPS["RFA"] else "0.15")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig
