"""Intervals of scores, of mask accuracies, and of paired differences, and families of them.

An interval over faces is a 95 % percentile bootstrap over images: an image is resampled with all
its pixels, so that pooled ratios keep the dependence within an image. Repeated seeds of one image
are summed beforehand, which holds the trainings fixed; `two_level_interval` and
`two_level_accuracy` resample trainings, too, and `t_interval` looks at trainings alone. Arrays are
numpy or tensors on the CPU; results are long DataFrames.

A resample of few images may lack a class altogether. A group's mean over the other classes is then
another quantity (of RFA without a necklace, that of earrings), so such resamples are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ec2face_core.attributes import CLASSES, GROUPS, NUM_CLASSES
from ec2face_core.metrics import group_means, overlap_from_counts, overlap_means, ratio

if TYPE_CHECKING:
    from pandas import DataFrame


# ------------------------------------------------------------------------------------- intervals


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval, from n images."""

    value: float
    ci_low: float
    ci_high: float
    n: int


def bootstrap_interval(values: Any, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of one value per image, `(n,)`; NaN values are left out.

    The interval of a paired difference is that of the differences: `bootstrap_interval(a - b)`.
    """
    values = _array(values)
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(np.nan, np.nan, np.nan, 0)
    means = _resample(len(values), resamples, seed) @ values / len(values)
    return Interval(float(values.mean()), *_bounds(means), len(values))


def bootstrap_accuracy(
    correct: Any, support: Any, predicted: Any = None, resamples: int = 1000, seed: int = 0
) -> DataFrame:
    """Pooled mask accuracies with intervals, from the counts `(n, 19)` of `mask_counts`.

    Args:
        correct: pixels predicted as the mask has them.
        support: pixels in the masks.
        predicted: pixels in the parsed label maps; without them there is recall alone.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Rows OAA, HFA, NFA, RFA and the 19 classes, and with `predicted` those that
        `two_level_accuracy` names: metric, value, ci_low, ci_high (percent), n (images that have a
        pixel of it), pixels. A class without pixels is NaN.
    """
    first = [_array(x) for x in (correct, support, predicted) if x is not None]
    return _accuracy_rows(first, None, resamples, seed)


def paired_accuracy_difference(
    first: Sequence[Any], second: Sequence[Any], resamples: int = 1000, seed: int = 0
) -> DataFrame:
    """How much higher the first method's accuracies are than the second's on the same images.

    Both methods are resampled by the same images, so what the images have in common cancels.

    Args:
        first: (correct, support) or (correct, support, predicted), each `(n, 19)`.
        second: the same of the other method, image by image.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The rows of `bootstrap_accuracy`, with percentage points as values; an interval without 0
        is a difference that the choice of test images does not explain.
    """
    a = [_array(x) for x in first]
    b = [_array(x) for x in second]
    if a[0].shape != b[0].shape or not np.array_equal(a[1], b[1]):
        raise ValueError("a paired difference needs the same images with the same masks, in order")
    return _accuracy_rows(a, b, resamples, seed)


def _accuracy_rows(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None, resamples: int, seed: int
) -> DataFrame:
    """Rows of one method, or of first - second, from counts `(n, 19)`."""
    import pandas as pd

    support = first[1]
    weights = _resample(len(support), resamples, seed)
    value = _mask_metrics(*(x.sum(0) for x in first))
    resampled = _resampled_metrics([weights @ x for x in first])
    if second is not None:
        other = _mask_metrics(*(x.sum(0) for x in second))
        others = _resampled_metrics([weights @ x for x in second])
        value = {name: value[name] - other[name] for name in value}
        resampled = {name: resampled[name] - others[name] for name in resampled}
    rows = []
    for metric in value:
        pixels = support[:, classes_of(metric)].sum(1)
        bounds = _bounds(resampled[metric])
        interval = Interval(float(value[metric]), *bounds, int((pixels > 0).sum()))
        rows.append({"metric": metric, **interval._asdict(), "pixels": int(pixels.sum())})
    return pd.DataFrame(rows)


def classes_of(metric: str) -> tuple[int, ...]:
    """The classes that a mask metric is measured on: `RFA`, `F1_RFA`, `ear_r`, `iou_ear_r` ..."""
    members = {**GROUPS, **{c: (i,) for i, c in enumerate(CLASSES)}}
    if metric.startswith(("F1_", "precision_", "f1_", "iou_")):
        metric = metric.partition("_")[2]
    return members.get(metric, tuple(range(NUM_CLASSES)))


# ----------------------------------------------------------------------- faces and trainings


def two_level_interval(values: Any, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of one value per training and face, `(trainings, faces)`; NaN values are left out.

    Each resample takes trainings and, independently, faces: all trainings drew the same faces. The
    part that trainings add comes out too small by (trainings - 1) / trainings in variance, so
    `t_interval` belongs beside it. A paired difference is `two_level_interval(a - b)`, where row i
    of both stands for one seed of training.

    Returns:
        The interval; n counts the faces that have a value.

    Raises:
        ValueError: the values are not a matrix.
    """
    values = _array(values)
    if values.ndim != 2:
        raise ValueError(f"values have the shape {values.shape}; give (trainings, faces)")
    known = np.isfinite(values)
    sums = [np.where(known, values, 0)[..., None], known[..., None].astype(np.float64)]
    resampled = ratio(*_two_level_sums(sums, resamples, seed)).ravel()
    n = int(known.any(0).sum())
    value = float(values[known].mean()) if n else np.nan
    return Interval(value, *_bounds(resampled), n)


def two_level_accuracy(
    first: Sequence[Any], second: Sequence[Any] | None = None, resamples: int = 1000, seed: int = 0
) -> DataFrame:
    """Mask accuracies pooled over trainings and faces, with intervals over both.

    Args:
        first: correct, support, predicted pixels, each `(trainings, faces, 19)`.
        second: the same of another method; the rows are then first - second, in percentage points.
            Both are resampled by the same trainings and faces. Repeat a method of a single training
            with `np.broadcast_to`: it is then held fixed.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Rows OAA, HFA, NFA, RFA, the 19 classes (recall), F1, F1_HFA, F1_NFA, F1_RFA, mIoU, then
        precision, F1 and IoU of each class (`precision_<class>`, `f1_`, `iou_`): metric, value,
        ci_low, ci_high (percent), t_low, t_high (`t_interval` over the trainings), n (faces whose
        mask has a pixel of it).

    Raises:
        ValueError: the shapes are wrong, or the two methods have other masks.
    """
    import pandas as pd

    methods = [[_array(x) for x in counts] for counts in (first, second) if counts is not None]
    shapes = {x.shape for counts in methods for x in counts}
    support = methods[0][1]
    if shapes != {(*support.shape[:2], NUM_CLASSES)}:
        raise ValueError(f"counts have the shapes {shapes}; give (trainings, faces, 19) of all")
    if not np.array_equal(support, methods[-1][1]):
        raise ValueError("a paired difference needs the same faces with the same masks, in order")
    wholes = [_mask_metrics(*(x.sum((0, 1)) for x in counts)) for counts in methods]
    each = [_mask_metrics(*(x.sum(1) for x in counts)) for counts in methods]
    draws = [_resampled_metrics(_two_level_sums(counts, resamples, seed)) for counts in methods]
    rows = []
    for name in wholes[0]:
        value, by_training, resampled = (table[0][name] for table in (wholes, each, draws))
        if second is not None:
            value = value - wholes[1][name]
            by_training = by_training - each[1][name]
            resampled = resampled - draws[1][name]
        n = int(support[..., classes_of(name)].any((0, 2)).sum())
        row = {"metric": name, **Interval(float(value), *_bounds(resampled), n)._asdict()}
        over_trainings = t_interval(by_training)
        rows.append(row | {"t_low": over_trainings.ci_low, "t_high": over_trainings.ci_high})
    return pd.DataFrame(rows)


def t_interval(values: Any) -> Interval:
    """Student's 95 % interval of the mean of one value per training, `(trainings,)`.

    With fewer than two trainings the bounds are NaN: such a result is exploratory.
    """
    from scipy import stats

    values = _array(values)
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else np.nan
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan, len(values))
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half), len(values))


def interval_p_values(value: Any, ci_low: Any, ci_high: Any) -> np.ndarray:
    """Two-sided p-values of "the value is 0" from 95 % intervals, by the normal distribution.

    Arrays of equal shape; an interval without width gives 1 at 0 and 0 elsewhere.
    """
    from scipy import stats

    value = np.abs(_array(value))
    error = (_array(ci_high) - _array(ci_low)) / (2 * stats.norm.ppf(0.975))
    certain = np.where(value > 0, np.inf, value)  # keeps 0 and NaN
    z = np.divide(value, error, out=certain, where=error != 0)
    return 2 * stats.norm.sf(z)


def holm(p_values: Any) -> np.ndarray:
    """Adjusted p-values `(n,)` of a family of claims (Holm, 1979), in the given order.

    Claims whose value is below 0.05 hold together with an error of at most 5 % for all of them.
    NaN stays NaN and counts as no claim. For intervals: `holm(interval_p_values(...))`.

    Raises:
        ValueError: a p-value is outside [0, 1].
    """
    p = _array(p_values)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"p-values lie in [0, 1], not between {np.nanmin(p)} and {np.nanmax(p)}")
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN is sorted to the end
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return adjusted


def _two_level_sums(counts: Sequence[np.ndarray], resamples: int, seed: int) -> list[np.ndarray]:
    """Sums of each `(trainings, faces, k)` over resamples of both: `(resamples, k)`."""
    trainings, faces = counts[0].shape[:2]
    first, second = np.random.SeedSequence(seed).spawn(2)
    by_training = _resample(trainings, resamples, first)
    by_face = _resample(faces, resamples, second)
    return [
        sum(w[:, None] * (by_face @ x) for w, x in zip(by_training.T, count, strict=True))
        for count in counts
    ]


def _mask_metrics(
    correct: np.ndarray, support: np.ndarray, predicted: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Every mask metric of pooled counts `(..., 19)` by name, each `(...)`, in percent."""
    recall = ratio(100 * correct, support)
    metrics = group_means(recall) | {c: recall[..., i] for i, c in enumerate(CLASSES)}
    if predicted is not None:
        overlap = overlap_from_counts(correct, support, predicted)
        metrics |= overlap_means(overlap["f1"], overlap["iou"])
        for name, values in overlap.items():
            metrics |= {f"{name}_{c}": values[..., i] for i, c in enumerate(CLASSES)}
    return metrics


def _resampled_metrics(sums: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """`_mask_metrics` of resamples `(n, 19)`, NaN where a class of the metric is lacking."""
    support = sums[1]
    lacking = (support == 0) & (support > 0).any(0)
    return {
        name: np.where(lacking[:, classes_of(name)].any(1), np.nan, values)
        for name, values in _mask_metrics(*sums).items()
    }


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _resample(n: int, resamples: int, seed: int | np.random.SeedSequence) -> np.ndarray:
    """How often each of n images occurs in each resample: `(resamples, n)`, rows sum to n."""
    images = np.random.default_rng(seed).integers(n, size=(resamples, n))
    flat = (images + n * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def ratio_interval(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int, seed: int, n: int
) -> Interval:
    """A ratio of sums, or the difference of two such ratios, over trainings and faces.

    Args:
        parts: (numerator, denominator) of one method, or of two for first - second, each
            `(trainings, faces)`; with one training the interval is over faces alone.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        n: to report.
    """
    wholes = [ratio(a.sum(), b.sum()) for a, b in parts]
    draws = []
    for a, b in parts:
        sums = _two_level_sums([a[..., None], b[..., None]], resamples, seed)
        draws.append(ratio(*sums).ravel())
    value = wholes[0]
    resampled = draws[0]
    if len(parts) == 2:
        value = wholes[0] - wholes[1]
        resampled = draws[0] - draws[1]
    return Interval(float(value), *_bounds(resampled), n)


def _bounds(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]  # a resample may hold no pixel of a rare class
    if not len(values):
        return np.nan, np.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
