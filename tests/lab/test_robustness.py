"""Altered masks, masks against text, and pairs that training hardly ever saw."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ec2face_core.attributes import CLASS_ID, CLASSES
from ec2face_core.data import FaceDataset
from ec2face_lab.study import robustness
from ec2face_lab.study.robustness import (
    EDITS,
    describe_conflicts,
    describe_hand_drawn,
    describe_pairs,
    edited,
    rarest_pairs,
)


def target() -> torch.Tensor:
    """A 64 px mask: background, a disk of skin, a square hat on it, and a ring as earring."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    ids = torch.zeros(64, 64, dtype=torch.long)
    ids[(x - 32) ** 2 + (y - 36) ** 2 < 400] = CLASS_ID["skin"]
    ids[4:20, 20:44] = CLASS_ID["hat"]
    far = ((x - 56) ** 2 + (y - 50) ** 2).sqrt()
    ids[(far < 5) & (far > 2.5)] = CLASS_ID["ear_r"]
    return ids


def area(ids: torch.Tensor, name: str) -> int:
    return int((ids == CLASS_ID[name]).sum())


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_keeps_size_type_and_classes(edit):
    ids = target()
    out = edited(ids, edit)
    assert out.shape == ids.shape and out.dtype == torch.int64
    assert set(out.unique().tolist()) == set(ids.unique().tolist())
    assert (out == ids).float().mean() > 0.9  # a small change


def test_what_each_edit_does():
    ids = target()
    assert torch.equal(edited(ids, "as parsed"), ids)
    # a disk of radius 1 widens the square's sides by 1 pixel each (rounded corners: 4 missing)
    assert area(edited(ids, "dilated"), "hat") == pytest.approx(26 * 18, abs=8)
    # half a pixel off each side, which the nearest sample rounds to one pixel a direction
    assert area(edited(ids, "eroded"), "hat") == pytest.approx(23 * 15, abs=4)
    assert area(edited(ids, "eroded"), "skin") > area(ids, "skin")
    moved = edited(ids, "jittered")
    assert not torch.equal(moved, ids) and area(moved, "hat") == pytest.approx(16 * 24, rel=0.15)
    polygon = edited(ids, "polygons")
    assert area(polygon, "hat") == pytest.approx(16 * 24, abs=8)  # straight already
    assert not torch.equal(polygon, ids)  # circles are not
    centre = (50, 56)
    assert polygon[centre] == CLASS_ID["background"]  # the ring stays a ring


def test_edits_scale_with_the_mask():
    """The same brush on the same mask at twice the resolution."""
    ids = target()
    large = torch.from_numpy(np.kron(ids.numpy(), np.ones((2, 2), np.int64)))
    for edit in ("dilated", "eroded"):
        small = edited(ids, edit)
        assert (edited(large, edit)[::2, ::2] == small).float().mean() > 0.95


def test_rarest_pairs(tiny_faces):
    dataset = FaceDataset(tiny_faces, "train")
    names = ("hair", "neck", "cloth")
    found = rarest_pairs(dataset, names)
    assert [n for _, _, n in found] == sorted(n for _, _, n in found) and len(found) == 3
    for a, b, n in found:
        maps = [dataset.label_map(name) for name in dataset.ids]
        expected = sum(area(m, a) > 0 and area(m, b) > 0 for m in maps)
        assert n == expected


def test_conflicts_fill_every_cell(tiny_config, monkeypatch):
    """Pictures that obey the mask: the table has to say that the mask decides."""

    def obedient(config, method, name, prompts, masks, seeds):
        return masks[:, None, None].float().expand(-1, 1, 3, -1, -1)

    class Parser:
        device = "cpu"

        def parse(self, images):
            return images[:, 0].long()

    monkeypatch.setattr(robustness, "sample_grid", obedient)
    models = SimpleNamespace(parsers={"independent": Parser()})
    monkeypatch.setattr(robustness, "perception_models", lambda config: models)
    monkeypatch.setattr(robustness, "WORDS", {"hair": ("hair",)})
    rows, shown = robustness.conflicts(tiny_config, "both", count=3)
    table = rows.set_index(["class", "mask", "text"])["value"]
    assert (table.xs(True, level="mask") == 100).all()
    for name, has, says in shown:
        caption, given, _ = shown[name, has, says]
        assert has == (area(given, name) > 0) and says == ("hair" in caption.lower())


def test_sentences():
    rows = pd.DataFrame(
        [
            {"method": e, "metric": m, "critic": "independent", "value": v - (e == "dilated")}
            for e in EDITS
            for m, v in (("skin", 80.0), ("hair", 40.0))
        ]
    )
    wiped_out = {"method": "eroded", "metric": "neck_l", "critic": "independent", "value": 0.0}
    rows = pd.concat([rows, pd.DataFrame([wiped_out])])  # not in the masks of the other edits
    assert "against 60.0 with masks as parsed: dilated -1.0, eroded +0.0" in describe_hand_drawn(
        rows
    )
    cells = [("hat", True, False, 90.0), ("hat", False, True, 5.0)]
    fights = pd.DataFrame(cells, columns=["class", "mask", "text", "value"])
    assert (
        "90 % of the pictures show it if only the mask has it, 5 % if only the text has it"
        in describe_conflicts(fights)
    )
    pairs = pd.DataFrame(
        [{"class": "hat", "beside": "neck_l", "gain": -20.0, "ci_low": -31.0, "ci_high": -9.0}]
    )
    assert "hat beside necklace -20 [-31, -9]" in describe_pairs(pairs)
    assert len(CLASSES) == 19


def test_a_share_of_all_pictures_has_an_interval():
    share = robustness.share(12, 12)
    assert share["value"] == share["ci_high"] == 100 and 70 < share["ci_low"] < 80


def test_accessories_are_counted_in_pictures_whose_caption_names_them(tiny_config, monkeypatch):
    class Parser:
        device = "cpu"

        def parse(self, images):
            return images[:, 0].long()

    models = SimpleNamespace(parsers={"independent": Parser()})
    monkeypatch.setattr(robustness, "perception_models", lambda config: models)
    images = torch.zeros(3, 4, 3, 16, 16)
    images[0, 0, 0, :8] = CLASS_ID["hat"]
    images[1, :, 0, :8] = CLASS_ID["hat"]  # not asked for
    texts = ["She wears a hat.", "She smiles.", "He wears a hat."]
    rows = robustness.named_accessories(tiny_config, texts, images)
    assert list(rows["class"]) == ["hat"]
    assert rows["n"][0] == 8 and rows["value"][0] == 100 / 8
