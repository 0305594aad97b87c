"""The losses of the paper: flow matching with long-tail weights (Eqs. 3, 10, 11), the consistency
losses (Eqs. 6, 7), their fading in time (Eq. 8), the total (Eqs. 9, 12) and dropout (Eq. 13).

Every loss is returned unreduced, `(b,)`; the trainer takes the mean. Settled here: the
cross-entropy of Eq. 7 is the mean over pixels and classes (Eq. 7 prints a sum), and its Dice term
runs over pixels and classes of one sample; the weight of Eq. 11 is squared, as printed. Weights
reach latent resolution by the maximum over the pixels of a latent cell, so that thin classes keep
theirs. By default T of Eq. 10 is counted over the training set, and weights are divided by their
root mean square (`loss.scope`, `loss.normalize`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import NUM_CLASSES, one_hot, pixel_counts
from .config import LossConfig
from .guards.checks import (
    check_broadcasts,
    check_floats,
    check_labels,
    check_number,
    check_per_sample,
    check_range,
    check_same_shape,
    check_tensor,
    check_times,
)

ROUNDING = 1e-3  # by which a probability may exceed [0, 1]

NEVER_FADES = 1000.0  # a center t_c so far right that beta(t) is 1 for every t

# ------------------------------------------------------------------- flow matching (Eqs. 3, 10, 11)


def flow_matching_loss(v: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eq. 3, with weights Eq. 11: `|| w (v - target) ||^2`, the mean over channels and positions.

    Args:
        v: predicted velocity, `b c h w` (without weights any `(b, ...)`).
        target: true velocity, of the same shape.
        weights: `b h w`, or of any shape that broadcasts to v; they end up squared.

    Returns:
        Losses `(b,)`, in float32 or wider.

    Raises:
        TypeError: something is not of real numbers.
        ValueError: v and target differ in shape, or the weights do not fit them.
    """
    check_floats(v, "velocity")
    check_floats(target, "target")
    check_same_shape(velocity=v, target=target)
    if v.ndim < 2:
        raise ValueError(
            f"velocity {tuple(v.shape)}: expected samples of several values `(b, ...)`"
        )
    error = v - _at_least_float32(target)
    if weights is not None:
        check_floats(weights, "weights")
        weights = weights[:, None] if weights.ndim == v.ndim - 1 else weights
        check_broadcasts(weights, v, "weights")
        error = weights * error
    return error.square().flatten(1).mean(1)


def class_weights(counts: Tensor) -> Tensor:
    """Eq. 10 for every class at once: `w_c = sum(T) / (n * T_c + 1)`.

    Args:
        counts: aggregated pixels T_c of each class, `(19,)`, over the training set (or one mask).

    Returns:
        `(19,)` float64. A class without pixels has the weight `sum(T)`, which no pixel uses.

    Raises:
        ValueError: not 19 counts, a negative one, or no pixel at all.
    """
    check_tensor(counts, "counts")
    if counts.is_complex() or tuple(counts.shape) != (NUM_CLASSES,):
        raise ValueError(f"counts {tuple(counts.shape)}: expected ({NUM_CLASSES},), one a class")
    if counts.device.type == "cpu" and not (counts.min() >= 0 and 0 < counts.sum() < torch.inf):
        raise ValueError("counts must be pixels of a training set: none negative, some above 0")
    T = counts.double()
    return T.sum() / (len(T) * T + 1)


def long_tail_weights(
    label_map: Tensor, counts: Tensor, config: LossConfig = LossConfig()
) -> Tensor:
    """The weight matrix `w(i, j)` of Eq. 10: `b h w` ids -> `b h w` float32 weights.

    config: see `bounded_weights`; by default they are as printed.
    """
    labels = check_labels(label_map, NUM_CLASSES)
    return bounded_weights(counts, config).to(labels.device)[labels].float()


def bounded_weights(counts: Tensor, config: LossConfig) -> Tensor:
    """The weight of each class before normalisation: Eq. 10, `config.weighting`, floor and clip.

    Args:
        counts: as for `class_weights`.
        config: weighting, floor and clip are used. `sqrt` is the root of Eq. 10. `effective` is
            `1 / (1 - exp(-1 / w))`, the effective number of pixels (Cui et al. 2019) with a volume
            of the mean class: Eq. 10 for rare classes, 1 for frequent ones.

    Returns:
        `(19,)` float64.

    Raises:
        ValueError: weighting `focal` has no weight of a class.
    """
    if config.weighting == "focal":
        raise ValueError("focal weights do not depend on the classes: see losses.focal_weights")
    w = class_weights(counts)
    if config.weighting == "sqrt":
        w = w.sqrt()
    elif config.weighting == "effective":
        w = -1 / torch.expm1(-1 / w)
    return w.clamp(min=config.floor, max=config.clip or torch.inf)


def latent_weights(
    label_map: Tensor,
    counts: Tensor,
    latent_size: int,
    config: LossConfig,
    scale: Tensor | None = None,
) -> Tensor:
    """The weight matrix of Eqs. 10 and 11 at latent resolution.

    Eq. 10 at pixel resolution (`bounded_weights`), then `config.reduction` over the pixels of each
    latent cell, then `config.normalize`, so that the loss has the scale that it has without
    weights.

    Args:
        label_map: `b h w` int64 ids.
        counts: aggregated class pixels of the training set, `(19,)`; used by scope `dataset`, while
            scope `sample` counts each map by itself.
        latent_size: side of the latent, `h'`.
        config: scope, weighting, floor, clip, reduction and normalize are used.
        scale: root mean square of the weights over the cells of the training set, by which
            normalize `constant` divides. None: that of the given maps.

    Returns:
        Weights `b h' w'` float32. Their mean square is 1 over the cells of the training set with
        `constant`, so a face with rare classes weighs more than one without, and over the cells of
        the given maps with `mean`.

    Raises:
        TypeError, ValueError: the label map is no `b h w` of ids 0-18, the counts are not 19, or
            latent_size is not in 1 to h.
    """
    check_tensor(label_map, "label map")
    if label_map.ndim != 3 or label_map.numel() == 0:
        raise ValueError(f"label map {tuple(label_map.shape)}: expected `b h w`")
    check_number(latent_size, "latent_size", 1, min(label_map.shape[1:]), whole=True)
    if config.scope == "dataset":
        w = long_tail_weights(label_map, counts, config)
    else:
        own_counts = pixel_counts(label_map)
        maps = zip(label_map, own_counts, strict=True)
        w = torch.cat([long_tail_weights(m[None], T, config) for m, T in maps])

    if config.reduction == "max":
        w = F.adaptive_max_pool2d(w, latent_size)
    elif config.reduction == "mean":
        w = F.adaptive_avg_pool2d(w, latent_size)
    else:
        w = F.interpolate(w[:, None], size=(latent_size, latent_size), mode="nearest")[:, 0]

    if config.normalize == "none":
        return w
    if scale is None or config.normalize == "mean":
        scale = w.square().mean().sqrt()
    return w / scale.to(w)


def focal_weights(v: Tensor, target: Tensor) -> Tensor:
    """Weights of Eq. 11 that know no classes (`weighting: focal`): hard cells weigh more.

    Focal-R (Yang et al. 2021, arXiv 2102.09554) multiplies the squared error by
    `(2 sigmoid(e) - 1)^2`, where e is the root mean square of a cell's error.

    Args:
        v: predicted velocity, `b c h w`.
        target: true velocity, of the same shape.

    Returns:
        `b h w` float32, detached; the mean square over all cells is 1.

    Raises:
        TypeError, ValueError: they are no real `b c h w` of one shape.
    """
    check_floats(v, "velocity")
    check_floats(target, "target")
    check_same_shape(velocity=v, target=target)
    if v.ndim != 4:
        raise ValueError(f"velocity {tuple(v.shape)}: expected `b c h w`")
    error = (v.detach() - _at_least_float32(target)).square().mean(1).sqrt()
    w = 2 * torch.sigmoid(error) - 1
    return w / w.square().mean().sqrt().clamp(min=torch.finfo(w.dtype).tiny)


# --------------------------------------------------------------------- consistency (Eqs. 6, 7, 8)


def text_consistency_loss(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Eq. 6: one minus the cosine of the CLIP features `(b, d)` of image and text -> `(b,)`.

    Raises:
        TypeError: something is not of real numbers.
        ValueError: the shapes are not the same `(b, d)`.
    """
    check_floats(image_features, "image features")
    check_floats(text_features, "text features")
    check_same_shape(image_features=image_features, text_features=text_features)
    if image_features.ndim != 2:
        raise ValueError(f"features {tuple(image_features.shape)}: expected `(b, d)`")
    return 1 - F.cosine_similarity(image_features, text_features, dim=-1)


def mask_consistency_loss(
    probabilities: Tensor, label_map: Tensor, balance: float = 0.5, smoothing: float = 1e-6
) -> Tensor:
    """Eq. 7: `balance * cross-entropy + (1 - balance) * Dice` of the parsed image and the mask.

    Args:
        probabilities: class probabilities of the parsed image, `b 19 h w` in [0, 1].
        label_map: the mask condition, `b h w` int64 ids.
        balance: lambda, the share of the cross-entropy, in [0, 1].
        smoothing: delta, in the denominator of the Dice term.

    Returns:
        Losses `(b,)`, in float32 or wider; finite also where a probability is exactly 0 or 1.

    Raises:
        TypeError: probabilities that are not real numbers, or ids that are not integers.
        ValueError: the shapes do not fit, or a probability, an id, balance or smoothing is out of
            range.
    """
    check_number(balance, "balance", 0, 1)
    check_number(smoothing, "smoothing", 0)
    check_floats(probabilities, "probabilities")
    if probabilities.ndim != 4 or probabilities.shape[1] != NUM_CLASSES:
        shape = tuple(probabilities.shape)
        raise ValueError(f"probabilities {shape}: expected `b {NUM_CLASSES} h w`")
    check_range(probabilities, -ROUNDING, 1 + ROUNDING, "probabilities", allow_nan=True)
    check_tensor(label_map, "label map")
    if label_map.ndim != 3 or len(label_map) != len(probabilities):
        b = len(probabilities)
        raise ValueError(f"label map {tuple(label_map.shape)}: expected `b h w` with b = {b}")
    if probabilities.shape[-2:] != label_map.shape[-2:]:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and label map {tuple(label_map.shape)} "
            "differ in size; resize the probabilities (bilinear), never the label map"
        )
    p = _at_least_float32(probabilities)
    m = one_hot(label_map).to(p.dtype)

    eps = torch.finfo(p.dtype).eps  # the logarithm of a probability of 0 has no finite gradient
    q = p.clamp(eps, 1 - eps)
    cross_entropy = -(m * q.log() + (1 - m) * (-q).log1p()).flatten(1).mean(1)

    overlap = (m * p).flatten(1).sum(1)
    size = m.flatten(1).square().sum(1) + p.flatten(1).square().sum(1)
    dice = 1 - 2 * overlap / (size + smoothing)
    return balance * cross_entropy + (1 - balance) * dice


def beta(t: Tensor, steepness: float = 10.0, center: float = 0.4) -> Tensor:
    """Eq. 8: `1 / (1 + exp(steepness (t - center)))`, near 1 for small t and near 0 for large t.

    Raises:
        TypeError: times that are not real numbers (a scheduler's 0-1000 are not times).
        ValueError: a time outside [0, 1], or a setting that is not finite.
    """
    check_floats(t, "t")
    check_range(t, 0.0, 1.0, "t")
    check_number(steepness, "steepness")
    check_number(center, "center")
    return torch.sigmoid(steepness * (center - t))


# ------------------------------------------------------------------------- the total (Eqs. 9, 12)


@dataclass(frozen=True)
class LossBreakdown:
    """The total of Eq. 12 and its parts, each `(b,)`.

    text and mask are the losses of Eqs. 6 and 7 before β(t), and 0 where the condition was dropped;
    with importance sampling they are weighted by 1/p.
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
        text: Eq. 6, `(b,)`; None: 0.
        mask: Eq. 7, `(b,)`; None: 0.
        t: times, `(b,)`.
        config: alpha_text, alpha_mask, steepness and center are used.
        keep_text: `(b,)` bool; a sample whose text was dropped has no text consistency. None: all.
        keep_mask: `(b,)` bool, likewise for the mask.

    Returns:
        The total and its parts.

    Raises:
        TypeError, ValueError: anything that is not `(b,)`, or a time outside [0, 1].
    """
    check_floats(flow, "flow")
    b = flow.numel()
    given = {"flow": flow, "text": text, "mask": mask, "t": t}
    given |= {"keep_text": keep_text, "keep_mask": keep_mask}
    for name, value in given.items():
        if value is not None:
            check_per_sample(value, b, name)
    check_times(t, b)
    text = _where_kept(text, keep_text, flow)
    mask = _where_kept(mask, keep_mask, flow)
    fading = beta(t, config.steepness, config.center)
    total = flow + fading * (config.alpha_text * text + config.alpha_mask * mask)
    return LossBreakdown(total, flow, text, mask, fading)


# ---------------------------------------------------------------------- condition dropout (Eq. 13)


def drop_conditions(
    b: int, p: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 13: which samples keep their text and which keep their mask, drawn independently.

    `TextEmbedding.where` replaces a dropped text by the null text. `predict_velocity` lets no token
    attend to a dropped mask; the trainer leaves such samples out where they have no gradient.

    Args:
        b: number of samples.
        p: probability of dropping a condition, in [0, 1].
        generator: source of randomness; None: torch's global one.

    Returns:
        keep_text, keep_mask: `(b,)` bool on the generator's device.

    Raises:
        TypeError, ValueError: b is not a count, or p is no probability.
    """
    check_number(b, "b", 0, whole=True)
    check_number(p, "p", 0, 1)
    device = generator.device if generator is not None else "cpu"
    keep_text, keep_mask = torch.rand(2, b, generator=generator, device=device) >= p
    return keep_text, keep_mask


def _where_kept(loss: Tensor | None, keep: Tensor | None, like: Tensor) -> Tensor:
    if loss is None:
        return torch.zeros_like(like)
    if keep is not None and keep.dtype != torch.bool:
        raise TypeError(f"keep_text and keep_mask are bool, got {keep.dtype}")
    return loss if keep is None else loss.masked_fill(~keep, 0)


def _at_least_float32(x: Tensor) -> Tensor:
    """float16 overflows on squared weights above 65504, and logarithms lose precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
