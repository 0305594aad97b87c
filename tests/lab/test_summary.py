"""Long rows from the scores of several trainings: intervals, families of claims, verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ec2face_core.attributes import CLASSES
from ec2face_core.config import Config
from ec2face_lab.study import summary
from ec2face_lab.study.distribution import paired_draws
from ec2face_lab.study.intervals import (
    bootstrap_interval,
    holm,
    interval_p_values,
    t_interval,
    two_level_accuracy,
    two_level_interval,
)
from ec2face_lab.study.scores import ROLES, counts
from ec2face_lab.study.verdicts import verdict_of

FACES = 30
CONFIG = Config().replace(evaluation={"bootstrap": 200}, seed=5)
LABELS = ("d", "a - b", "faces", CONFIG)


def scores(seed: int, shift: float = 0.0) -> pd.DataFrame:
    """Random scores of one training; masks are the same for all."""
    masks = np.random.default_rng(0).integers(20, 60, size=(FACES, len(CLASSES)))
    masks[5:, CLASSES.index("neck_l")] = 0
    rng = np.random.default_rng(seed)
    table = {"id": [str(i) for i in range(FACES)]}
    table |= {f"text_{role}": rng.normal(40 + shift, 3, FACES) for role in ROLES}
    table |= {"lpips": rng.uniform(size=FACES), "niqe": rng.normal(5, 1, FACES)}
    table["niqe"][0] = np.nan
    found = {f"fact_{name}": 100.0 * (rng.uniform(size=FACES) < 0.7) for name in ("hat", "older")}
    found["fact_hat"][::3] = np.nan
    table |= found
    for i, c in enumerate(CLASSES):
        table[f"support_{c}"] = masks[:, i]
        for role in ROLES:
            correct = rng.binomial(masks[:, i], 0.6 + 0.02 * shift)
            table[f"correct_{role}_{c}"] = correct
            table[f"predicted_{role}_{c}"] = correct + rng.integers(0, 9, FACES)
    return pd.DataFrame(table)


def cell(rows: pd.DataFrame, metric: str, critic: str = "independent") -> pd.Series:
    """The one row of a metric."""
    found = rows[(rows["metric"] == metric) & (rows["critic"] == critic)]
    assert len(found) == 1
    return found.iloc[0]


def test_intervals_over_faces_stay_and_those_over_trainings_stand_beside():
    trainings = [scores(1), scores(2, 1.0), scores(3, 2.0)]
    rows = summary.summarise(trainings, "t", "a", "faces", CONFIG, "42-44")
    text = np.stack([table["text_independent"] for table in trainings])
    row = cell(rows, "Text")
    over_faces = bootstrap_interval(text.mean(0), 200, 5)
    assert row[["value", "ci_low", "ci_high"]].tolist() == pytest.approx(list(over_faces[:3]))
    joint = two_level_interval(text, 200, 5)
    assert row[["joint_low", "joint_high"]].tolist() == pytest.approx([joint[1], joint[2]])
    alone = t_interval(text.mean(1))
    assert row[["t_low", "t_high"]].tolist() == pytest.approx([alone[1], alone[2]])
    assert row["joint_high"] - row["joint_low"] > row["ci_high"] - row["ci_low"]

    stacks = [np.stack(x) for x in zip(*(counts(t, "guiding") for t in trainings), strict=True)]
    expected = two_level_accuracy(stacks, resamples=200, seed=5).set_index("metric")
    for metric in ("OAA", "hair", "F1", "F1_RFA", "mIoU", "iou_neck_l"):
        row = cell(rows, metric, "guiding")
        want = expected.loc[metric]
        assert row["value"] == pytest.approx(want["value"])
        assert row["joint_low"] == pytest.approx(want["ci_low"])
        assert row["t_high"] == pytest.approx(want["t_high"])
        assert row["n"] == want["n"]
    assert not rows["metric"].str.startswith("iou_hair").any(), "of rare classes alone"


def test_a_side_of_one_training_is_held_fixed():
    first = [scores(1), scores(2, 1.0)]
    second = scores(3)
    rows = summary.summarise_difference(first, [second], *LABELS)
    twice = summary.summarise_difference(first, [second, second], *LABELS)
    pd.testing.assert_frame_equal(rows, twice)
    single = [summary.summarise_difference([one], [second], *LABELS) for one in first]
    for metric in ("Text", "OAA", "mIoU"):
        values = [cell(table, metric)["value"] for table in single]
        assert cell(rows, metric)["t_low"] == pytest.approx(t_interval(values).ci_low)
    nothing = summary.summarise_difference(first, first, *LABELS)
    numbers = ["value", "ci_low", "ci_high", "joint_low", "joint_high", "t_low", "t_high"]
    assert np.allclose(nothing[numbers].fillna(0), 0)


def test_facts_are_pooled_over_those_that_captions_mention():
    trainings = [scores(1), scores(2)]
    rows = summary.summarise(trainings, "t", "a", "faces", CONFIG)
    known = pd.concat([t[["fact_hat", "fact_older"]] for t in trainings]).to_numpy()
    assert cell(rows, "Facts")["value"] == pytest.approx(np.nanmean(known))
    assert cell(rows, "fact_hat")["value"] == pytest.approx(np.nanmean(known[:, 0]))
    assert cell(rows, "fact_hat")["n"] == 2 * FACES // 3 and cell(rows, "Facts")["n"] == FACES
    alone = trainings[0][["fact_hat", "fact_older"]].to_numpy()
    streams = np.random.SeedSequence(5).spawn(2)  # of trainings and of faces
    faces = np.random.default_rng(streams[1]).integers(FACES, size=(200, FACES))
    one = summary.summarise(trainings[:1], "t", "a", "faces", CONFIG)
    draws = [np.nanmean(alone[chosen]) for chosen in faces]
    bounds = cell(one, "Facts")[["ci_low", "ci_high"]].tolist()
    assert bounds == pytest.approx(list(np.percentile(draws, [2.5, 97.5])))
    difference = summary.summarise_difference(trainings, trainings[:1], *LABELS)
    expected = np.nanmean(known) - np.nanmean(alone)
    assert cell(difference, "Facts")["value"] == pytest.approx(expected)


def test_distances_of_sets_and_their_differences():
    rng = np.random.default_rng(1)
    real = {role: rng.normal(size=(FACES, 5)) for role in ROLES}
    near, far = ({r: x + s for r, x in real.items()} for s in (0.2, 2.0))
    rows = summary.distance_rows([[near, far]], real, CONFIG, method="a", table="t")
    draws = [
        paired_draws("KID", table["guiding"], real["guiding"], 200, 5) for table in (near, far)
    ]
    row = cell(rows, "KID", "guiding")
    assert row["value"] == pytest.approx(np.mean([d[0] for d in draws]))
    bounds = np.percentile(np.mean(draws, 0)[1:], [2.5, 97.5])
    assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(list(bounds))
    assert row["joint_low"] < row["ci_low"] and row["joint_high"] > row["ci_high"]
    assert cell(rows, "CMMD")["n"] == FACES
    difference = summary.distance_rows([[far], [near]], real, CONFIG, method="a", table="t")
    row = cell(difference, "KID", "guiding")
    assert row["value"] == pytest.approx(draws[1][0] - draws[0][0]) and row["ci_low"] > 0
    assert np.isnan(row["joint_low"])


def claims(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    """Rows of differences with an interval of the given half width."""
    table = pd.DataFrame(rows, columns=["method", "metric", "value", "half"])
    low, high = table["value"] - table["half"], table["value"] + table["half"]
    return table.drop(columns="half").assign(ci_low=low, ci_high=high, critic="independent")


def test_holm_over_the_claims_of_a_table():
    """A claim in recall and F1 has the larger p-value, and 1 where the signs differ."""
    rows = claims(
        ("a", "Text", 1.0, 0.9), ("a", "OAA", 2.0, 0.5), ("a", "F1", 1.0, 1.0),
        ("a", "NFA", 9.0, 0.1), ("b", "RFA", 5.0, 0.5), ("b", "F1_RFA", -5.0, 0.5),
    )  # fmt: skip
    rows = pd.concat([rows, rows.assign(critic="guiding")], ignore_index=True)
    adjusted = summary.with_holm(rows)
    p = interval_p_values(rows["value"], rows["ci_low"], rows["ci_high"])
    expected = holm([p[0], max(p[1], p[2]), 1.0])
    own = adjusted[adjusted["critic"] == "independent"].set_index(["method", "metric"])["p_holm"]
    assert own["a", "Text"] == pytest.approx(expected[0])
    assert own["a", "OAA"] == own["a", "F1"] == pytest.approx(expected[1])
    assert own["b", "RFA"] == own["b", "F1_RFA"] == 1
    assert np.isnan(own["a", "NFA"]) and adjusted.iloc[6:]["p_holm"].isna().all()
    joint = rows.assign(joint_low=rows["value"] - 9, joint_high=rows["value"] + 9)
    assert (summary.with_holm(joint)["p_holm"].dropna() > 0.5).all(), "the wider interval counts"


def test_verdicts_in_recall_and_f1():
    rows = claims(
        ("up", "RFA", 3.0, 1.0), ("up", "F1_RFA", 2.0, 1.0),
        ("painted", "RFA", 3.0, 1.0), ("painted", "F1_RFA", 0.5, 1.0),
        ("split", "RFA", 3.0, 1.0), ("split", "F1_RFA", -2.0, 1.0),
        ("thin", "RFA", 0.5, 1.0), ("thin", "F1_RFA", 2.0, 1.0),
        ("down", "Text", -3.0, 1.0), ("none", "RFA", 0.5, 1.0), ("none", "F1_RFA", 0.5, 1.0),
    )  # fmt: skip
    said = {name: verdict_of(rows, name, "RFA") for name in ("up", "painted", "split")}
    assert said == {
        "up": "higher", "painted": "higher in recall only",
        "split": "higher in recall, lower in F1",
    }  # fmt: skip
    assert verdict_of(rows, "thin", "RFA") == "higher in F1 only"
    assert verdict_of(rows, "down", "Text") == "lower"
    assert verdict_of(rows, "none", "RFA") == "not significant"
    late = rows.assign(p_holm=0.2)
    assert verdict_of(late, "up", "RFA") == "higher before Holm's adjustment"
    wide = rows.assign(joint_low=-9.0, joint_high=9.0)
    assert verdict_of(wide, "up", "RFA") == "not significant"
