"""The style of all figures: colours, matplotlib settings, empty figures, pictures in axes.

Sizes are for a README 900 pixels wide: 8 points and more at a width of at most 10 inches. Figures
are independent of pyplot's state, so a notebook shows one once, as the last expression of a cell.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ec2face_core.attributes import PALETTE, display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from seaborn.objects import Plot


# Colours of seaborn's colour-blind palette.
BLUE = "#0173b2"
ORANGE = "#de8f05"
GREEN = "#029e73"
RED = "#d55e00"
PURPLE = "#cc78bc"
BROWN = "#ca9161"
GREY = "#949494"
SKY = "#56b4e9"

CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, BROWN, SKY)
GROUP_COLOURS = {"HFA": BLUE, "NFA": GREY, "RFA": RED}
GROUP_NAMES = {"HFA": "high-frequency", "NFA": "normal-frequency", "RFA": "rare-frequency"}

STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.edgecolor": "0.3", "xtick.color": "0.3", "ytick.color": "0.3", "axes.axisbelow": True,
    "grid.color": "0.9", "grid.linewidth": 0.7, "lines.linewidth": 1.8, "hatch.linewidth": 0.5,
}  # fmt: skip


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Apply the style while a figure is plotted, and restore the caller's matplotlib settings."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        import matplotlib
        import seaborn

        with matplotlib.rc_context({**seaborn.axes_style("ticks"), **STYLE}):
            return function(*args, **kwargs)

    return wrapper


def chart(rows: DataFrame, grid: str = "y", **variables: str) -> Plot:
    """A seaborn plot in the style of a `styled` function; `.on(fig).plot()` draws it.

    Args:
        rows: one for each mark.
        grid: the axis whose ticks have lines: x or y.
        variables: variable of the plot -> column.
    """
    from matplotlib import cycler, rcParams
    from seaborn.objects import Plot

    theme = {key: rcParams[key] for key in Plot.config.theme}
    lines = {"axes.grid": True, "axes.grid.axis": grid, "axes.prop_cycle": cycler(color=CYCLE)}
    return Plot(rows, **variables).theme(theme | lines)


def outside_legend(fig: Figure, columns: int, side: str = "upper") -> None:
    """Place seaborn's legend outside the panels, with what is labelled in the first panel."""
    handles, labels = fig.axes[0].get_legend_handles_labels()
    while fig.legends:
        legend = fig.legends.pop()
        handles = [*legend.legend_handles, *handles]
        labels = [*(text.get_text() for text in legend.get_texts()), *labels]
    place = f"outside {side} center"
    fig.legend(handles, labels, loc=place, ncols=columns, scatteryoffsets=[0.5])


def plain(text: str, width: int = 200) -> str:
    """Text that a figure shows as it is, shortened: a caption's dollar signs are no formula."""
    short = text if len(text) <= width else textwrap.shorten(text, width, placeholder=" …")
    return short.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, with constrained layout."""
    figure = _notebook_figure()(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    return figure


@functools.cache
def _notebook_figure() -> type[Figure]:
    """A Figure that notebooks display although it is not registered with pyplot."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, format="png", dpi=110, bbox_inches="tight")
            return png.getvalue()

    return NotebookFigure


# ---------------------------------------------------------------------------------- pictures


def picture(image: Tensor) -> np.ndarray:
    """`3 h w` in [-1, 1] -> `h w 3` in [0, 1]."""
    return (image.detach().float().cpu().movedim(0, -1).clamp(-1, 1) / 2 + 0.5).numpy()


def mask_picture(label_map: Tensor) -> np.ndarray:
    """`h w` ids -> `h w 3` palette colours in [0, 1]."""
    return np.asarray(PALETTE, dtype=np.float32)[label_map.cpu().numpy()] / 255


def bare(axes: Axes) -> None:
    """Remove ticks and frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def class_legend(fig: Figure, ids: Iterable[int]) -> None:
    """The colours of these classes in masks, with their names, below a figure."""
    from matplotlib.patches import Patch

    ids = list(ids)
    patches = [Patch(facecolor=np.array(PALETTE[i]) / 255, edgecolor="0.4", lw=0.5) for i in ids]
    columns = max(1, int(fig.get_size_inches()[0] / 0.95))
    fig.legend(
        patches, [display_name(i) for i in ids], loc="outside lower center", ncols=columns,
        fontsize=8, handlelength=1.0, handletextpad=0.4, columnspacing=1.0,
    )  # fmt: skip


def show(
    axes: Axes,
    image: np.ndarray | None,
    boxes: Sequence[tuple[int, int, int, int]] = (),
    zoom: tuple[int, int, int, int] | None = None,
) -> None:
    """Show a picture in axes without ticks.

    Args:
        axes: where.
        image: `(h, w, 3)` in [0, 1]; None gives a hatched cell with the text "not run here".
        boxes: (x, y, width, height) in pixels, outlined in red.
        zoom: a box whose surroundings are shown enlarged in the upper left corner.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    bare(axes)
    if image is None:
        cell = {"facecolor": "0.97", "edgecolor": "0.8", "hatch": "////"}
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **cell))
        axes.set_aspect("equal", adjustable="box")
        note = {"ha": "center", "va": "center", "fontsize": 8, "color": "0.35"}
        note["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(0.5, 0.5, "not run here", transform=axes.transAxes, **note)
        return
    axes.imshow(image, interpolation="nearest")
    for x, y, width, height in boxes:
        box = Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor="red", lw=1.2)
        # with a white edge, because skin is red in masks
        box.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
        axes.add_patch(box)
    if zoom is not None:
        inset = axes.inset_axes((0, 0.56, 0.44, 0.44))
        inset.imshow(square_crop(image, zoom), interpolation="nearest")
        inset.set(xticks=[], yticks=[])
        for spine in inset.spines.values():
            spine.set(visible=True, edgecolor="white", linewidth=1.2)


def square_crop(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The smallest square of a picture `h w 3` around a box (x, y, width, height)."""
    x, y, width, height = box
    side = min(max(width, height), *image.shape[:2])
    left = min(max(0, x + (width - side) // 2), image.shape[1] - side)
    top = min(max(0, y + (height - side) // 2), image.shape[0] - side)
    return image[top : top + side, left : left + side]
