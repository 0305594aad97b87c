"""Mask accuracy, by the definition that reproduces Tables 1-4, and PSNR.

The accuracy of a class is its correct pixels / its pixels (recall), pooled over the test set. OAA
is the unweighted mean over the classes that occur; HFA, NFA and RFA are the same within a group.
OAA = (4 HFA + 13 NFA + 2 RFA) / 19 holds to rounding in 17 of the tables' 20 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .attributes import CLASSES, GROUPS, NUM_CLASSES, pixel_counts


@dataclass(frozen=True)
class MaskAccuracy:
    """Accuracies in percent; NaN where a class, or every class of a group, has no pixel.

    per_class: `(19,)` float64 in id order. support: `(19,)` int64, pixels of each class.
    """

    per_class: Tensor
    support: Tensor
    OAA: float
    HFA: float
    NFA: float
    RFA: float

    def as_dict(self) -> dict[str, float]:
        """OAA, HFA, NFA and RFA, then the 19 classes by name."""
        groups = {name: getattr(self, name) for name in ("OAA", "HFA", "NFA", "RFA")}
        return groups | dict(zip(CLASSES, self.per_class.tolist(), strict=True))


def mask_counts(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Correct pixels and pixels of each class in each image; their sums pool over a test set.

    Args:
        predicted: label maps parsed from the images, `b h w` int64.
        target: the mask conditions, of the same shape.

    Returns:
        correct, support: `(b, 19)` int64.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"label maps {tuple(predicted.shape)} and {tuple(target.shape)} differ")
    return pixel_counts(target, where=predicted == target), pixel_counts(target)


def accuracy_from_counts(correct: Tensor, support: Tensor) -> MaskAccuracy:
    """Pool the counts of `mask_counts`, `(..., 19)`, over all leading dimensions, then divide."""
    correct = correct.reshape(-1, NUM_CLASSES).sum(0)
    support = support.reshape(-1, NUM_CLASSES).sum(0)
    per_class = 100 * correct.double() / support
    groups = {name: float(mean) for name, mean in group_means(per_class.cpu().numpy()).items()}
    return MaskAccuracy(per_class, support, **groups)


def mask_accuracy(predicted: Tensor, target: Tensor) -> MaskAccuracy:
    """Mask accuracy pooled over everything given; label maps `b h w` (or `h w`) int64."""
    return accuracy_from_counts(*mask_counts(predicted.flatten()[None], target.flatten()[None]))


def group_means(per_class: np.ndarray) -> dict[str, np.ndarray]:
    """Unweighted means over the classes present: `(..., 19)` -> OAA, HFA, NFA, RFA, each `(...)`.

    A class with NaN is absent and does not count; a group of absent classes is NaN.
    """
    present = np.isfinite(per_class)
    means = {}
    for name, ids in {"OAA": tuple(range(NUM_CLASSES)), **GROUPS}.items():
        total = np.where(present[..., ids], per_class[..., ids], 0).sum(-1)
        means[name] = ratio(total, present[..., ids].sum(-1))
    return means


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images `b 3 h w` in [-1, 1], `(b,)`; at most 106 dB."""
    error = (images.clamp(-1, 1) - references.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient; NaN where the denominator is 0."""
    nothing = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=nothing, where=denominator > 0)
