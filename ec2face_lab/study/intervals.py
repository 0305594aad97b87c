"""Bootstrap intervals of scores, of mask accuracies, and of paired differences.

Every interval is a 95 % percentile bootstrap over images: an image is resampled with all its
pixels, so that pooled ratios keep the dependence within an image. Repeated seeds of one image are
summed beforehand. Arrays are numpy or tensors on the CPU; results are long DataFrames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ec2face_core.attributes import CLASSES, GROUPS, NUM_CLASSES
from ec2face_core.config import Config
from ec2face_core.metrics import group_means, ratio

from ..plots.save import COLUMNS
from .scores import ROLES, counts

if TYPE_CHECKING:
    from pandas import DataFrame


def summarise(
    per_image: DataFrame, table: str, method: str, dataset: str, config: Config, seeds: str = ""
) -> DataFrame:
    """Long rows of a table with 95 % intervals over images, one row for each cell.

    Args:
        per_image: rows of `score_folder`.
        table: written into every row, like `method`, `dataset` and `seeds`.
        method: name in the table.
        dataset: name of the data root.
        config: number of resamples and seed of the bootstrap.
        seeds: that were trained and sampled.
    """
    bootstrap = (config.evaluation.bootstrap, config.seed)
    return _long_rows(
        lambda column: bootstrap_interval(per_image[column], *bootstrap),
        lambda role: bootstrap_accuracy(*counts(per_image, role), *bootstrap),
        table=table, method=method, dataset=dataset, seeds=seeds,
    )  # fmt: skip


def summarise_difference(
    first: DataFrame,
    second: DataFrame,
    table: str,
    method: str,
    dataset: str,
    config: Config,
    seeds: str = "",
) -> DataFrame:
    """Long rows of first - second on the same images.

    A difference is significant if its 95 % interval does not contain 0. Arguments as for
    `summarise`.

    Raises:
        ValueError: the pictures are not of the same faces, in the same order.
    """
    if list(first["id"]) != list(second["id"]):
        raise ValueError("a paired difference needs the same faces in the same order")
    bootstrap = (config.evaluation.bootstrap, config.seed)

    def accuracy(role: str) -> DataFrame:
        return paired_accuracy_difference(counts(first, role), counts(second, role), *bootstrap)

    return _long_rows(
        lambda column: bootstrap_interval(first[column] - second[column], *bootstrap), accuracy,
        table=table, method=method, dataset=dataset, seeds=seeds,
    )  # fmt: skip


def _long_rows(
    score: Callable[[str], Interval], accuracy: Callable[[str], DataFrame], **labels: str
) -> DataFrame:
    import pandas as pd

    rows = [{"metric": "Text", "critic": r, **score(f"text_{r}")._asdict()} for r in ROLES]
    for role in ROLES:
        table = accuracy(role).drop(columns="pixels")
        rows += table.assign(critic=role).to_dict("records")
    rows += [{"metric": m, "critic": "", **score(m.lower())._asdict()} for m in ("LPIPS", "NIQE")]
    return pd.DataFrame(rows).assign(source="ours", **labels)[list(COLUMNS)]


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
    correct: Any, support: Any, resamples: int = 1000, seed: int = 0
) -> DataFrame:
    """Pooled mask accuracies with intervals, from the counts `(n, 19)` of `mask_counts`.

    Returns:
        Rows OAA, HFA, NFA, RFA and the 19 classes: metric, value, ci_low, ci_high (percent),
        n (images that have a pixel of it), pixels. A class without pixels is NaN.
    """
    correct = _array(correct)
    support = _array(support)
    value = _accuracies(np.ones((1, len(correct))), correct, support)
    resampled = _accuracies(_resample(len(correct), resamples, seed), correct, support)
    return _table(value, resampled, support)


def paired_accuracy_difference(
    first: tuple[Any, Any], second: tuple[Any, Any], resamples: int = 1000, seed: int = 0
) -> DataFrame:
    """How much higher the first method's accuracies are than the second's on the same images.

    Both methods are resampled by the same images, so what the images have in common cancels.

    Args:
        first: (correct, support), each `(n, 19)`.
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
    ones = np.ones((1, len(a[0])))
    weights = _resample(len(a[0]), resamples, seed)
    value = _accuracies(ones, *a) - _accuracies(ones, *b)
    resampled = _accuracies(weights, *a) - _accuracies(weights, *b)
    return _table(value, resampled, a[1])


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _resample(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n images occurs in each resample: `(resamples, n)`, rows sum to n."""
    images = np.random.default_rng(seed).integers(n, size=(resamples, n))
    flat = (images + n * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _accuracies(weights: np.ndarray, correct: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Pooled accuracies of resamples `(r, n)`: `(r, 23)` percent, groups first."""
    per_class = ratio(100 * (weights @ correct), weights @ support)
    return np.column_stack([*group_means(per_class).values(), per_class])


def _bounds(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]  # a resample may hold no pixel of a rare class
    if not len(values):
        return np.nan, np.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _table(value: np.ndarray, resampled: np.ndarray, support: np.ndarray) -> DataFrame:
    """Rows of accuracies `(1, 23)`, of their resamples `(r, 23)` and of the pixels `(n, 19)`."""
    import pandas as pd

    members = {"OAA": tuple(range(NUM_CLASSES)), **GROUPS}
    members |= {name: (i,) for i, name in enumerate(CLASSES)}
    rows = []
    for column, (metric, ids) in enumerate(members.items()):
        pixels = support[:, ids].sum(1)
        bounds = _bounds(resampled[:, column])
        interval = Interval(value[0, column], *bounds, int((pixels > 0).sum()))
        rows.append({"metric": metric, **interval._asdict(), "pixels": int(pixels.sum())})
    return pd.DataFrame(rows)
