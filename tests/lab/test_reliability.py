"""Reverse estimation of known velocities, and the fit of beta(t) to its curves."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ec2face_core.config import Config
from ec2face_core.losses import beta
from ec2face_lab.study.gradients import describe_gradient_factor
from ec2face_lab.study.reliability import (
    describe_fits,
    fitted_beta,
    gradient_weights,
    normalised,
    reliability,
    reverse_estimation,
    suggest_center,
)


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


def model(velocity) -> SimpleNamespace:
    """A model whose latents are its images."""
    return SimpleNamespace(velocity=velocity, decode=lambda z: z)


def curve_of(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    return table[table.metric == metric]


def test_the_true_velocity_is_reliable_at_every_time(batches):
    def oracle(z_t, t, batch):
        return (z_t - batch["z"]) / t.clamp(min=1e-9).reshape(-1, 1, 1, 1)

    table = reliability(batches, model(oracle), times=(0.0, 0.3, 1.0))
    assert list(table.columns) == ["t", "metric", "value", "ci_low", "ci_high", "n"]
    assert curve_of(table, "latent_mse").value.max() < 1e-9
    assert (curve_of(table, "psnr").value > 80).all()
    assert (table.n == 5).all()


def test_a_zero_velocity_gives_the_error_that_eq_5_predicts(batches):
    """z_tilde - z = t (noise - z), so the error grows as t squared, from the same noise."""

    def zero(z_t, t, batch):
        return torch.zeros_like(z_t)

    times = (0.0, 0.25, 0.5, 1.0)
    table = reliability(batches, model(zero), times=times, seed=3)
    error = curve_of(table, "latent_mse").set_index("t").value
    assert error[0.0] == 0
    assert error[0.25] == pytest.approx(error[1.0] / 16, rel=1e-5)
    assert error[0.5] == pytest.approx(error[1.0] / 4, rel=1e-5)
    assert (curve_of(table, "psnr").value.diff().dropna() < 0).all()
    pd.testing.assert_frame_equal(table, reliability(batches, model(zero), times=times, seed=3))


def test_perception_models_see_the_estimate(batches):
    """A parser that reads the label from the colour, and a CLIP whose features are the pixels."""
    for batch in batches:
        batch["image"] = torch.stack([batch["label_map"] / 10 - 1] * 3, 1)
        batch["z"] = batch["image"].clone()
    parser = SimpleNamespace(parse=lambda x: ((x[:, 0] + 1) * 10).round().long().clamp(0, 18))
    clip = SimpleNamespace(
        image_features=lambda x: torch.nn.functional.normalize(x.flatten(1), dim=1)
    )

    def noisy(z_t, t, batch):
        return torch.zeros_like(z_t)

    table = reliability(
        batches,
        model(noisy),
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

    z_tilde, x_tilde = reverse_estimation(
        batches[0], 0.0, torch.zeros_like(batches[0]["z"]), model(noisy)
    )
    assert torch.equal(z_tilde, batches[0]["z"]) and torch.equal(x_tilde, z_tilde.clamp(-1, 1))


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


def test_curves_are_scaled_and_fitted():
    """A curve that is a logistic gives its own steepness and center, rising or falling."""
    t = torch.linspace(0, 1, 11)
    falling = 30 * beta(t, 12.0, 0.45) + 3
    curves = pd.concat(
        [pd.DataFrame({"t": t, "metric": "PSNR (dB)", "value": falling}),
         pd.DataFrame({"t": t, "metric": "LPIPS", "value": 1 - falling / 40})]
    )  # fmt: skip
    scaled = normalised(curves)
    assert scaled.groupby("metric")["value"].agg(["min", "max"]).to_numpy().tolist() == [[0, 1]] * 2
    assert (scaled.loc[scaled["t"] == 0, "value"] == 1).all()
    fits = fitted_beta(curves, Config())
    assert fits.iloc[0][["steepness", "center"]].tolist() == [10.0, 0.4]
    assert np.allclose(fits.iloc[1:]["center"], 0.45, atol=0.02)
    assert len(gradient_weights([(10.0, 0.4), (20.0, 0.4)]).axes) == 2


def test_sentences_of_the_schedule():
    fits = pd.DataFrame(
        {
            "source": ["configured", "a", "b"],
            "steepness": [10.0, 4.0, 6.0],
            "center": [0.4, 0.5, 0.7],
            "strongest_at": [0.3, 0.4, 0.6],
        }
    )
    assert "centers 0.50 to 0.70 (configured 0.4)" in describe_fits(fits)
    assert "at t = 0.30 as configured, at 0.40 to 0.60" in describe_gradient_factor(fits)
