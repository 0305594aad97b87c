"""Cheaper estimators of the same expectation: low-discrepancy timesteps, sampled pixel losses.

Both are off by default (`trainer.low_discrepancy_t`, `loss.importance_sampling`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LossConfig
from ..losses import beta

MIN_PROBABILITY = 0.05  # bounds the weight 1/p of a sample by 20


def low_discrepancy_timesteps(b: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times `(b,)` float32, spread evenly: golden-ratio steps from a random start.

    Each time alone is uniform on [0, 1], but any run of neighbours covers the interval. The batch
    of every rank does so, too: the loss varies less from step to step, and ranks have about equally
    many samples at small t.
    """
    start = torch.rand((), generator=generator, dtype=torch.float64)
    steps = torch.arange(b, dtype=torch.float64) * (5**0.5 - 1) / 2
    return ((start + steps) % 1).float()


def pixel_loss_probability(t: Tensor, config: LossConfig) -> Tensor:
    """Probability that the pixel losses of a sample are computed, `(b,)` in [0.05, 1].

    `p(t) = s beta(t) t / max beta(t) t`, clipped, with s = `config.importance_sampling`. The
    gradient of the pixel losses grows with beta(t) t, since d z_hat / d v = -t, and a probability
    in proportion to it has the least variance for its cost. Weighted by 1/p the losses keep their
    expectation. s = 2 computes 61 % of the samples.

    Args:
        t: times `(b,)`.
        config: importance_sampling, steepness and center are used.
    """

    def gradient_size(t: Tensor) -> Tensor:
        return t * beta(t, config.steepness, config.center)

    largest = gradient_size(torch.linspace(0, 1, 1001, dtype=t.dtype, device=t.device)).max()
    p = config.importance_sampling * gradient_size(t) / largest
    return p.clamp(MIN_PROBABILITY, 1)


def systematic_sample(p: Tensor, u: float) -> Tensor:
    """Choose each i with probability p_i by systematic sampling, with one random number.

    Laid end to end, the p_i cover the line from 0; those that hold one of the points 1 - u,
    2 - u, ... are chosen. Any run of neighbours then has as many chosen members as its p add up to,
    rounded up or down, so ranks, which take such runs, get equal shares of the work.

    Args:
        p: probabilities `(n,)` float64.
        u: uniform in [0, 1).

    Returns:
        `(n,)` bool.
    """
    ends = (p.cumsum(0) + u).floor()
    return ends.diff(prepend=ends.new_zeros(1)) > 0
