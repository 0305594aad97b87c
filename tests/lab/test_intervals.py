"""Frequencies by hand, intervals against theory and loops, reliability of known velocities."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from ec2face_core.attributes import CLASS_ID
from ec2face_core.metrics import group_means, mask_accuracy, mask_counts, psnr
from ec2face_lab.study.intervals import (
    bootstrap_accuracy,
    bootstrap_interval,
    paired_accuracy_difference,
)


def label_maps(n: int, right: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Parsed maps that agree with their targets in a share of pixels; a rare class in some."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (n, 6, 6), generator=generator)
    target[::5, 0, 0] = CLASS_ID["ear_r"]
    hit = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed + 1)) < right
    return torch.where(hit, target, (target + 1) % 19), target


# --- frequencies ---


# --- intervals ---


def test_interval_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = bootstrap_interval(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.n == 400
    assert interval.value - interval.ci_low == pytest.approx(half, rel=0.1)
    assert interval.ci_high - interval.value == pytest.approx(half, rel=0.1)
    assert interval == bootstrap_interval(torch.tensor(values), resamples=4000)  # same seed
    assert interval != bootstrap_interval(values, resamples=4000, seed=1)


def test_interval_leaves_out_nan():
    assert bootstrap_interval([1.0, np.nan, 1.0])[:4] == (1, 1, 1, 2)
    assert bootstrap_interval([np.nan]).n == 0


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        interval = bootstrap_interval(rng.exponential(1.0, size=80), resamples=300, seed=trial)
        hits += interval.ci_low <= 1 <= interval.ci_high
    assert 0.89 < hits / 300 < 0.99


def test_group_means_skip_absent_classes():
    per_class = np.full((2, 19), np.nan)
    per_class[0, [0, 1, 2]] = 90, 70, 20
    means = group_means(per_class)
    assert means["OAA"][0] == pytest.approx(60) and means["HFA"][0] == pytest.approx(80)
    assert means["NFA"][0] == 20 and np.isnan(means["RFA"]).all() and np.isnan(means["OAA"][1])


def test_bootstrap_accuracy_equals_pooling_the_drawn_images_again():
    predicted, target = label_maps(12, right=0.6)
    table = bootstrap_accuracy(*mask_counts(predicted, target), resamples=200, seed=5)
    table = table.set_index("metric")

    drawn = np.random.default_rng(5).integers(12, size=(200, 12))
    naive = [mask_accuracy(predicted[i], target[i]).as_dict() for i in torch.as_tensor(drawn)]
    naive = pd.DataFrame(naive)
    whole = mask_accuracy(predicted, target).as_dict()
    for metric in ("OAA", "HFA", "NFA", "RFA", "skin", "ear_r"):
        row, draws = table.loc[metric], naive[metric].dropna()
        assert row.value == pytest.approx(whole[metric])
        expected = np.percentile(draws, [2.5, 97.5])
        assert [row.ci_low, row.ci_high] == pytest.approx(list(expected))
    assert table.loc["ear_r", ["n", "pixels"]].tolist() == [3, 3]
    assert table.loc["OAA", ["n", "pixels"]].tolist() == [12, 12 * 36]
    assert table.loc["hair", ["value", "ci_low", "ci_high"]].isna().all()
    assert table.loc["hair", "n"] == 0


def test_paired_difference_is_sharper_than_two_intervals():
    predicted, target = label_maps(200, right=0.6)
    hard = torch.arange(200) % 2 == 0  # images differ much, methods little
    predicted[hard] = (target[hard] + 1) % 19
    better = predicted.clone()
    better[:, 0, 1] = target[:, 0, 1]
    first, second = mask_counts(better, target), mask_counts(predicted, target)
    row = paired_accuracy_difference(first, second).set_index("metric").loc["OAA"]
    a, b = (
        bootstrap_accuracy(*counts).set_index("metric").loc["OAA"] for counts in (first, second)
    )
    assert row.value == pytest.approx(a.value - b.value)
    assert 0 < row.ci_low < row.value < row.ci_high
    assert row.ci_high - row.ci_low < 0.7 * (a.ci_high - a.ci_low)

    same = paired_accuracy_difference(first, first).set_index("metric").loc["OAA"]
    assert (same.value, same.ci_low, same.ci_high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same images"):
        paired_accuracy_difference(first, [x.flip(0) for x in second])


# --- reliability ---


def test_psnr_is_capped_where_nothing_differs():
    image = torch.zeros(1, 3, 4, 4)
    assert psnr(image, image).item() == pytest.approx(106.02, abs=0.01)
