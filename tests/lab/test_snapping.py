"""Masks in palette colours with smooth edges: every class stays, and only edges change."""

from __future__ import annotations

import numpy as np
import pytest
from face_files import label_map
from PIL import Image

from ec2face_core.attributes import PALETTE
from ec2face_core.io.report import DataError
from ec2face_lab.prepare.snapping import read_snapped, snap_edges

COLOURS = np.array(PALETTE, np.uint8)


def test_smooth_edges_are_snapped(tmp_path):
    face = label_map(128)
    large = Image.fromarray(COLOURS[face]).resize((512, 512), Image.Resampling.BICUBIC)
    expected = face.repeat(4, 0).repeat(4, 1)
    large.save(tmp_path / "0.png")
    snapped = read_snapped(tmp_path / "0.png")
    assert (snapped == expected).mean() > 0.97
    assert set(np.unique(snapped)) == set(np.unique(expected))
    near = np.zeros(face.shape, bool)  # nothing changes away from the borders of classes
    for axis in (0, 1):
        border = np.diff(face, axis=axis, append=0) != 0
        near |= border | np.roll(border, 1, axis)
    inside = ~near.repeat(4, 0).repeat(4, 1)
    assert (snapped == expected)[inside].all()


def test_a_palette_image_with_smooth_edges_is_snapped(tmp_path):
    face = label_map(64)
    large = Image.fromarray(COLOURS[face]).resize((256, 256), Image.Resampling.BILINEAR)
    quantized = large.quantize(256)
    quantized.save(tmp_path / "0.png")
    snapped = read_snapped(tmp_path / "0.png")
    assert (snapped == face.repeat(4, 0).repeat(4, 1)).mean() > 0.97


def test_exact_masks_stay_as_they_are(tmp_path):
    ids = label_map(32)
    assert (snap_edges(COLOURS[ids]) == ids).all()
    for image in (Image.fromarray(ids), Image.fromarray(COLOURS[ids])):
        image.save(tmp_path / "0.png")
        assert (read_snapped(tmp_path / "0.png") == ids).all()


def test_another_palette_is_no_smooth_edge():
    ids = label_map(32)
    rgb = COLOURS[ids].copy()
    rgb[ids == ids.max()] = (128, 128, 128)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for colours in (rgb, noise):
        with pytest.raises(DataError, match="another palette"):
            snap_edges(colours)


def test_one_class_is_no_mask(tmp_path):
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="constant mask"):
        read_snapped(tmp_path / "0.png")
