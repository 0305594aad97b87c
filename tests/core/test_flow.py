"""Rectified flow: endpoints, derivative, round trip and the distribution of training times."""

from __future__ import annotations

import pytest
import torch

from ec2face_core.fast.importance import low_discrepancy_timesteps
from ec2face_core.flow import (
    follow_path,
    interpolate,
    reverse_estimate,
    sample_timesteps,
    target_velocity,
)

SHAPES = [(5,), (5, 7), (5, 16, 32), (5, 3, 8, 6)]


def draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x0, noise, torch.rand(shape[0], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_endpoints(shape):
    x0, noise, t = draw(shape)
    assert torch.equal(interpolate(x0, noise, torch.zeros_like(t)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones_like(t)), noise)


@pytest.mark.parametrize("shape", SHAPES)
def test_reverse_estimate_undoes_the_path(shape):
    x0, noise, t = draw(shape)
    x_t = interpolate(x0, noise, t)
    torch.testing.assert_close(reverse_estimate(x_t, target_velocity(x0, noise), t), x0)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise, t = draw((4, 3, 5, 5))
    step = 1e-4
    slope = (interpolate(x0, noise, t + step) - interpolate(x0, noise, t - step)) / (2 * step)
    torch.testing.assert_close(slope, target_velocity(x0, noise), rtol=1e-8, atol=1e-8)


def test_every_sample_has_its_own_time():
    x0, noise, t = draw((6, 2, 4, 4))
    together = interpolate(x0, noise, t)
    for i in range(6):
        torch.testing.assert_close(together[i], (1 - t[i]) * x0[i] + t[i] * noise[i])


def test_integrating_the_velocity_backwards_arrives_at_the_data():
    """Gaussian data N(m, s^2) have a closed-form marginal velocity E[noise - x0 | x_t]."""
    m, s, steps = 1.5, 0.5, 2000
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20000, generator=generator, dtype=torch.float64)
    for i in range(steps, 0, -1):
        t = torch.full_like(x, i / steps)
        variance = (1 - t) ** 2 * s**2 + t**2
        score = (t - (1 - t) * s**2) / variance  # cov(noise - x0, x_t) / var(x_t)
        v = -m + score * (x - (1 - t) * m)
        x = x - v / steps
        if i == steps:
            expected = torch.full_like(x, m)  # at t = 1 the best guess of the data is its mean
            start = x + v / steps
            torch.testing.assert_close(reverse_estimate(start, v, t), expected)
    assert x.mean() == pytest.approx(m, abs=0.02)
    assert x.std() == pytest.approx(s, abs=0.02)


def test_half_precision_velocity_does_not_coarsen_the_time():
    t = torch.tensor([0.3337])
    estimate = reverse_estimate(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bfloat16), t)
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate, -t.expand(1, 4))


def test_times_are_uniform():
    t = sample_timesteps(200_000, torch.Generator().manual_seed(0))
    assert t.shape == (200_000,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    quantiles = torch.quantile(t, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(
        quantiles, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), atol=0.01, rtol=0
    )


def test_even_times_are_uniform_and_any_run_of_them_covers_the_interval():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([low_discrepancy_timesteps(32, generator) for _ in range(4000)])
    assert draws.dtype == torch.float32 and draws.min() >= 0 and draws.max() <= 1
    for place in (0, 5, 31):  # any one place sees all of [0, 1]
        assert draws[:, place].mean() == pytest.approx(0.5, abs=0.02)
        assert draws[:, place].var() == pytest.approx(1 / 12, abs=0.005)
    for length, gap in ((4, 0.383), (8, 0.237), (32, 0.056)):  # by chance 0.52, 0.34, 0.13
        for start in range(0, 33 - length, 3):
            run = draws[:, start : start + length].sort(1).values
            around = torch.cat([run.diff(dim=1), 1 + run[:, :1] - run[:, -1:]], 1)
            assert around.max() < gap


def test_times_come_from_the_given_generator_alone():
    state = torch.get_rng_state()
    first, second = (sample_timesteps(9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_the_own_path_is_the_ode_from_the_noise():
    """A field that leads every noise to one point, and one whose Euler steps are known."""
    generator = torch.Generator().manual_seed(1)
    noise, data = torch.randn(2, 3, 4, generator=generator)
    t = torch.tensor([0.0, 0.3, 1.0])
    straight = follow_path(lambda x, s: noise - data, noise, t, 4)
    torch.testing.assert_close(straight, interpolate(data, noise, t))
    times = []

    def decay(x, s):
        times.append(s)
        return x

    decayed = follow_path(decay, noise, t, 2)
    torch.testing.assert_close(decayed, noise * (1 - (1 - t[:, None]) / 2) ** 2)
    torch.testing.assert_close(torch.stack(times), torch.stack([torch.ones(3), (1 + t) / 2]))
