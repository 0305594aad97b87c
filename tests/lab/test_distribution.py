"""Distances of feature sets against scikit-learn's kernels and loops; diversity and presence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

from ec2face_core.attributes import CLASS_ID
from ec2face_lab.study.distribution import cmmd, diversity, kid, paired_draws, presence


def features(n: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, size=(n, 6))


def unbiased(kernel, a: np.ndarray, b: np.ndarray) -> float:
    """Squared MMD by loops over pairs of different pictures."""
    m, n = len(a), len(b)
    xx = sum(kernel(a)[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(b)[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * kernel(a, b).mean()


def test_kid_equals_loops_over_scikit_learns_kernel():
    a, b = features(9), features(12, 0.5, seed=1)
    interval = kid(a, torch.tensor(b), subsets=50)
    expected = unbiased(lambda *x: polynomial_kernel(*x, degree=3), a, b)  # gamma 1 / d, coef0 1
    assert interval.value == pytest.approx(expected) and interval.n == 9
    assert kid(b, a).value == pytest.approx(expected)
    assert kid(a, b, subsets=50) == interval != kid(a, b, subsets=50, seed=1)


def test_cmmd_equals_loops_over_scikit_learns_kernel():
    a, b = features(9), features(12, 0.5, seed=1)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    gamma = 1 / (2 * 10**2)
    expected = 1000 * unbiased(lambda *x: rbf_kernel(*x, gamma=gamma), *unit)
    interval = cmmd(a, b, subsets=50)
    assert interval.value == pytest.approx(expected)
    assert interval.ci_low < expected < interval.ci_high
    assert cmmd(3 * a, b).value == pytest.approx(expected)  # lengths do not count


def test_pairs_are_left_out_where_both_sets_have_the_same_conditions():
    """Pictures that share something with their references: unpaired estimates are too low."""
    a, b = features(8), features(8, 0.5, seed=1)
    kernel = lambda *x: polynomial_kernel(*x, degree=3)  # noqa: E731
    across = kernel(a, b)
    pairs = [across[i, j] for i in range(8) for j in range(8) if i != j]
    expected = unbiased(kernel, a, b) + 2 * across.mean() - 2 * np.mean(pairs)
    assert kid(a, b, subsets=20, paired=True).value == pytest.approx(expected)
    assert kid(a, a, subsets=20, paired=True)[:3] == pytest.approx((0, 0, 0), abs=1e-9)
    with pytest.raises(ValueError, match="no pairs"):
        kid(a, features(9), paired=True)
    rng = np.random.default_rng(3)
    means = {True: [], False: []}
    for _ in range(150):
        common = rng.normal(size=(20, 4))
        both = [common + rng.normal(size=(20, 4)) for _ in range(2)]
        for paired in means:
            means[paired].append(kid(*both, subsets=1, paired=paired).value)
    error = np.std(means[True]) / 150**0.5
    assert abs(np.mean(means[True])) < 3 * error < -np.mean(means[False])


@pytest.mark.parametrize(("metric", "distance"), [("KID", kid), ("CMMD", cmmd)])
def test_draws_of_a_table_are_those_of_the_distance_in_thousandths(metric, distance):
    a, b = features(12), features(12, 0.5, seed=1)
    draws = paired_draws(metric, a, b, subsets=30, seed=2)
    equal = [x / np.linalg.norm(x, axis=1, keepdims=True) * 6**0.5 for x in (a, b)]
    interval = distance(*equal, subsets=30, seed=2, paired=True)
    scale = 1000 if metric == "KID" else 1  # cmmd is in thousandths
    assert draws.shape == (31,) and draws[0] == pytest.approx(scale * interval.value)
    assert np.percentile(draws[1:], 2.5) == pytest.approx(scale * interval.ci_low)


def test_interval_of_halves_is_made_of_estimates_from_halves():
    a, b = features(4), features(4, 1.0, seed=1)
    halves = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    kernel = polynomial_kernel
    all_halves = [unbiased(kernel, a[i], b[j]) for i in halves for j in halves]
    interval = kid(a, b, subsets=20000)
    expected = np.percentile(all_halves, [2.5, 97.5], method="inverted_cdf")
    assert [interval.ci_low, interval.ci_high] == pytest.approx(list(expected))


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_distances_are_unbiased_and_their_intervals_as_wide_as_the_scatter(distance):
    """200 times two sets of one distribution, and of two: means and widths."""
    same = [
        distance(features(60, 0, 2 * i), features(60, 0, 2 * i + 1), 1).value for i in range(200)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5
    assert min(same) < 0 < max(same)
    pairs = [(features(60, 0.3, 2 * i), features(60, 0.8, 2 * i + 1)) for i in range(200)]
    other = [distance(*pair, 1).value for pair in pairs]
    widths = [i.ci_high - i.ci_low for i in (distance(*pair, 200) for pair in pairs[:40])]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(other), rel=0.2)
    assert np.mean(other) > 5 * np.mean(np.abs(same))


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="give \\(m, d\\) and \\(n, d\\)"):
        kid(features(8), features(8)[:, :5])
    with pytest.raises(ValueError, match="four pictures"):
        cmmd(features(8), features(3))


def test_diversity_is_the_mean_over_pairs_of_one_condition():
    samples = torch.randn(5, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).flatten(1).norm(dim=1)

    values = diversity(samples, distance)
    for condition in range(5):
        matrix = torch.cdist(*2 * [samples[condition].flatten(1)])
        assert values[condition].item() == pytest.approx(matrix.sum().item() / 12, rel=1e-5)
    assert diversity(samples[:, :1].expand(-1, 3, -1, -1, -1), distance).tolist() == [0] * 5
    with pytest.raises(ValueError, match="two pictures"):
        diversity(samples[:, :1], distance)


def test_presence_by_hand():
    ring = CLASS_ID["ear_r"]
    hat = CLASS_ID["hat"]
    support = np.zeros((10, 19), dtype=int)
    support[:4, ring] = 5
    support[:, hat] = 1
    predicted = np.zeros((10, 19), dtype=int)
    predicted[[0, 1, 2, 8], ring] = [9, 1, 3, 3]
    table = presence(support, torch.tensor(predicted), minimum=3).set_index("metric")
    assert len(table) == 38
    assert table.loc["presence_ear_r", ["value", "n"]].tolist() == [50, 4]
    row = table.loc["false_presence_ear_r"]
    assert [row.value, row.n] == pytest.approx([100 / 6, 6])
    z = stats.norm.ppf(0.975)  # Wilson's centre and half-width
    centre = (1 / 6 + z**2 / 12) / (1 + z**2 / 6)
    half = z / (1 + z**2 / 6) * np.sqrt(5 / 36 / 6 + z**2 / (4 * 36))
    assert [row.ci_low, row.ci_high] == pytest.approx(
        [100 * (centre - half), 100 * (centre + half)]
    )
    assert table.loc["presence_hat", ["value", "n"]].tolist() == [0, 10]
    assert table.loc["false_presence_hat", "n"] == 0
    assert table.loc["false_presence_hat", ["value", "ci_low", "ci_high"]].isna().all()
    with pytest.raises(ValueError, match="give"):
        presence(support, predicted[:5])
