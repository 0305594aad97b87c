"""Intervals against theory, loops and scipy, over faces and over trainings; Holm by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import accuracy_row
from scipy import stats

from ec2face_core.attributes import CLASS_ID, CLASSES, NUM_CLASSES, pixel_counts
from ec2face_core.metrics import group_means, mask_accuracy, mask_counts, psnr
from ec2face_lab.study.intervals import (
    bootstrap_accuracy,
    bootstrap_interval,
    holm,
    interval_p_values,
    paired_accuracy_difference,
    t_interval,
    two_level_accuracy,
    two_level_interval,
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

    drawn = torch.as_tensor(np.random.default_rng(5).integers(12, size=(200, 12)))
    naive = [accuracy_row(mask_accuracy(predicted[i], target[i])) for i in drawn]
    naive = pd.DataFrame(naive)
    with_earrings = ["OAA", "RFA", "ear_r"]  # the one class that a resample may lack
    naive.loc[naive["ear_r"].isna(), with_earrings] = np.nan
    whole = accuracy_row(mask_accuracy(predicted, target))
    for metric in ("OAA", "HFA", "NFA", "RFA", "skin", "ear_r"):
        row, draws = table.loc[metric], naive[metric].dropna()
        assert row.value == pytest.approx(whole[metric])
        expected = np.percentile(draws, [2.5, 97.5])
        assert [row.ci_low, row.ci_high] == pytest.approx(list(expected))
    assert table.loc["ear_r", ["n", "pixels"]].tolist() == [3, 3]
    assert table.loc["OAA", ["n", "pixels"]].tolist() == [12, 12 * 36]
    assert table.loc["hair", ["value", "ci_low", "ci_high"]].isna().all()
    assert table.loc["hair", "n"] == 0


def test_a_resample_without_the_rarest_class_is_left_out():
    """Two necklaces in 48 faces: in 13 % of the resamples RFA would be that of earrings alone."""
    support = np.zeros((48, 19))
    support[:, CLASS_ID["ear_r"]] = 10
    support[:2, CLASS_ID["neck_l"]] = 10
    correct = 0.8 * support
    correct[:, CLASS_ID["neck_l"]] = 0
    table = bootstrap_accuracy(correct, support, resamples=2000).set_index("metric")
    row = table.loc["RFA"]
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((40, 40, 40))
    both = np.stack([support, support])
    table = two_level_accuracy([np.stack([correct, correct]), both, both], resamples=2000)
    row = table.set_index("metric").loc["RFA"]
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((40, 40, 40))


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


# --- faces and trainings ---


def drawn_pairs(trainings: int, faces: int, resamples: int, seed: int):
    """The trainings and the faces of each resample, as two streams of one seed."""
    streams = np.random.SeedSequence(seed).spawn(2)
    shapes = ((trainings, (resamples, trainings)), (faces, (resamples, faces)))
    draws = [
        np.random.default_rng(stream).integers(n, size=size)
        for stream, (n, size) in zip(streams, shapes, strict=True)
    ]
    return zip(*draws, strict=True)


def test_two_level_interval_equals_a_loop_that_leaves_out_nan():
    values = np.random.default_rng(1).normal(size=(3, 20))
    values[1, :5] = np.nan
    values[:, 7] = np.nan
    naive = [np.nanmean(values[np.ix_(t, f)]) for t, f in drawn_pairs(3, 20, 200, seed=4)]
    interval = two_level_interval(values, resamples=200, seed=4)
    assert interval.value == pytest.approx(np.nanmean(values)) and interval.n == 19
    assert interval[1:3] == pytest.approx(tuple(np.percentile(naive, [2.5, 97.5])))


def test_two_level_interval_has_the_variance_of_both_levels():
    """A mean of crossed effects has the variance s² (trainings) / 3 + s² (faces) / n."""
    rng = np.random.default_rng(0)
    trainings, faces = 8, 300
    training = rng.normal(0, 0.3, size=(trainings, 1))
    face = rng.normal(0, 2, size=faces)
    interval = two_level_interval(training + face, resamples=4000)
    expected = 2 * 1.96 * np.sqrt(training.var() / trainings + face.var() / faces)
    assert interval.ci_high - interval.ci_low == pytest.approx(expected, rel=0.06)
    one = two_level_interval(face[None], resamples=4000)  # a single training: faces alone
    assert one.ci_high - one.ci_low == pytest.approx(2 * 1.96 * face.std() / faces**0.5, rel=0.06)
    assert two_level_interval(np.full((2, 3), np.nan)).n == 0
    with pytest.raises(ValueError, match="trainings, faces"):
        two_level_interval(face)


def test_two_level_accuracy_equals_pooling_the_drawn_pictures_again():
    _, target = label_maps(10, right=1)
    pictures = [torch.stack([label_maps(10, r, 7 * i)[0] for i in range(2)]) for r in (0.7, 0.5)]
    masks = target.expand(2, *target.shape)
    methods = []
    for parsed in pictures:
        flat = (parsed.flatten(0, 1), masks.flatten(0, 1))
        counts = [*mask_counts(*flat), pixel_counts(flat[0])]
        methods.append([count.reshape(2, 10, NUM_CLASSES) for count in counts])

    def accuracies(parsed: torch.Tensor, t=slice(None), f=slice(None)) -> dict[str, float]:
        accuracy = mask_accuracy(parsed[t][:, f].flatten(0, -2), masks[t][:, f].flatten(0, -2))
        return accuracy_row(accuracy)

    single = two_level_accuracy(methods[0], resamples=100, seed=2).set_index("metric")
    paired = two_level_accuracy(*methods, resamples=100, seed=2).set_index("metric")
    whole = [accuracies(parsed) for parsed in pictures]
    assert list(single.index) == list(paired.index) == list(whole[0])
    naive = [
        [accuracies(parsed, t, f) for t, f in drawn_pairs(2, 10, 100, seed=2)]
        for parsed in pictures
    ]
    first, second = (pd.DataFrame(rows) for rows in naive)
    with_earrings = ["OAA", "RFA", "F1", "F1_RFA", "mIoU", "precision_ear_r"]
    for table in (first, second):  # the one class that a resample may lack
        table.loc[table["ear_r"].isna(), with_earrings] = np.nan
    for metric in ("OAA", "RFA", "skin", "F1", "F1_RFA", "mIoU", "precision_ear_r", "iou_nose"):
        for table, value, draws in (
            (single, whole[0][metric], first[metric]),
            (paired, whole[0][metric] - whole[1][metric], first[metric] - second[metric]),
        ):
            row = table.loc[metric]
            assert row.value == pytest.approx(value)
            bounds = np.percentile(draws.dropna(), [2.5, 97.5])
            assert [row.ci_low, row.ci_high] == pytest.approx(list(bounds))
    names = ["OAA", "RFA", "F1_RFA", "f1_ear_r", "neck_l", "mIoU"]
    assert single.loc[names, "n"].tolist() == [10, 2, 2, 2, 0, 10]
    assert single.loc["precision_hair", ["value", "ci_low", "ci_high"]].isna().all()
    assert len(single) == 4 + 5 + 4 * len(CLASSES)

    other = [methods[1][0], methods[1][1].flip(1), methods[1][2]]
    with pytest.raises(ValueError, match="same masks"):
        two_level_accuracy(methods[0], other)
    with pytest.raises(ValueError, match="trainings, faces, 19"):
        two_level_accuracy(methods[0], [count[:1] for count in methods[1]])


def test_t_interval_equals_that_of_scipy():
    values = [82.1, 83.4, 82.6, np.nan]
    expected = stats.ttest_1samp(values[:3], 0).confidence_interval(0.95)
    interval = t_interval(values)
    assert interval == pytest.approx((np.mean(values[:3]), expected.low, expected.high, 3))
    assert t_interval([1.0])[::3] == (1, 1) and np.isnan(t_interval([1.0]).ci_low)
    assert t_interval([]).n == 0


def test_p_values_of_intervals():
    z = np.array([0.0, 0.5, -1.3, 3.0])
    p = interval_p_values(2 * z, 2 * (z - stats.norm.ppf(0.975)), 2 * (z + stats.norm.ppf(0.975)))
    np.testing.assert_allclose(p, [1, *(2 * stats.norm.cdf(-np.abs(z[1:])))])
    assert interval_p_values(-1.30, -2.38, -0.23) == pytest.approx(0.018, abs=5e-4)
    assert interval_p_values([0, 1], [0, 1], [0, 1]).tolist() == [1, 0]
    assert np.isnan(interval_p_values(np.nan, np.nan, np.nan))


def test_holm_by_hand_and_by_its_step_down_rule():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, np.nan, 0.02, 0.7]), [1, np.nan, 0.06, 1])
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(size=12) ** 4
        rejected = np.zeros(12, dtype=bool)
        for step, claim in enumerate(np.argsort(p)):  # stop at the first that fails
            if p[claim] > 0.05 / (12 - step):
                break
            rejected[claim] = True
        assert ((holm(p) <= 0.05) == rejected).all()
    with pytest.raises(ValueError, match=r"between -0\.1 and 0\.5"):
        holm([0.5, -0.1])


# --- reliability ---


def test_psnr_is_capped_where_nothing_differs():
    image = torch.zeros(1, 3, 4, 4)
    assert psnr(image, image).item() == pytest.approx(106.02, abs=0.01)
