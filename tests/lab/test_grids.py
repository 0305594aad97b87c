"""Grids of pictures: boxes, missing systems, every grid legible."""

from __future__ import annotations

import pytest
import torch
from figure_checks import assert_legible, images, label_maps, texts
from matplotlib.figure import Figure

from ec2face_core.attributes import CLASS_ID, NUM_CLASSES
from ec2face_core.losses import long_tail_weights
from ec2face_lab.plots import grids


def comparison() -> Figure:
    systems = {"TediGAN": None, "EC²Face": images(2)}
    return grids.comparison_grid(["a caption"] * 2, label_maps(), systems, real=images(2))


def weight_maps() -> Figure:
    maps = label_maps()
    counts = torch.bincount(maps.flatten(), minlength=NUM_CLASSES)
    return grids.weights_map(images(2), maps, {"pixels": long_tail_weights(maps, counts)})


ALL = {
    "comparison": comparison,
    "unimodal": lambda: grids.unimodal_grid(["text"], images(1, 3), label_maps(2), images(2, 3)),
    "diversity": lambda: grids.diversity_grid(["a"] * 2, label_maps(), images(2, 4)),
    "grid": lambda: grids.image_grid([list(images(3)), list(label_maps(2))], title="t"),
    "weights": weight_maps,
}


@pytest.mark.parametrize("name", ALL)
def test_every_grid_is_legible(name):
    assert_legible(ALL[name])


def test_rare_boxes_surround_each_part_with_a_margin():
    boxes = grids.rare_boxes(label_maps()[0])
    assert boxes == [(3, 15, 4, 6), (25, 15, 4, 6)]
    assert grids.rare_boxes(label_maps()[0], (CLASS_ID["hat"],)) == []
    corner = torch.zeros(32, 32, dtype=torch.int64)
    corner[:2, 30:] = CLASS_ID["neck_l"]
    assert grids.rare_boxes(corner) == [(29, 0, 3, 3)]  # cut at the border


def test_comparison_boxes_pictures_and_marks_systems_without_any():
    fig = comparison()
    boxes = [p for ax in fig.axes for p in ax.patches if p.get_edgecolor()[:3] == (1, 0, 0)]
    assert len(boxes) == 2 * 2 * 3  # two earrings, two rows; mask, real and EC²Face
    assert texts(fig).count("not run here") == 2
    assert [ax.get_title() for ax in fig.axes[1:5]] == ["mask", "real", "TediGAN", "EC²Face"]
