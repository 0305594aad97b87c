"""What tests of figures and tables share: small inputs, and the check for legibility."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from ec2face_core.attributes import CLASS_ID


def label_maps(n: int = 2, size: int = 32) -> torch.Tensor:
    """Skin on background, two earrings and a speck of necklace."""
    maps = torch.zeros(n, size, size, dtype=torch.int64)
    maps[:, 8:24, 8:24] = CLASS_ID["skin"]
    maps[:, 16:20, 4:6] = maps[:, 16:20, 26:28] = CLASS_ID["ear_r"]
    return maps


def images(*shape: int) -> torch.Tensor:
    """Random pictures of 32 px, `(*shape, 3, 32, 32)` in [-1, 1]."""
    return torch.rand(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def texts(fig: Figure) -> list[str]:
    """Every text in a figure."""
    return [t.get_text() for t in fig.findobj(Text)]


def assert_legible(plot: Callable[[], Figure]) -> None:
    """A figure has readable type at 900 pixels, no missing glyphs, and leaves no trace."""
    before = dict(matplotlib.rcParams)
    fig = plot()
    assert isinstance(fig, Figure) and dict(matplotlib.rcParams) == before
    assert not hasattr(fig, "number")  # unknown to pyplot: no window, no second display
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing glyphs, failed layouts
        assert fig._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    # 900 pixels for the whole width: ten pixels and more for a letter's height
    width = fig.get_size_inches()[0]
    visible = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
    smallest = min(t.get_fontsize() for t in visible)
    assert width <= 10.6 and smallest / 72 * 900 / max(width, 6) >= 9.4
    assert {t.get_fontfamily()[0] for t in visible} == {"sans-serif"}


def some_rows(**changes) -> pd.DataFrame:
    """Our cells of a table: two methods, both perception models, one class."""
    cell = {"method": "EC2Face", "dataset": "faces", "n": 300, "seeds": "42"}
    rows = [
        {**cell, "metric": "OAA", "critic": "independent", "value": 71.234, "ci_low": 70.5,
         "ci_high": 72.0},
        {**cell, "metric": "OAA", "critic": "guiding", "value": 76.5},
        {**cell, "metric": "LPIPS", "value": 0.31415},
        {**cell, "metric": "OAA", "critic": "independent", "value": 90.0, "method": "real"},
        {**cell, "metric": "ear_r", "critic": "independent", "value": 55.5, "n": 80},
    ]  # fmt: skip
    return pd.DataFrame([row | changes for row in rows])
