"""What each training sample is made of, as a pure function of (seed, global sample index).

Sample number g of a training is the same face, caption, time, noise and dropped conditions whoever
draws it: ranks take different g and so draw different noise, a resumed run goes on as if it had
never stopped, and any number of ranks sees the same samples. No state of a random generator has to
be saved. Every epoch shows each face once (`draws_per_face` times), in an order of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LossConfig
from ..losses import beta


def systematic_sample(p: Tensor, u: float) -> Tensor:
    """Choose each i with probability p_i, as evenly as that can be done, with one random number.

    Laid end to end, the p_i cover the line from 0; chosen are those that hold one of the points
    1 - u, 2 - u, ... So any run of neighbours has as many chosen ones as its p add up to, rounded
    up or down: ranks, which take such runs, get equal shares of the work.

    Args:
        p: probabilities `(n,)` float64.
        u: uniform in [0, 1).

    Returns:
        `(n,)` bool.
    """
    ends = (p.cumsum(0) + u).floor()
    return ends.diff(prepend=ends.new_zeros(1)) > 0


def even_timesteps(b: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times `(b,)` float32, spread evenly: golden-ratio steps from a random start.

    Each time alone is still uniform on [0, 1], but any run of neighbours covers the interval,
    however long it is: the batch of every rank does, so the loss varies less from step to step and
    ranks have about equally many samples at small t.
    """
    start = torch.rand((), generator=generator, dtype=torch.float64)
    steps = torch.arange(b, dtype=torch.float64) * (5**0.5 - 1) / 2
    return ((start + steps) % 1).float()


GATE_FLOOR = 0.05  # bounds the weight 1/p of a gated sample by 20


def gate_probability(t: Tensor, config: LossConfig) -> Tensor:
    """Probability with which the gate computes a sample's pixel losses, `(b,)` in [0.05, 1].

    `p(t) = gate * beta(t) t / max beta(t) t`, clipped: since d z_hat / d v = -t, the pixel losses'
    gradient grows with beta(t) t, and a probability in proportion to it costs the least variance.
    Weighted by 1/p the losses keep their expectation. gate 2 computes 61 % of the samples.

    Args:
        t: times `(b,)`.
        config: reads gate, steepness and center.
    """

    def size(t: Tensor) -> Tensor:
        return t * beta(t, config.steepness, config.center)

    largest = size(torch.linspace(0, 1, 1001, dtype=t.dtype, device=t.device)).max()
    return (config.importance_sampling * size(t) / largest).clamp(GATE_FLOOR, 1)
