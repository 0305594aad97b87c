"""How near pictures are to real ones as a set, how they vary, and which classes are in them.

KID and CMMD compare two sets of features without pairing them; diversity looks at the pictures of
one condition; presence asks whether a class is in a picture at all, whatever its area. Features are
`(n, d)` and counts `(n, 19)`, numpy or tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ec2face_core.attributes import CLASSES

from .intervals import Interval

if TYPE_CHECKING:
    from pandas import DataFrame


SIGMA = 10.0  # bandwidth of CMMD's kernel

FEWEST = 4  # pictures of a set: halves of two are the fewest with an unbiased estimate

SCALE = 1000.0  # CMMD, and KID in tables, are printed in thousandths


def kid(
    first: Any, second: Any, subsets: int = 1000, seed: int = 0, paired: bool = False
) -> Interval:
    """Kernel inception distance: unbiased squared MMD with the kernel (x.y / d + 1)^3.

    Bińkowski et al. (2018). Lower is nearer; 0 is expected for two sets of one distribution, and
    smaller values occur. Published values average over subsets, which has the same expectation.

    Args:
        first: features of one set, `(m, d)`.
        second: features of the other set, `(n, d)`.
        subsets: random halves of both sets for the interval. An estimate from half of the pictures
            scatters about that from all of them as the latter does about the truth, in first order.
        seed: of the halves.
        paired: row i of both sets belongs to one condition, say a picture and the real image of the
            same face. Such pairs are more alike than chance has it and are left out of the mean, as
            a picture is not compared with itself; both sets are then halved alike.

    Returns:
        The estimate from all pictures with a 95 % interval; n is the smaller number of pictures.

    Raises:
        ValueError: the features do not match or are fewer than four.
    """
    a, b = _features(first, second)
    return _interval(_mmd(a, b, _polynomial, subsets, seed, paired), a, b)


def cmmd(
    first: Any, second: Any, subsets: int = 1000, seed: int = 0, paired: bool = False
) -> Interval:
    """CLIP maximum mean discrepancy: 1000 times the unbiased squared MMD with a Gaussian kernel.

    Jayasumana et al. (2024): exp(-|x - y|^2 / 200) on CLIP image embeddings of unit length, to
    which features are scaled here. Their code takes the biased estimate, which is larger by about
    1000 (1 - mean kernel) (1 / m + 1 / n). Arguments and result as for `kid`.
    """
    a, b = (_unit(x) for x in _features(first, second))
    return _interval(SCALE * _mmd(a, b, _gaussian, subsets, seed, paired), a, b)


def paired_draws(
    metric: str, pictures: Any, references: Any, subsets: int = 1000, seed: int = 0
) -> np.ndarray:
    """KID or CMMD of pictures to the real images of the same faces, in thousandths.

    Features are brought to equal length first: KID's kernel is then (cosine + 1)^3. Draws of
    several methods with one seed come from the same halves of the faces, so their difference is
    paired.

    Args:
        metric: KID or CMMD.
        pictures: features `(n, d)`.
        references: features of the real images, row by row, `(n, d)`.
        subsets: random halves of the faces.
        seed: of the halves.

    Returns:
        The estimate from all faces, then those from the halves, `(1 + subsets,)`.

    Raises:
        ValueError: the features do not match or are fewer than four.
    """
    a, b = (_unit(x) for x in _features(pictures, references))
    kernel = _gaussian
    if metric == "KID":
        kernel = _polynomial
        a = a * np.sqrt(a.shape[1])
        b = b * np.sqrt(b.shape[1])
    return SCALE * _mmd(a, b, kernel, subsets, seed, paired=True)


def diversity(samples: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean distance between pictures of one condition that differ in noise alone.

    Args:
        samples: `(conditions, k, ...)`, k of at least 2; `bootstrap_interval` of the result gives
            an interval over conditions.
        distance: symmetric, of two batches, `(conditions, ...)` each -> `(conditions,)`; LPIPS.

    Returns:
        Means over the k (k - 1) / 2 pairs, `(conditions,)`.

    Raises:
        ValueError: a condition has one picture alone.
    """
    k = samples.shape[1]
    if k < 2:
        raise ValueError("diversity needs two pictures or more of each condition, not one")
    pairs = [distance(samples[:, i], samples[:, j]) for i, j in combinations(range(k), 2)]
    return torch.stack(pairs).mean(0)


def presence(support: Any, predicted: Any, minimum: int = 1) -> DataFrame:
    """How often a class of the mask is in the picture, and how often one that is not in the mask.

    Args:
        support: pixels of each class in each mask, `(n, 19)`, one picture for each mask.
        predicted: pixels of each class in each parsed picture, `(n, 19)`.
        minimum: predicted pixels from which a class counts as present.

    Returns:
        Rows `presence_<class>` of the n pictures whose mask has the class and
        `false_presence_<class>` of those whose mask lacks it: metric, value, ci_low, ci_high
        (percent, Wilson's 95 % interval), n. NaN where there is no such picture.

    Raises:
        ValueError: the shapes differ.
    """
    import pandas as pd
    from scipy.stats import binomtest

    wanted = np.asarray(support) > 0
    present = np.asarray(predicted) >= minimum
    if wanted.shape != present.shape or wanted.shape[1:] != (len(CLASSES),):
        raise ValueError(f"counts are {wanted.shape} and {present.shape}; give (n, 19) of both")
    rows = []
    for name, chosen in (("presence", wanted), ("false_presence", ~wanted)):
        for i, c in enumerate(CLASSES):
            n = int(chosen[:, i].sum())
            hits = int((chosen & present)[:, i].sum())
            interval = Interval(np.nan, np.nan, np.nan, 0)
            if n:
                bounds = binomtest(hits, n).proportion_ci(method="wilson")
                interval = Interval(100 * hits / n, 100 * bounds.low, 100 * bounds.high, n)
            rows.append({"metric": f"{name}_{c}", **interval._asdict()})
    return pd.DataFrame(rows)


def _features(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray]:
    a = np.asarray(first, dtype=np.float64)
    b = np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {a.shape} and {b.shape}; give (m, d) and (n, d)")
    if min(len(a), len(b)) < FEWEST:
        raise ValueError("an unbiased estimate from halves needs four pictures or more in each set")
    return a, b


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _interval(draws: np.ndarray, a: np.ndarray, b: np.ndarray) -> Interval:
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return Interval(float(draws[0]), float(low), float(high), min(len(a), len(b)))


def _polynomial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist

    return np.exp(-cdist(a, b, "sqeuclidean") / (2 * SIGMA**2))


def _mmd(
    a: np.ndarray,
    b: np.ndarray,
    kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
    subsets: int,
    seed: int,
    paired: bool,
) -> np.ndarray:
    """Unbiased squared MMD of `(m, d)` and `(n, d)`: of all pictures, then of random halves."""
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} pictures are no pairs")
    rng = np.random.default_rng(seed)
    chosen = [_halves(len(x), subsets, rng) for x in (a, b)]  # row 0: all pictures
    if paired:
        chosen[1] = chosen[0]
    sizes = [rows.sum(1) for rows in chosen]
    values = np.zeros(1 + subsets)
    for x, rows, size in zip((a, b), chosen, sizes, strict=True):
        matrix = kernel(x, x)
        np.fill_diagonal(matrix, 0)
        values += ((rows @ matrix) * rows).sum(1) / (size * (size - 1))
    matrix = kernel(a, b)
    if paired:
        np.fill_diagonal(matrix, 0)
    across = ((chosen[0] @ matrix) * chosen[1]).sum(1)
    return values - 2 * across / (sizes[0] * (sizes[1] - paired))


def _halves(n: int, subsets: int, rng: np.random.Generator) -> np.ndarray:
    """0 or 1 for each of n pictures, `(1 + subsets, n)`: all in row 0, random halves below."""
    ranks = rng.permuted(np.tile(np.arange(n), (subsets, 1)), axis=1)
    return np.vstack([np.ones(n), ranks < n // 2])
