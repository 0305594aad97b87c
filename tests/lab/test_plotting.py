"""Every figure function on small fake data: what it draws, how large its type is, its traces."""

from __future__ import annotations

import json
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from ec2face_core.attributes import CLASS_ID, CLASSES, GROUPS, NUM_CLASSES
from ec2face_core.config import LossConfig
from ec2face_core.losses import beta, long_tail_weights
from ec2face_lab.plots import charts as plotting
from ec2face_lab.plots import differences as effects
from ec2face_lab.plots import grids
from ec2face_lab.plots.diagram import framework_diagram

TIMES = [0.1, 0.5, 0.9]


def label_maps(n: int = 2, size: int = 32) -> torch.Tensor:
    """Skin on background, two earrings and a speck of necklace."""
    maps = torch.zeros(n, size, size, dtype=torch.int64)
    maps[:, 8:24, 8:24] = CLASS_ID["skin"]
    maps[:, 16:20, 4:6] = maps[:, 16:20, 26:28] = CLASS_ID["ear_r"]
    return maps


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


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


def facts() -> dict:
    parts = ("text_encoder", "text_encoder_2", "vae", "transformer", "clip", "parser")
    return {
        "names": dict.fromkeys(parts, "Module"),
        "parameters": dict.fromkeys(parts, 2_300_000) | {"lora": 216_000},
        "tokens": {"text": 32, "noise": 64, "mask": 64},
        "blocks": (2, 4),
        "rank": 16,
        "loss": LossConfig(alpha_text=0.25, center=0.3),
        "weights": dict(zip(CLASSES, np.geomspace(0.1, 500, NUM_CLASSES), strict=True)),
        "caption": "She wears earrings. " * 9,
        "pictures": {k: np.ones((4, 4, 3)) for k in ("image", "mask", "estimate", "weights")},
    }


def weight_maps() -> Figure:
    maps = label_maps()
    counts = torch.bincount(maps.flatten(), minlength=NUM_CLASSES)
    return grids.weights_map(images(2), maps, {"pixels": long_tail_weights(maps, counts)})


def differences():
    """Rows of two differences, of each of two seeds alone, and the paper's."""
    labels, metrics = ("mask - none", "text - none"), ("RFA", "OAA", "Text")
    cell = {"value": 1.0, "ci_low": 0.5, "ci_high": 1.7}
    rows = pd.DataFrame([{"method": a, "metric": m} | cell for a in labels for m in metrics])
    seeds = pd.concat([rows.assign(method=rows["method"] + f", seed {s}") for s in (42, 43)])
    return rows, seeds, rows[rows["metric"] != "RFA"]


ALL = {
    "comparison": lambda: grids.comparison_grid(
        ["a caption"] * 2, label_maps(), {"TediGAN": None, "EC²Face": images(2)}, real=images(2)
    ),
    "unimodal": lambda: grids.unimodal_grid(
        ["a caption"], images(1, 3), label_maps(2), images(2, 3)
    ),
    "diversity": lambda: grids.diversity_grid(["a"] * 2, label_maps(), images(2, 4)),
    "grid": lambda: grids.image_grid([list(images(3)), list(label_maps(2))], title="t"),
    "weights": weight_maps,
    "reliability": lambda: plotting.reliability_figure(images(2, 3), TIMES, curves()),
    "beta": lambda: plotting.beta_curves([(10, 0.4), (5, 0.4)], curves()),
    "training": lambda: plotting.training_curves({"none": metrics(), "both": metrics()}),
    "long tail": lambda: plotting.long_tail_distribution(frequency()),
    "class accuracy": lambda: plotting.class_accuracy(
        class_rows(), {"without_ltal": "without LTAL", "with_ltal": "with LTAL"}
    ),
    "class table": lambda: plotting.class_table(
        class_rows(), {"with_ltal": "with", "real": "real"}
    ),
    "differences": lambda: effects.difference_figure(*differences()),
    "sweep": lambda: effects.sweep_figure(
        *differences()[:2], {"mask - none": "γ = 5", "text - none": "β ≡ 1"}, "γ = 10"
    ),
    "length": lambda: effects.length_figure(
        differences()[0],
        {"with": [(300, "mask - none"), (1200, "text - none")]},
        "steps",
        ("RFA", "OAA", "Text"),
    ),
    "fairness": lambda: effects.fairness_figure(
        pd.concat([differences()[0][:3].assign(method=m, n=7) for m in ("A, once", "B, once")]),
        {"first": "A", "second": "B"},
        {"once": ("once", "o", plotting.BLUE), "half": ("half", "<", plotting.SKY)},
    ),
    "critics": lambda: effects.critic_figure(
        pd.concat([differences()[0].assign(critic=c) for c in ("independent", "guiding")]),
        {"mask - none": "mask"},
        "text - none",
    ),
    "framework": lambda: framework_diagram(facts()),
}


@pytest.mark.parametrize("name", ALL)
def test_every_figure_is_legible_and_leaves_no_trace(name):
    before = dict(matplotlib.rcParams)
    fig = ALL[name]()
    assert isinstance(fig, Figure) and dict(matplotlib.rcParams) == before
    assert not hasattr(fig, "number")  # unknown to pyplot: no window, no second display
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # glyphs that are missing, layouts that fail
        assert fig._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    # 900 pixels for the whole width: ten pixels and more for a letter's height
    width = fig.get_size_inches()[0]
    texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
    smallest = min(t.get_fontsize() for t in texts)
    assert width <= 10.6 and smallest / 72 * 900 / max(width, 6) >= 9.4
    assert {t.get_fontfamily()[0] for t in texts} == {"sans-serif"}


def texts(fig: Figure) -> list[str]:
    return [t.get_text() for t in fig.findobj(Text)]


def test_rare_boxes_surround_each_part_with_a_margin():
    boxes = grids.rare_boxes(label_maps()[0])
    assert boxes == [(3, 15, 4, 6), (25, 15, 4, 6)]
    assert grids.rare_boxes(label_maps()[0], (CLASS_ID["hat"],)) == []
    corner = torch.zeros(32, 32, dtype=torch.int64)
    corner[:2, 30:] = CLASS_ID["neck_l"]
    assert grids.rare_boxes(corner) == [(29, 0, 3, 3)]  # cut at the border


def test_comparison_boxes_pictures_and_marks_systems_without_any():
    fig = ALL["comparison"]()
    boxes = [p for ax in fig.axes for p in ax.patches if p.get_edgecolor()[:3] == (1, 0, 0)]
    assert len(boxes) == 2 * 2 * 3  # two earrings, two rows; mask, real and EC²Face
    assert texts(fig).count("not run here") == 2
    assert [ax.get_title() for ax in fig.axes[1:5]] == ["mask", "real", "TediGAN", "EC²Face"]


def test_pictures_are_shown_with_their_values():
    red = torch.tensor([1.0, -1.0, -3.0]).view(3, 1, 1).expand(3, 2, 2)
    assert np.array_equal(plotting.picture(red)[0, 0], [1, 0, 0])
    mask = plotting.mask_picture(torch.tensor([[CLASS_ID["skin"]]]))
    assert np.allclose(mask, np.array([204, 0, 0]) / 255)


def test_reliability_shows_estimates_bands_and_beta():
    fig = ALL["reliability"]()
    shown = [ax for sub in fig.subfigs for ax in sub.axes if ax.images]
    assert len(shown) == 2 * 3
    charts = [ax for ax in fig.subfigs[1].axes if ax.lines]
    assert sum(len(ax.collections) for ax in charts) == 2  # a band for each metric
    dashed = next(ax.lines[0] for ax in charts if ax.lines[0].get_linestyle() == "--")
    t = torch.tensor(dashed.get_xdata())
    assert np.allclose(dashed.get_ydata(), beta(t).numpy())
    assert any("t_c$ = 0.4" in text for text in texts(fig))


def test_training_curves_read_the_file_and_smooth(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in metrics().to_dict("records")))
    fig = plotting.training_curves({"both": path}, smoothing=0.5)
    assert [ax.get_title().split(" ")[0] for ax in fig.axes] == ["total", "flow", "mask"]
    logged, mean = (line.get_ydata() for line in fig.axes[0].lines)
    assert np.allclose(logged, metrics()["total"])
    assert mean[0] == logged[0] and mean[1] == pytest.approx((logged[1] + logged[0] / 2) / 1.5)


def test_long_tail_bars_are_sorted_and_coloured_by_group():
    top, bottom = ALL["long tail"]().axes
    assert np.allclose([bar.get_height() for bar in top.patches], frequency()["pixel_share"])
    names = [label.get_text() for label in bottom.get_xticklabels()]
    assert names[0] == "background" and {"earring", "necklace", "glasses"} <= set(names)
    colours = {
        name: bar.get_facecolor() for name, bar in zip(names, top.patches, strict=True)
    }  # fmt: skip
    assert colours["earring"] == colours["necklace"] != colours["cloth"]


def test_class_accuracy_draws_values_intervals_and_the_ceiling():
    fig = ALL["class accuracy"]()
    (ax,) = fig.axes
    first, second = (c for c in ax.containers if type(c).__name__ == "BarContainer")
    assert {bar.get_height() for bar in first} == {50.0}
    assert {bar.get_height() for bar in second} == {51.0}
    ends = first.errorbar.lines[2][0].get_segments()
    assert np.allclose(ends[0][:, 1], [45, 90])
    assert "ceiling: real images" in texts(fig)


def test_class_table_prints_every_value_and_the_support():
    shown = texts(ALL["class table"]())
    assert shown.count("51.0") == NUM_CLASSES and shown.count("52.0") == NUM_CLASSES
    assert "earring  (n = 10)" in shown
    rare = class_rows()[lambda rows: rows["metric"] != "neck_l"]
    assert not any("necklace" in t for t in texts(plotting.class_table(rare, {"real": "real"})))


def test_the_diagram_prints_the_facts_that_it_is_given():
    everything = "\n".join(texts(framework_diagram(facts())))
    for fact in ("rank 16", "216 k", "9.4 %", "= 160 tokens", "4 single", "0.25", "$t_c$=0.3"):
        assert fact in everything, fact
    assert "necklace" in everything or "cloth" in everything  # classes of the weights' bars


def test_groups_have_a_colour_and_a_name_each():
    assert set(plotting.GROUP_COLOURS) == set(plotting.GROUP_NAMES) == set(GROUPS)
