"""Frequencies by hand, intervals against theory and loops, reliability of known velocities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ec2face_core.attributes import CLASS_ID, CLASSES
from ec2face_core.losses import beta
from ec2face_core.metrics import group_means, mask_accuracy, mask_counts, psnr
from ec2face_lab.study.intervals import (
    bootstrap_accuracy,
    bootstrap_interval,
    paired_accuracy_difference,
)
from ec2face_lab.study.long_tail import attribute_frequency
from ec2face_lab.study.reliability import (
    normalised,
    reliability,
    reverse_estimation,
    suggest_center,
)


def label_maps(n: int, right: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Parsed maps that agree with their targets in a share of pixels; a rare class in some."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (n, 6, 6), generator=generator)
    target[::5, 0, 0] = CLASS_ID["ear_r"]
    hit = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed + 1)) < right
    return torch.where(hit, target, (target + 1) % 19), target


# --- frequencies ---


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


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "z": 0.3 * torch.randn(b, 3, 8, 8, generator=generator),
            "label_map": torch.randint(0, 19, (b, 8, 8), generator=generator),
        }
        for b in (3, 2)
    ]


def identity(z):
    return z


def curve_of(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    return table[table.metric == metric]


def test_the_true_velocity_is_reliable_at_every_time(batches):
    def oracle(z_t, t, batch):
        return (z_t - batch["z"]) / t.clamp(min=1e-9).reshape(-1, 1, 1, 1)

    table = reliability(batches, oracle, identity, times=(0.0, 0.3, 1.0))
    assert list(table.columns) == ["t", "metric", "value", "ci_low", "ci_high", "n"]
    assert curve_of(table, "latent_mse").value.max() < 1e-9
    assert (curve_of(table, "psnr").value > 80).all()
    assert (table.n == 5).all()


def test_a_zero_velocity_gives_the_error_that_eq_5_predicts(batches):
    """z_tilde - z = t (noise - z), so the error grows as t squared, from the same noise."""

    def zero(z_t, t, batch):
        return torch.zeros_like(z_t)

    times = (0.0, 0.25, 0.5, 1.0)
    table = reliability(batches, zero, identity, times=times, seed=3)
    error = curve_of(table, "latent_mse").set_index("t").value
    assert error[0.0] == 0
    assert error[0.25] == pytest.approx(error[1.0] / 16, rel=1e-5)
    assert error[0.5] == pytest.approx(error[1.0] / 4, rel=1e-5)
    assert (curve_of(table, "psnr").value.diff().dropna() < 0).all()
    pd.testing.assert_frame_equal(table, reliability(batches, zero, identity, times=times, seed=3))


def test_critics_are_asked_about_the_estimate(batches):
    """A parser that reads the label from the colour, and a CLIP whose features are the pixels."""
    for batch in batches:
        batch["image"] = torch.stack([batch["label_map"] / 10 - 1] * 3, 1)
        batch["z"] = batch["image"].clone()
    parser = SimpleNamespace(parse=lambda x: ((x[:, 0] + 1) * 10).round().long())
    clip = SimpleNamespace(
        image_features=lambda x: torch.nn.functional.normalize(x.flatten(1), dim=1)
    )

    def noisy(z_t, t, batch):
        return torch.zeros_like(z_t)

    table = reliability(
        batches,
        noisy,
        identity,
        times=(0.0, 0.2, 0.9),
        parser=parser,
        clip=clip,
        lpips=lambda x, y: (x - y).abs().mean((1, 2, 3)),
        resamples=50,
    )
    for metric in ("pixel_accuracy", "OAA", "clip_similarity"):
        curve = curve_of(table, metric)
        assert curve.value.iloc[0] == pytest.approx(1 if metric == "clip_similarity" else 100)
        assert (curve.value.diff().dropna() < 0).all()
        assert ((curve.ci_low <= curve.value) & (curve.value <= curve.ci_high)).all()
    assert (curve_of(table, "lpips").value.diff().dropna() > 0).all()

    z_tilde, x_tilde = reverse_estimation(batches[0], 0.0, torch.zeros(()), noisy, identity)
    assert torch.equal(z_tilde, batches[0]["z"]) and torch.equal(x_tilde, z_tilde.clamp(-1, 1))


def test_psnr_is_capped_where_nothing_differs():
    image = torch.zeros(1, 3, 4, 4)
    assert psnr(image, image).item() == pytest.approx(106.02, abs=0.01)


def test_normalised_curves_start_reliable_whatever_their_direction():
    t, psnr_values = [0.0, 0.5, 1.0] * 2, [40.0, 30.0, 20.0]
    values = [*psnr_values, 0.1, 0.2, 0.5]
    metric = ["psnr"] * 3 + ["lpips"] * 3
    low = [v - 5 for v in psnr_values] + [0.1, 0.1, 0.3]
    curves = pd.DataFrame({"t": t, "metric": metric, "value": values, "ci_low": low})
    scaled = normalised(curves)
    assert scaled.value.tolist() == pytest.approx([1, 0.5, 0, 1, 0.75, 0])
    assert scaled.ci_low.tolist() == pytest.approx([0.75, 0.25, -0.25, 1, 1, 0.5])
    assert curves.value.tolist() == values  # the input stays


@pytest.mark.parametrize("falls", [True, False])
def test_suggest_center_recovers_the_modulation(falls):
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    reliable = beta(t, steepness=14.0, center=0.45).numpy()
    value = 12 + 30 * reliable if falls else 0.7 - 0.6 * reliable
    curve = pd.DataFrame({"t": t.numpy(), "metric": "psnr", "value": value}).sample(
        frac=1, random_state=0
    )
    steepness, center = suggest_center(curve)
    assert steepness == pytest.approx(14, rel=0.05) and center == pytest.approx(0.45, abs=0.01)


def test_suggest_center_wants_one_metric():
    curve = pd.DataFrame(
        {"t": [0, 0.5, 1], "metric": ["psnr", "lpips", "psnr"], "value": [3, 2, 1]}
    )
    with pytest.raises(ValueError, match="one metric"):
        suggest_center(curve)
