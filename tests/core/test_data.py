"""The data contract: readers, `FaceDataset` and `open_dataset`."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from face_files import label_map, save_mask, write_root
from PIL import Image

from ec2face_core.attributes import CLASS_ID, PALETTE, pixel_counts
from ec2face_core.config import ConfigError, load_profile
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.io.masks import labels_from_palette
from ec2face_core.io.report import DataError
from ec2face_lab.prepare.validate import validate


@pytest.fixture
def root(tmp_path) -> Path:
    return write_root(tmp_path / "faces")


def test_items(root):
    faces = FaceDataset(root, "train")
    assert faces.ids == ["0", "1", "2", "3"] and len(faces) == 4
    face = faces[1]
    pixels = np.array(Image.open(root / "image" / "1.png"))
    assert face.image.dtype == torch.float32
    assert torch.equal(
        ((face.image + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels)
    )
    assert face.label_map.dtype == torch.int64
    assert np.array_equal(face.label_map, np.roll(label_map(), 1, axis=1))
    assert face.captions == ("First, 1.", "Second of 1.")
    assert faces.manifest_caption("1") == "Second of 1."
    assert FaceDataset(root, "test").ids == ["4", "5"]
    assert len(FaceDataset(root, None)) == 6 and FaceDataset(root, None, limit=3).ids == [
        "0",
        "1",
        "2",
    ]


def test_resizing(root):
    small = FaceDataset(root, "train", size=8)[0]
    assert small.image.shape == (3, 8, 8) and small.label_map.shape == (8, 8)
    assert set(small.label_map.unique().tolist()) <= set(np.unique(label_map()).tolist())
    assert small.image.abs().max() <= 1
    # antialiased: halving noise averages it, subsampling would keep its spread
    assert small.image.std() < 0.75 * FaceDataset(root, "train")[0].image.std()
    larger = FaceDataset(root, "train", size=32)[0]
    assert np.array_equal(larger.label_map, label_map(32))


def test_label_counts(root):
    faces = FaceDataset(root, "train")
    expected = pixel_counts(torch.stack([face.label_map for face in faces])).sum(0)
    counts = faces.label_counts()
    assert counts.dtype == torch.int64 and torch.equal(counts, expected)
    counts += 1  # the cache is not handed out
    assert torch.equal(faces.label_counts(), expected)


def test_opening_names_what_is_missing(root):
    with pytest.raises(DataError, match=r"'val'.*'train': 4"):
        FaceDataset(root, "val")
    (root / "image" / "2.png").unlink()
    (root / "text" / "3.txt").unlink()
    with pytest.raises(DataError) as caught:
        FaceDataset(root, "train")
    assert [where for where, _ in caught.value.report.problems] == ["image/2.png", "text/3.txt"]
    assert FaceDataset(root, "test")[0].id == "4"


def test_a_bad_item_names_its_file(root):
    save_mask(root / "mask" / "0.png", np.full((16, 16), 3, np.uint8))
    with pytest.raises(DataError, match=r"mask.0\.png: constant mask"):
        FaceDataset(root)[0]


def test_colours_near_and_far():
    ids = label_map()
    rgb = np.array(PALETTE)[ids]
    noisy = (
        (rgb + np.random.default_rng(0).integers(-8, 9, rgb.shape)).clip(0, 255).astype(np.uint8)
    )
    assert np.array_equal(labels_from_palette(noisy), ids)
    rgb[ids == CLASS_ID["mouth"]] = (51, 255, 255)  # another CelebAMask-HQ tool's r_brow
    with pytest.raises(DataError, match=r"\(51, 255, 255\).*another palette"):
        labels_from_palette(rgb.astype(np.uint8))


def test_open_dataset(tmp_path):
    data = {
        "root": str(tmp_path / "first"),
        "zero_shot_root": str(tmp_path / "second"),
        "train": 3,
        "test": 2,
        "zero_shot": 2,
        "validation": 2,
        "rare": 40,
        "size": 32,
    }
    config = load_profile("smoke", data=data)
    train, test = open_dataset(config, "train"), open_dataset(config, "test")
    zero_shot = open_dataset(config, "zero_shot")
    assert (len(train), len(test), len(zero_shot)) == (3, 2, 2)
    assert not set(train.ids) & set(test.ids)
    assert train[0].image.shape == (3, 32, 32) and len(train[0].captions) == 10
    assert len(zero_shot[0].captions) == 9
    assert not validate(tmp_path / "first").problems
    validation = open_dataset(config, "validation")
    assert len(validation) == 2 and not validation[0].image.equal(train[0].image)
    rare = open_dataset(config, "rare")
    with open(rare.root / "attributes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(rare) == 40
    for name, least in (("hat", 5), ("eyeglasses", 5), ("earrings", 14), ("necklace", 10)):
        assert sum(int(row[name]) for row in rows) >= least, name  # at least twice the natural
    kept = ["first", "first-rare", "first-validation", "second"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    with pytest.raises(DataError, match=r"rare has no faces: set data\.rare"):
        open_dataset(config.replace(**{"data.rare": 0}), "rare")
    four = config.replace(**{"data.train": 4})
    with pytest.raises(ConfigError, match=r"another recipe \(splits .*'train': 3.*'train': 4"):
        open_dataset(four, "train")
    (tmp_path / "first" / "faces.json").unlink()  # as former versions made it
    with pytest.raises(DataError, match=r"data\.train asks for 4"):
        open_dataset(four, "train")
    with pytest.raises(DataError, match=r"--help.*data\.root"):
        open_dataset(load_profile("paper", **{"data.root": str(tmp_path / "none")}), "train")
    with pytest.raises(DataError, match="'val'"):
        open_dataset(config, "val")
