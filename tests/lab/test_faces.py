"""Faces are chosen by their masks; the sentence about rare parts counts pixels."""

from __future__ import annotations

from types import SimpleNamespace

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


def test_sentence_of_rare_parts(monkeypatch):
    models = SimpleNamespace(parsers={"independent": Reader()})
    monkeypatch.setattr(faces, "perception_models", lambda config: models)
    maps = torch.ones(2, 4, 4, dtype=torch.long)
    maps[0, 0] = CLASS_ID["ear_r"]
    pictures = maps[:, None].expand(-1, 3, -1, -1).float().clone()
    pictures[0, :, 0, :3] = 0  # three of the four earring pixels are missing
    assert "25 % of the earrings; 100 %" in faces.describe_rare_parts(None, maps, pictures)
