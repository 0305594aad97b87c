"""Rectified flow: the path of Eqs. 2 and 3 between data and noise, its velocity, Eq. 5 backwards.

Time convention, stated here once: `t = 0` is data, `t = 1` is noise, as in FLUX and diffusers
(flow_matching, torchcfm and SiT run the other way).

    x_t = (1 - t) x0 + t noise        mu = noise - x0        x0_hat = x_t - t v

`t` has shape `(b,)`; images or latents have any shape `(b, ...)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .guards.checks import check_floats, check_same_shape, check_times


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point `x_t` on the straight path from data to noise, whose ODE is Eq. 2.

    Args:
        x0: data, `(b, ...)`.
        noise: of the shape of x0.
        t: times in [0, 1], `(b,)`.

    Returns:
        x_t, `(b, ...)`, in the wider of the types of x0, noise and t.

    Raises:
        TypeError: something is not of real numbers (the timesteps 0-1000 of schedulers are not).
        ValueError: the shapes do not fit, or a time is outside [0, 1].
    """
    check_floats(x0, "x0")
    check_floats(noise, "noise")
    check_same_shape(x0=x0, noise=noise)
    t = _per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def target_velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """Eq. 3's target `mu_t = d x_t / d t`, the same at every time.

    Raises:
        TypeError, ValueError: as for `interpolate`.
    """
    check_floats(x0, "x0")
    check_floats(noise, "noise")
    check_same_shape(x0=x0, noise=noise)
    return noise - x0


def reverse_estimate(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Eq. 5: the data that a straight step of velocity v leads back to.

    Args:
        x_t: points of the path, `(b, ...)`.
        v: velocities, predicted or true, of the shape of x_t.
        t: times in [0, 1], `(b,)`.

    Returns:
        x0_hat, `(b, ...)`; exact where v is the true velocity, and x_t itself where t = 0.

    Raises:
        TypeError, ValueError: as for `interpolate`.
    """
    check_floats(x_t, "x_t")
    check_floats(v, "v")
    check_same_shape(x_t=x_t, v=v)
    return x_t - _per_sample(t, x_t) * v


def follow_path(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, t: Tensor, steps: int
) -> Tensor:
    """The model's own state at time t: Eq. 2 from the noise at time 1, by equal Euler steps.

    Args:
        velocity: (states `(b, ...)`, times `(b,)`) -> velocities.
        noise: `(b, ...)`.
        t: times in [0, 1], `(b,)`.
        steps: of each sample; at t = 1 they have no length.
    """
    x = noise
    length = (1 - t) / steps
    for k in range(steps):
        x = x - _per_sample(length, x) * velocity(x, 1 - k * length)
    return x


def sample_timesteps(b: int, generator: torch.Generator | None = None) -> Tensor:
    """Eq. 3: training times t ~ U[0, 1], `(b,)` float32 on the generator's device."""
    device = generator.device if generator is not None else "cpu"
    return torch.rand(b, generator=generator, device=device)


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    """`(b,)` -> `(b, 1, ..., 1)`, so that each sample has its own time; checked."""
    if x.ndim == 0:
        raise ValueError("expected samples `(b, ...)`, got a single number")
    check_times(t, len(x))
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
