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


CONFLICTS = {
    (name, has, says): ("a caption", label_maps()[0], images(1)[0])
    for name in ("eye_g", "hat", "ear_r")
    for has in (True, False)
    for says in (True, False)
}

ALL = {
    "comparison": comparison,
    "unimodal": lambda: grids.unimodal_grid(["text"], images(1, 3), label_maps(2), images(2, 3)),
    "diversity": lambda: grids.diversity_grid(["a"] * 2, label_maps(), images(2, 4)),
    "grid": lambda: grids.image_grid([list(images(3)), list(label_maps(2))], title="t"),
    "weights": weight_maps,
    "conflicts": lambda: grids.conflict_blocks(CONFLICTS, dict.fromkeys(CONFLICTS, 75.0)),
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


def test_comparison_boxes_and_enlarges_rare_parts_and_marks_systems_without_any():
    fig = comparison()
    boxes = [p for ax in fig.axes for p in ax.patches if p.get_edgecolor()[:3] == (1, 0, 0)]
    assert len(boxes) == 2 * 2  # two earrings, two rows; on the mask alone
    zooms = [[child for child in ax.child_axes if child.images] for ax in fig.axes[1:5]]
    assert [len(children) for children in zooms] == [1, 1, 0, 1]  # not where nothing was run
    assert zooms[0][0].images[0].get_size() == (6, 6)  # the square around a box of 4 x 6
    assert texts(fig).count("not run here") == 2
    assert [ax.get_title() for ax in fig.axes[1:5]] == ["mask", "real", "TediGAN", "EC²Face"]


def test_the_legend_names_the_classes_of_the_masks_alone():
    names = {text for text in texts(comparison())}
    assert {"background", "skin", "earring"} <= names and "hair" not in names


def test_conflicts_have_a_block_for_each_class_with_both_conditions_on_its_sides():
    shown = texts(ALL["conflicts"]())
    assert [name for name in shown if name in ("glasses", "hat", "earring")] == [
        "glasses",
        "hat",
        "earring",
    ]
    assert shown.count("mask: yes") == shown.count("text: no") == 3
    assert shown.count("75 % show it") == 12


def test_rare_details_are_cut_out_of_the_same_place():
    maps = label_maps()
    pictures = images(2)
    pictures[:, 0] = maps.float()
    cut = grids.rare_details(maps, {"with": pictures})
    assert list(cut) == ["mask", "with"] and len(cut["with"]) == 2
    assert cut["mask"][0].shape == cut["with"][0].shape == (6, 6, 3)
    assert (cut["with"][0][..., 0] == 1).any()  # an earring's pixel, in [0, 1]
