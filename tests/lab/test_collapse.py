"""Measures that fall when faces become alike, and the rule that weighs a gain against them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from ec2face_core.attributes import CLASS_ID
from ec2face_lab.study.collapse import (
    BETTER,
    COLLAPSED,
    NO_GAIN,
    PARTS,
    colour_spread,
    part_colours,
    plus_verdict,
)


def test_colours_are_means_over_the_mask_and_spread_is_their_deviation():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 20, 20, generator=generator) * 2 - 1
    maps = torch.randint(0, 19, (5, 20, 20), generator=generator)
    maps[3][maps[3] == CLASS_ID["hair"]] = CLASS_ID["neck"]
    maps[3, 0, 0] = CLASS_ID["hair"]  # one of 400 pixels is too few
    colours = part_colours(images, maps)
    hair = PARTS.index("hair")
    assert colours[3, hair].isnan().all()
    for i, part in ((0, "skin"), (1, "background"), (4, "hair")):
        inside = (maps[i] == CLASS_ID[part]).numpy()
        expected = images[i].numpy()[:, inside].mean(1)
        assert np.allclose(colours[i, PARTS.index(part)], expected, atol=1e-6)
    known = colours[[0, 1, 2, 4], hair].numpy()
    expected = np.sqrt(known.var(0, ddof=1).sum())
    assert colour_spread(colours)[hair].item() == pytest.approx(expected, rel=1e-5)


def test_equal_faces_have_no_spread():
    image = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    maps = torch.full((4, 8, 8), CLASS_ID["skin"])
    assert colour_spread(part_colours(image, maps))[0] < 1e-6


def rows(values: dict[str, float], width: float | None = None) -> pd.DataFrame:
    frame = pd.DataFrame({"metric": list(values), "value": list(values.values())})
    frame["critic"] = "independent"
    frame["ci_low"] = np.nan if width is None else frame["value"] - width
    frame["ci_high"] = np.nan if width is None else frame["value"] + width
    return frame


CONTROL = {
    "mIoU": 60.0, "OAA": 90.0, "HFA": 96.0, "Text": 30.0, "Facts": 90.0, "KID": 1.0,
    "Diversity": 0.2, "spread of skin": 0.5, "fact_beard": 80.0,
}  # fmt: skip
GAIN = {"mIoU": 2.0, "OAA": 1.0, "HFA": 0.1, "Text": 0.1, "Facts": 1.0}


def judge(changes: dict[str, float], training: float = 0.0) -> tuple[str, list[str]]:
    """The verdict on the gains of `GAIN` with other changes; `training`: added to one training."""
    gains = {name: 0.0 for name in CONTROL} | GAIN | changes
    scores = {name: CONTROL[name] + gain for name, gain in gains.items()}
    other = {name: gain + training for name, gain in gains.items()}
    alone = [rows(gains, 0.5), rows(other, 0.5), rows(gains, 0.5)]
    # spreads have no interval
    differences = rows({k: v for k, v in gains.items() if not k.startswith("spread")}, 0.3)
    return plus_verdict(rows(scores), differences, alone, rows(CONTROL))


def test_a_gain_in_all_is_better():
    assert judge({}) == (BETTER, [])
    assert judge({"Facts": 0.0, "Text": 1.0})[0] == BETTER, "Text serves as well as Facts"


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"mIoU": 1.4}, "mIoU +1.40"),
        ({"OAA": 0.5}, "OAA"),
        ({"Facts": 0.5}, "Text +0.10 and Facts +0.50"),
        ({"HFA": -0.4}, "HFA falls by 0.40"),
    ],
)
def test_what_is_not_gained_is_said(changes, word):
    verdict, against = judge(changes)
    assert verdict == NO_GAIN and len(against) == 1 and word in against[0]


def test_every_training_has_to_gain():
    assert judge({}, training=-0.6)[0] == NO_GAIN


@pytest.mark.parametrize(
    "changes",
    [
        {"spread of skin": -0.02},
        {"fact_beard": -8.0},
        {"Diversity": -0.31},
        {"KID": 0.4},
        {"Text": -0.7},
    ],
)
def test_a_gain_by_collapse_is_none(changes):
    verdict, against = judge(changes)
    assert verdict == COLLAPSED and f"{next(iter(changes))} is" in against[0]


def test_what_varies_by_chance_is_no_collapse():
    assert judge({"KID": 0.2})[0] == BETTER, "its interval includes 0"
    assert judge({"spread of skin": -0.005})[0] == BETTER, "one percent"
    assert judge({"KID": -0.5, "spread of skin": 0.1})[0] == BETTER, "better than the control"
