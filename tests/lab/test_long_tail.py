"""The long tail: frequencies by hand, class weights, and what reductions lose."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ec2face_core.attributes import CLASS_ID, CLASSES
from ec2face_core.config import Config, LossConfig
from ec2face_core.data import FaceDataset
from ec2face_core.io.paths import ROOT
from ec2face_core.losses import class_weights
from ec2face_lab.study import long_tail
from ec2face_lab.study.long_tail import (
    attribute_frequency,
    reduction_table,
    trained_weights,
    weighting_effect,
)


def test_attribute_frequency_by_hand():
    maps = torch.zeros(4, 2, 5, dtype=torch.int64)
    maps[0, 0, :2], maps[1, 0, 0], maps[:, 1] = CLASS_ID["hat"], CLASS_ID["hat"], CLASS_ID["skin"]
    dataset = SimpleNamespace(ids=["0", "1", "2", "3"], label_map=lambda name: maps[int(name)])
    for faces in (maps, dataset):
        table = attribute_frequency(faces).set_index("class")
        assert list(table.index) == list(CLASSES)
        hat, skin, cloth = table.loc["hat"], table.loc["skin"], table.loc["cloth"]
        assert (hat.group, hat.pixels, hat.image_share) == ("NFA", 3, 50)
        assert hat.pixel_share == pytest.approx(100 * 3 / 40)
        assert (skin.group, skin.pixel_share, skin.image_share) == ("HFA", 50, 100)
        assert (cloth.pixels, cloth.pixel_share, cloth.image_share) == (0, 0, 0)
        assert table.pixel_share.sum() == pytest.approx(100)


COUNTING = """
import resource, torch
from types import SimpleNamespace
from ec2face_lab.study.long_tail import attribute_frequency
masks = SimpleNamespace(
    ids=[str(i) for i in range(500)], label_map=lambda _: torch.randint(19, (512, 512))
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attribute_frequency(masks)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_counting_many_masks_keeps_no_memory():
    """A small tensor of each mask, allocated where a large one was freed, kept 2 MB a mask."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 400_000  # kB; 500 masks of 2 MB


def test_weights_and_what_reductions_lose(tiny_faces):
    """Normalised weights have mean square 1; the maximum never lowers a class's weight."""
    dataset = FaceDataset(tiny_faces, "train")
    maps = torch.stack([dataset.label_map(name) for name in dataset.ids])
    counts = dataset.label_counts()
    share = counts.double() / counts.sum()
    clipped = trained_weights(counts, LossConfig(clip=5.0))
    assert (share * clipped**2).sum() == pytest.approx(1)
    present = clipped[counts > 0]
    assert present.max() / present.min() <= 5 / class_weights(counts)[counts > 0].min() + 1e-9
    assert torch.equal(trained_weights(counts, LossConfig(normalize="none")), class_weights(counts))

    config = Config().replace(backbone={"path": "nowhere"}, data={"size": 64})
    kept = reduction_table(maps, counts, config).set_index(["reduction", "class"])
    assert (
        np.allclose(kept.loc["max", "kept"], 100, atol=1e-3)
        and (kept.loc["max", "lost"] == 0).all()
    )
    assert kept.loc[("mean", "skin"), "kept"] > kept.loc[("mean", "l_brow"), "kept"]

    effect = weighting_effect(maps, counts, config, clips=(5.0,)).set_index("weights")
    assert effect.loc["normalised", "factor"] == pytest.approx(1)
    same = ["largest", "rare_share", "effective_cells"]  # a common factor changes none of these
    assert np.allclose(effect.loc["raw", same], effect.loc["normalised", same])
    assert (
        effect.iloc[2][["largest", "rare_share"]] < effect.iloc[1][["largest", "rare_share"]]
    ).all()


def test_sentences_of_the_long_tail():
    frequency = pd.DataFrame({"class": ["skin", "ear_r", "hat"], "pixel_share": [30.0, 0.1, 0.0]})
    assert "skin has 300 times the pixels of earring" in long_tail.describe_frequency(frequency)
    reductions = pd.DataFrame(
        [
            ("ear_r", "max", 100.0, 0.0), ("ear_r", "mean", 40.0, 5.0),
            ("ear_r", "nearest", 30.0, 25.0),
        ],
        columns=["class", "reduction", "kept", "lost"],
    )  # fmt: skip
    said = long_tail.describe_reductions(reductions)
    assert "earrings: mean 40 %, nearest 30 % (lost in 5 % and 25 % of the faces)" in said
