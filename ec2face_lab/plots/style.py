"""Functions from data to matplotlib figures, in one style; saving is `results.save_figure`'s line.

Every function returns a `Figure` of its own (no pyplot state, so a notebook shows it once, by
naming it last in a cell). Images are `b 3 h w` floats in [-1, 1], label maps `b h w` class ids.
Sizes are chosen for a README of 900 pixels: 8 points and more at a width of at most 10 inches.
Here: the style and every chart. Picture grids are in `grids.py`, Fig. 1 in `diagram.py`.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ec2face_core.attributes import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Seaborn's colour-blind palette, by name.
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494",
    "#ece133", "#56b4e9",
)  # fmt: skip

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
    """Draw under the package's style and leave the caller's matplotlib settings alone."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        import matplotlib
        import seaborn

        with matplotlib.rc_context({**seaborn.axes_style("ticks"), **STYLE}):
            return function(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that lays itself out."""
    figure = _notebook_figure()(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
    return figure


@functools.cache
def _notebook_figure() -> type[Figure]:
    """A Figure that notebooks show as a picture although pyplot knows nothing of it."""
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
    """No ticks, no frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def show(
    axes: Axes, image: np.ndarray | None, boxes: Sequence[tuple[int, int, int, int]] = ()
) -> None:
    """Put a picture into bare axes; None gives a hatched cell that says "not run here"."""
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
        # a white edge: skin is red in masks
        box.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
        axes.add_patch(box)
