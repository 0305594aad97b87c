"""Mask accuracy, by the definition that reproduces Tables 1-4, and PSNR.

The accuracy of a class is its correct pixels / its pixels (recall), pooled over the test set. OAA
is the unweighted mean over the classes that occur; HFA, NFA and RFA are the same within a group.
OAA = (4 HFA + 13 NFA + 2 RFA) / 19 holds to rounding in 17 of the tables' 20 rows.

Recall rises when a model paints more of a class, so precision, F1 and IoU stand beside it: F1 and
mIoU are the unweighted means over the classes that occur in the masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attributes import GROUPS, NUM_CLASSES, pixel_counts
from .guards.checks import check_floats, check_labels, check_same_shape, check_tensor

RECALL = ("OAA", "HFA", "NFA", "RFA")

OVERLAP = ("F1", "F1_HFA", "F1_NFA", "F1_RFA", "mIoU")


@dataclass(frozen=True)
class MaskAccuracy:
    """Accuracies in percent; NaN where a class, or every class of a group, has no pixel.

    per_class: recall, `(19,)` float64 in id order. support: `(19,)` int64, pixels of each class in
    the masks. precision, f1, iou: `(19,)` float64, 0 for a class of the masks that is nowhere
    predicted, and NaN like the last five where the predicted pixels were not counted.
    """

    per_class: Tensor
    support: Tensor
    OAA: float
    HFA: float
    NFA: float
    RFA: float
    precision: Tensor
    f1: Tensor
    iou: Tensor
    F1: float
    F1_HFA: float
    F1_NFA: float
    F1_RFA: float
    mIoU: float


def mask_counts(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Correct pixels and pixels of each class in each image; their sums pool over a test set.

    The third count of `accuracy_from_counts`, predicted pixels, is `pixel_counts(predicted)`.

    Args:
        predicted: label maps parsed from the images, `b h w` int64.
        target: the mask conditions, of the same shape.

    Returns:
        correct, support: `(b, 19)` int64.

    Raises:
        TypeError: a label map is not of integers.
        ValueError: the shapes differ.
    """
    _check_label_maps(predicted, target)
    return pixel_counts(target, where=predicted == target), pixel_counts(target)


def accuracy_from_counts(
    correct: Tensor, support: Tensor, predicted: Tensor | None = None
) -> MaskAccuracy:
    """Pool counts over all leading dimensions, then divide.

    Args:
        correct: pixels predicted as the mask has them, `(..., 19)`, of `mask_counts`.
        support: pixels in the masks, of the same shape.
        predicted: pixels in the parsed label maps, of the same shape; without them the precision,
            F1 and IoU are NaN.

    Raises:
        TypeError: the counts are not integers.
        ValueError: the shapes differ, the last dimension is not 19, or there are more correct
            pixels of a class than it has in the masks.
    """
    counts = [correct, support] if predicted is None else [correct, support, predicted]
    for count in counts:
        check_tensor(count, "counts")
    shapes = [tuple(count.shape) for count in counts]
    if len(set(shapes)) > 1 or shapes[0][-1:] != (NUM_CLASSES,):
        raise ValueError(f"counts have the shapes {shapes}; give equal ones that end in 19 classes")
    if any(count.is_floating_point() or count.is_complex() for count in counts):
        raise TypeError("counts are pixels: give integers")
    if any(bool((count < 0).any()) for count in counts) or bool((correct > support).any()):
        raise ValueError("counts must not be negative, and correct not above support")
    if predicted is not None and bool((correct > predicted).any()):
        raise ValueError("more pixels of a class are correct than were predicted")
    pooled = [count.reshape(-1, NUM_CLASSES).sum(0) for count in counts]
    support = pooled[1]
    per_class = 100 * pooled[0].double() / support
    overlap = dict.fromkeys(("precision", "f1", "iou"), np.full(NUM_CLASSES, np.nan))
    if predicted is not None:
        overlap = overlap_from_counts(*(count.cpu().numpy() for count in pooled))
    means = group_means(per_class.cpu().numpy()) | overlap_means(overlap["f1"], overlap["iou"])
    values: dict[str, Any] = {name: float(mean) for name, mean in means.items()}
    values |= {name: torch.tensor(row, device=per_class.device) for name, row in overlap.items()}
    return MaskAccuracy(per_class, support, **values)


def mask_accuracy(predicted: Tensor, target: Tensor) -> MaskAccuracy:
    """Mask accuracy pooled over everything given; label maps `b h w` (or `h w`) int64.

    Raises:
        TypeError: a label map is not of integers.
        ValueError: the shapes differ.
    """
    _check_label_maps(predicted, target)
    predicted = predicted.flatten()[None]
    return accuracy_from_counts(
        *mask_counts(predicted, target.flatten()[None]), pixel_counts(predicted)
    )


def overlap_from_counts(
    correct: np.ndarray, support: np.ndarray, predicted: np.ndarray
) -> dict[str, np.ndarray]:
    """Precision, F1 and IoU in percent from pooled counts, each `(..., 19)`.

    NaN where a class is absent from the masks; 0 where it is in the masks but nowhere predicted.
    """
    hits = np.where(support > 0, 100.0 * correct, np.nan)
    return {
        "precision": hits / np.maximum(predicted, 1),
        "f1": ratio(2 * hits, support + predicted),
        "iou": ratio(hits, support + predicted - correct),
    }


def overlap_means(f1: np.ndarray, iou: np.ndarray) -> dict[str, np.ndarray]:
    """Means over the classes present: `(..., 19)` -> F1, F1_HFA, F1_NFA, F1_RFA, mIoU, `(...)`."""
    means = {"F1" if name == "OAA" else f"F1_{name}": m for name, m in group_means(f1).items()}
    return means | {"mIoU": group_means(iou)["OAA"]}


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
    """Peak signal-to-noise ratio in dB of images `b 3 h w` in [-1, 1], `(b,)`; at most 106 dB.

    Raises:
        TypeError: something is not of real numbers.
        ValueError: the shapes differ, or are not `b c h w`.
    """
    check_floats(images, "images")
    check_floats(references, "references")
    check_same_shape(images=images, references=references)
    if images.ndim != 4:
        raise ValueError(f"images {tuple(images.shape)}: expected `b c h w`")
    kind = torch.promote_types(images.dtype, torch.float32)
    error = (images.to(kind).clamp(-1, 1) - references.to(kind).clamp(-1, 1)).square()
    error = error.flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient; NaN where the denominator is 0."""
    nothing = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=nothing, where=denominator > 0)


def _check_label_maps(predicted: Tensor, target: Tensor) -> None:
    for name, labels in (("predicted", predicted), ("target", target)):
        check_labels(labels, NUM_CLASSES, f"{name} label map")
    if predicted.shape != target.shape:
        raise ValueError(f"label maps {tuple(predicted.shape)} and {tuple(target.shape)} differ")
