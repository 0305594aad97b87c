"""Statistics: class frequencies (Fig. 5), bootstrap intervals, reverse-estimation curves (Fig. 2).

Every interval is a 95 % percentile bootstrap over images: an image is drawn with all its pixels, so
that pooled ratios keep the dependence within an image. Repeated seeds of one image are summed
before they come here. Arrays are numpy or tensors on the CPU; results are long DataFrames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attributes import CLASSES, GROUPS, NUM_CLASSES, pixel_counts
from .flow import interpolate, reverse_estimate

if TYPE_CHECKING:
    from pandas import DataFrame

    from .datasets import FaceDataset

Decoder = Callable[[Tensor], Tensor]  # latents b c h w -> images b 3 h w in [-1, 1]
Velocity = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]  # (z_t, t, batch) -> v


def attribute_frequency(faces: Tensor | FaceDataset) -> DataFrame:
    """How often each class occurs (Fig. 5, Appendix A).

    Args:
        faces: label maps `n h w`, or a dataset, whose images are not read.

    Returns:
        One row a class in id order: class, group, pixel_share (mean over images of its share of the
        pixels, in percent), image_share (images that have it, in percent), pixels (T of Eq. 10).
    """
    import pandas as pd
    from tqdm.auto import tqdm

    if isinstance(faces, Tensor):
        counts = pixel_counts(faces)
    else:
        with ThreadPoolExecutor() as pool:  # decoding a mask releases the interpreter lock
            rows = pool.map(lambda name: pixel_counts(faces.label_map(name)[None]), faces.ids)
            bar = tqdm(rows, "masks", len(faces.ids), leave=False, mininterval=1)
            counts = torch.cat(list(bar))
    counts = counts.cpu().double()
    group = {i: name for name, ids in GROUPS.items() for i in ids}
    return pd.DataFrame(
        {
            "class": CLASSES,
            "group": [group[i] for i in range(NUM_CLASSES)],
            "pixel_share": 100 * (counts / counts.sum(1, keepdim=True)).mean(0).numpy(),
            "image_share": 100 * (counts > 0).double().mean(0).numpy(),
            "pixels": counts.sum(0).long().numpy(),
        }
    )


def group_means(per_class: np.ndarray) -> dict[str, np.ndarray]:
    """Unweighted means over the classes present: `(..., 19)` -> OAA, HFA, NFA, RFA, each `(...)`.

    A class with NaN is absent and does not count; a group of absent classes is NaN.
    """
    present = np.isfinite(per_class)
    means = {}
    for name, ids in {"OAA": tuple(range(NUM_CLASSES)), **GROUPS}.items():
        total = np.where(present[..., ids], per_class[..., ids], 0).sum(-1)
        means[name] = _ratio(total, present[..., ids].sum(-1))
    return means


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images `b 3 h w` in [-1, 1], `(b,)`; at most 106 dB."""
    error = (images.clamp(-1, 1) - references.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


# --- intervals ------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval, from n images."""

    value: float
    ci_low: float
    ci_high: float
    n: int


def bootstrap_interval(values: Any, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of one value an image, `(n,)`; NaN values are left out.

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
    correct, support = _array(correct), _array(support)
    value = _accuracies(np.ones((1, len(correct))), correct, support)
    draws = _accuracies(_resample(len(correct), resamples, seed), correct, support)
    return _table(value, draws, support)


def paired_accuracy_difference(
    first: tuple[Any, Any], second: tuple[Any, Any], resamples: int = 1000, seed: int = 0
) -> DataFrame:
    """How much higher the first method's accuracies are than the second's on the same images.

    Both methods see the same resampled images, so what the images have in common cancels.

    Args:
        first: (correct, support), each `(n, 19)`.
        second: the same of the other method, image by image.

    Returns:
        The rows of `bootstrap_accuracy`, with percentage points as values; an interval without 0
        is a difference that the choice of test images does not explain.
    """
    a, b = [_array(x) for x in first], [_array(x) for x in second]
    if a[0].shape != b[0].shape or not np.array_equal(a[1], b[1]):
        raise ValueError("a paired difference needs the same images with the same masks, in order")
    ones, weights = np.ones((1, len(a[0]))), _resample(len(a[0]), resamples, seed)
    value = _accuracies(ones, *a) - _accuracies(ones, *b)
    draws = _accuracies(weights, *a) - _accuracies(weights, *b)
    return _table(value, draws, a[1])


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _resample(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n images occurs in each resample: `(resamples, n)`, rows sum to n."""
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    flat = (drawn + n * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _accuracies(weights: np.ndarray, correct: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Pooled accuracies of resamples `(r, n)`: `(r, 23)` percent, groups first."""
    per_class = _ratio(100 * (weights @ correct), weights @ support)
    return np.column_stack([*group_means(per_class).values(), per_class])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    nothing = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=nothing, where=denominator > 0)


def _bounds(draws: np.ndarray) -> tuple[float, float]:
    draws = draws[np.isfinite(draws)]  # a resample may hold no pixel of a rare class
    if not len(draws):
        return np.nan, np.nan
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _table(value: np.ndarray, draws: np.ndarray, support: np.ndarray) -> DataFrame:
    import pandas as pd

    members = {"OAA": tuple(range(NUM_CLASSES)), **GROUPS}
    members |= {name: (i,) for i, name in enumerate(CLASSES)}
    rows = []
    for column, (metric, ids) in enumerate(members.items()):
        pixels = support[:, ids].sum(1)
        interval = Interval(value[0, column], *_bounds(draws[:, column]), int((pixels > 0).sum()))
        rows.append({"metric": metric, **interval._asdict(), "pixels": int(pixels.sum())})
    return pd.DataFrame(rows)


# --- reliability of reverse estimation ------------------------------------------------------------


@torch.no_grad()
def reverse_estimation(
    batch: Mapping[str, Any], t: float, noise: Tensor, velocity: Velocity, decode: Decoder
) -> tuple[Tensor, Tensor]:
    """Noise a batch to time t and step straight back (Eq. 5).

    Returns:
        z_tilde, the estimated latents, and x_tilde, their image in [-1, 1].
    """
    z = batch["z"]
    times = torch.full((len(z),), t, device=z.device)
    z_t = interpolate(z, noise, times)
    z_tilde = reverse_estimate(z_t, velocity(z_t, times, batch), times)
    return z_tilde, decode(z_tilde).clamp(-1, 1)


@torch.no_grad()
def reliability(
    batches: Iterable[Mapping[str, Any]],
    velocity: Velocity,
    decode: Decoder,
    times: Sequence[float] = tuple(i / 10 for i in range(11)),
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    parser: Any = None,
    clip: Any = None,
    resamples: int = 1000,
    seed: int = 0,
) -> DataFrame:
    """How good reverse estimation is at each time (Fig. 2).

    Args:
        batches: mappings with `z` (latents `b c h w`), with `image` (`b 3 h w` in [-1, 1]; without
            it the decoded z is the reference) and, for the parser, `label_map` (`b h w`).
        velocity: the model, called as `velocity(z_t, t, batch)`.
        decode: latents to images.
        times: the grid, in [0, 1].
        lpips: distance of images to references, `(b,)`.
        parser: a `FaceParser`; the label map is its target.
        clip: a `ClipScorer`; compares estimated and real image.
        seed: of the noise, which is the same at every time, and of the bootstrap.

    Returns:
        Rows t, metric, value, ci_low, ci_high, n. Metrics: latent_mse, psnr (dB), and as given
        lpips, pixel_accuracy and OAA (percent), clip_similarity (cosine).
    """
    import pandas as pd
    from tqdm.auto import tqdm

    scores: dict[tuple[float, str], list[Tensor]] = {}
    for index, batch in enumerate(tqdm(batches, desc="reliability", leave=False, mininterval=1)):
        z = batch["z"]
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        noise = torch.randn(z.shape, generator=generator).to(z)
        reference = batch["image"].to(z) if "image" in batch else decode(z).clamp(-1, 1)
        real_features = clip.image_features(reference) if clip else None
        for t in times:
            z_tilde, x_tilde = reverse_estimation(batch, t, noise, velocity, decode)
            found = {
                "latent_mse": (z_tilde - z).square().flatten(1).mean(1),
                "psnr": psnr(x_tilde, reference),
            }
            if lpips:
                found["lpips"] = lpips(x_tilde, reference)
            if parser:
                target = batch["label_map"].to(z.device)
                correct = pixel_counts(target, where=parser.parse(x_tilde) == target)
                found["counts"] = torch.stack([correct, pixel_counts(target)], 1)
            if clip:
                found["clip_similarity"] = (clip.image_features(x_tilde) * real_features).sum(1)
            for metric, values in found.items():
                scores.setdefault((t, metric), []).append(values.double().cpu())

    rows = []
    for (t, metric), parts in scores.items():
        values = torch.cat(parts).numpy()
        if metric != "counts":
            interval = bootstrap_interval(values, resamples, seed)
            rows.append({"t": t, "metric": metric, **interval._asdict()})
            continue
        correct, support = values[:, 0], values[:, 1]
        share = bootstrap_interval(100 * correct.sum(1) / support.sum(1), resamples, seed)
        rows.append({"t": t, "metric": "pixel_accuracy", **share._asdict()})
        overall = bootstrap_accuracy(correct, support, resamples, seed).iloc[0]
        rows.append({"t": t, **overall.drop("pixels")})
    return pd.DataFrame(rows)


def normalised(curves: DataFrame) -> DataFrame:
    """Reliability curves with value, ci_low and ci_high brought to [0, 1], metric by metric.

    1 is the reliable end: the best value of a metric that falls with t (PSNR), as of one that rises
    (LPIPS); the direction is read off the curve's two ends.
    """
    curves = curves.copy()
    for _, rows in curves.groupby("metric"):
        value = rows.sort_values("t")["value"].astype(float)
        best, worst = value.max(), value.min()
        if value.iloc[0] < value.iloc[-1]:
            best, worst = worst, best
        columns = [name for name in ("value", "ci_low", "ci_high") if name in curves]
        curves.loc[rows.index, columns] = (rows[columns] - worst) / (best - worst)
    return curves


def suggest_center(curve: DataFrame) -> tuple[float, float]:
    """The beta(t) of Eq. 8 that follows one metric of `reliability`: its (steepness, center)."""
    from scipy.optimize import curve_fit

    if curve["metric"].nunique() != 1 or curve["value"].nunique() < 3:
        raise ValueError(
            "a curve has one metric and three values or more: curves[curves.metric == 'psnr']"
        )
    t, reliable = normalised(curve)[["t", "value"]].to_numpy(dtype=float).T

    def logistic(t: np.ndarray, steepness: float, center: float) -> np.ndarray:
        return 1 / (1 + np.exp(steepness * (t - center)))

    (steepness, center), _ = curve_fit(
        logistic, t, reliable, p0=(10.0, 0.5), bounds=([0.0, 0.0], [200.0, 1.0])
    )
    return float(steepness), float(center)
