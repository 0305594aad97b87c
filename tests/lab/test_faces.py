"""Faces are chosen by their masks; rare parts are counted in pictures."""

from __future__ import annotations

import pytest
import torch

from ec2face_core.attributes import CLASS_ID, pixel_counts
from ec2face_core.data import FaceDataset
from ec2face_lab.study import faces


def test_faces_are_chosen_by_their_masks(tiny_faces):
    """Each wanted class is there, at its median area or more; nothing is chosen twice."""
    dataset = FaceDataset(tiny_faces, "train")
    areas = torch.stack([pixel_counts(dataset.label_map(n)[None])[0] for n in dataset.ids])
    wanted = ["hair", "nose", "hair", "ear_r"]
    ids = faces.pick_faces(dataset, wanted, skip=dataset.ids[:1])
    assert len(set(ids)) == 4 and dataset.ids[0] not in ids
    for name, c in zip(ids, wanted, strict=True):
        column = areas[:, CLASS_ID[c]]
        assert column[dataset.ids.index(name)] >= (
            column[column > 0].median() if c != "ear_r" else 0
        )
    captions, maps, images = faces.faces(dataset, ids)
    assert len(captions) == len(maps) == len(images) == 4


class Reader:
    """A parser that takes a picture's first plane as its parse."""

    device = "cpu"

    def parse(self, images):
        return images[:, 0].long()


def test_rare_parts_found_in_the_pictures_of_each_system():
    maps = torch.ones(2, 4, 4, dtype=torch.long)
    maps[0, 0] = CLASS_ID["ear_r"]
    perfect = maps[:, None].expand(-1, 3, -1, -1).float()
    worse = perfect.clone()
    worse[0, :, 0, :3] = 0  # three of the four earring pixels are missing
    worse[1, :, 0, 0] = 0  # and one of 28 others
    systems = {"worse": worse, "none": None, "perfect": perfect}
    table = faces.rare_parts_found(Reader(), maps, systems)
    assert list(table.index) == ["perfect", "worse"] and list(table) == ["earrings", "all else"]
    assert table.loc["worse", "earrings"] == 25
    assert table.loc["worse", "all else"] == pytest.approx(100 * 27 / 28)
    assert (table.loc["perfect"] == 100).all()
