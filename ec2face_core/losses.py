"""The losses of the paper: flow matching (Eqs. 3, 11), the consistency losses (Eqs. 6, 7), their
modulation in time (Eq. 8) and their sum (Eqs. 9, 12).

Every loss is returned unreduced, `(b,)`: the trainer reduces once and logs the parts. What the
paper leaves open is chosen so: Eq. 7's cross-entropy is the mean over pixels and classes, its Dice
term runs over pixels and classes of one sample; Eq. 11's weight is squared, as printed; weights of
thin classes survive the way to latent resolution (the maximum over the pixels of a latent cell).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import one_hot, pixel_counts
from .config import ConfigError, LossConfig


def class_weights(counts: Tensor) -> Tensor:
    """Eq. 10 for every class at once: `w_c = sum(T) / (n * T_c + 1)`.

    counts: aggregated pixels T_c of each class, `(19,)`, over the training set (or over one mask).
    Returns `(19,)` float64. A class without pixels gets the weight `sum(T)`, which no pixel uses.
    """
    T = counts.double()
    return T.sum() / (len(T) * T + 1)


def long_tail_weights(label_map: Tensor, counts: Tensor) -> Tensor:
    """The weight matrix `w(i, j)` of Eq. 10: `b h w` ids -> `b h w` float32 weights."""
    return class_weights(counts).to(label_map.device)[label_map].float()


def beta(t: Tensor, steepness: float = 10.0, center: float = 0.4) -> Tensor:
    """Eq. 8: `1 / (1 + exp(steepness (t - center)))`, near 1 for small t and near 0 for large t."""
    return torch.sigmoid(steepness * (center - t))


def flow_matching_loss(v: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eq. 3, with weights Eq. 11: `|| w (v - target) ||^2`, the mean over channels and positions.

    Args:
        v: predicted velocity, `b c h w` (without weights any `(b, ...)`).
        target: true velocity, of the same shape.
        weights: `b h w`, or of any shape that broadcasts to v; they end up squared.

    Returns:
        Losses `(b,)`, in float32 or wider.
    """
    if v.shape != target.shape:
        raise ValueError(f"velocity {tuple(v.shape)} and target {tuple(target.shape)} differ")
    error = v - _at_least_float32(target)
    if weights is not None:
        error = (weights[:, None] if weights.ndim == v.ndim - 1 else weights) * error
    return error.square().flatten(1).mean(1)


def text_consistency_loss(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Eq. 6: one minus the cosine of the CLIP features `(b, d)` of image and text -> `(b,)`."""
    return 1 - F.cosine_similarity(image_features, text_features, dim=-1)


def mask_consistency_loss(
    probabilities: Tensor, label_map: Tensor, balance: float = 0.5, smoothing: float = 1e-6
) -> Tensor:
    """Eq. 7: `balance * cross-entropy + (1 - balance) * Dice` of the parsed image and the mask.

    Args:
        probabilities: class probabilities of the parsed image, `b 19 h w` in [0, 1].
        label_map: the mask condition, `b h w` int64 ids.
        balance: lambda, the share of the cross-entropy.
        smoothing: delta, in the denominator of the Dice term.

    Returns:
        Losses `(b,)`, in float32 or wider; finite also where a probability is exactly 0 or 1.
    """
    if probabilities.shape[-2:] != label_map.shape[-2:]:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and label map {tuple(label_map.shape)} "
            "differ in size; resize the probabilities (bilinear), never the label map"
        )
    p = _at_least_float32(probabilities)
    m = one_hot(label_map).to(p.dtype)

    eps = torch.finfo(p.dtype).eps  # log of a probability that underflowed has no finite gradient
    q = p.clamp(eps, 1 - eps)
    cross_entropy = -(m * q.log() + (1 - m) * (-q).log1p()).flatten(1).mean(1)

    m, p = m.flatten(1), p.flatten(1)
    overlap, size = (m * p).sum(1), m.square().sum(1) + p.square().sum(1)
    dice = 1 - 2 * overlap / (size + smoothing)
    return balance * cross_entropy + (1 - balance) * dice


def latent_weights(
    label_map: Tensor, counts: Tensor, latent_size: int, config: LossConfig
) -> Tensor:
    """The weight matrix of Eqs. 10 and 11, brought to latent resolution.

    Eq. 10 at pixel resolution, then `config.clip`, then `config.reduction` over the pixels of each
    latent cell, then `config.normalize`.

    Args:
        label_map: `b h w` int64 ids.
        counts: aggregated class pixels of the training set, `(19,)`; used by scope `dataset`, while
            scope `sample` counts each map by itself.
        latent_size: side of the latent, `h'`.
        config: reads scope, clip, reduction and normalize.

    Returns:
        Weights `b h' w'` float32. With normalize `mean` the mean squared weight of the batch is 1,
        so that the loss keeps the scale it has without weights.

    Raises:
        ConfigError: an option has a value that does not exist.
    """
    if config.scope == "dataset":
        w = long_tail_weights(label_map, counts)
    elif config.scope == "sample":
        own = pixel_counts(label_map)
        w = torch.cat([long_tail_weights(m[None], T) for m, T in zip(label_map, own, strict=True)])
    else:
        raise ConfigError(f"loss.scope: {config.scope!r} is none of dataset, sample")

    if config.clip > 0:
        w = w.clamp(max=config.clip)

    if config.reduction == "max":
        w = F.adaptive_max_pool2d(w, latent_size)
    elif config.reduction == "mean":
        w = F.adaptive_avg_pool2d(w, latent_size)
    elif config.reduction == "nearest":
        w = F.interpolate(w[:, None], size=(latent_size, latent_size), mode="nearest")[:, 0]
    else:
        raise ConfigError(f"loss.reduction: {config.reduction!r} is none of max, mean, nearest")

    if config.normalize == "mean":
        return w / w.square().mean().sqrt()
    if config.normalize == "none":
        return w
    raise ConfigError(f"loss.normalize: {config.normalize!r} is none of mean, none")


def drop_conditions(
    b: int, p: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 13: which samples keep their text and which keep their mask, drawn independently.

    Returns:
        keep_text, keep_mask: `(b,)` bool on the generator's device; each False with probability p.
    """
    device = generator.device if generator is not None else "cpu"
    keep_text, keep_mask = torch.rand(2, b, generator=generator, device=device) >= p
    return keep_text, keep_mask


@dataclass(frozen=True)
class LossBreakdown:
    """The total of Eq. 12 and its parts, each `(b,)`.

    text and mask are the unmodulated losses of Eqs. 6 and 7, and 0 where the condition was dropped.
    """

    total: Tensor
    flow: Tensor
    text: Tensor
    mask: Tensor
    beta: Tensor

    def mean(self) -> dict[str, Tensor]:
        """Batch means by name, detached, for the log."""
        return {f.name: getattr(self, f.name).detach().mean() for f in dataclasses.fields(self)}


def total_loss(
    flow: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    t: Tensor,
    config: LossConfig,
    keep_text: Tensor | None = None,
    keep_mask: Tensor | None = None,
) -> LossBreakdown:
    """Eqs. 9 and 12: `flow + beta(t) (alpha_text text + alpha_mask mask)`.

    Args:
        flow: Eq. 3 or 11, `(b,)`.
        text: Eq. 6, `(b,)`; None = 0.
        mask: Eq. 7, `(b,)`; None = 0.
        t: times, `(b,)`.
        config: reads alpha_text, alpha_mask, steepness and center.
        keep_text: `(b,)` bool; a sample whose text was dropped has no text consistency. None = all.
        keep_mask: `(b,)` bool, likewise for the mask.
    """
    text, mask = _kept(text, keep_text, flow), _kept(mask, keep_mask, flow)
    b = beta(t, config.steepness, config.center)
    total = flow + b * (config.alpha_text * text + config.alpha_mask * mask)
    return LossBreakdown(total, flow, text, mask, b)


def _kept(loss: Tensor | None, keep: Tensor | None, like: Tensor) -> Tensor:
    if loss is None:
        return torch.zeros_like(like)
    return loss if keep is None else loss.masked_fill(~keep, 0)


def _at_least_float32(x: Tensor) -> Tensor:
    """Half precision would lose squares of weights of 10^3, and logarithms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
