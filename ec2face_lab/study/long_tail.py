"""The long tail: how often the classes occur (Fig. 5), and their weights (Eq. 10).

Functions return numbers; `plots` shows them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ec2face_core.attributes import (
    CLASS_ID,
    CLASSES,
    GROUPS,
    NUM_CLASSES,
    display_name,
    pixel_counts,
)
from ec2face_core.config import Config, LossConfig
from ec2face_core.io.paths import resolve
from ec2face_core.losses import bounded_weights, latent_weights, long_tail_weights

from .faces import RARE, class_areas

if TYPE_CHECKING:
    from pandas import DataFrame

    from ec2face_core.data import FaceDataset


REDUCTIONS = ("max", "mean", "nearest")

CHUNK = 16  # faces whose weights are in memory at once


def latent_side(config: Config) -> int:
    """Side of the latent grid, read from the autoencoder's configuration (1/8 for FLUX.1-dev)."""
    path = resolve(config.backbone.path) / "vae" / "config.json"
    levels = len(json.loads(path.read_text())["block_out_channels"]) if path.is_file() else 4
    return config.data.size // 2 ** (levels - 1)


def trained_weights(counts: Tensor, config: LossConfig) -> Tensor:
    """The weight of each class as the training uses it, `(19,)` float64.

    Eq. 10, clipped, and divided by the root mean square over all pixels. (The trainer takes it over
    latent cells, those of the training set or of a step.)

    Args:
        counts: pixels of each class in the training set, `(19,)`.
        config: clip and normalize are used.
    """
    weights = bounded_weights(counts, config)
    if config.normalize != "none":
        squared = (counts.double() / counts.sum()) * weights.square()
        weights = weights / squared.sum().sqrt()
    return weights


def reduction_table(label_maps: Tensor, counts: Tensor, config: Config) -> DataFrame:
    """How much of a class's weight remains when the weights are reduced to the latent grid.

    Args:
        label_maps: `b h w`.
        counts: pixels of each class in the training set, `(19,)`.
        config: the latent grid and the loss.

    Returns:
        Rows class, reduction, kept, lost, n. kept: mean over the class's pixels of min(1, weight of
        the pixel's latent cell / weight of the class). lost: share of the images with the class in
        which no cell has half of its weight. Both in percent; n: the images with the class.
    """
    import pandas as pd

    kept = torch.zeros(len(REDUCTIONS), NUM_CLASSES, dtype=torch.float64)
    lost = torch.zeros(len(REDUCTIONS), NUM_CLASSES).long()
    pixels = torch.zeros(NUM_CLASSES).long()
    images = torch.zeros(NUM_CLASSES).long()
    for maps in label_maps.split(CHUNK):
        present = pixel_counts(maps)
        pixels += present.sum(0)
        images += (present > 0).sum(0)
        weights = long_tail_weights(maps, counts)
        for k, reduction in enumerate(REDUCTIONS):
            cells = _reduced(maps, counts, config, reduction)
            ratio = F.interpolate(cells[:, None], maps.shape[-2:], mode="nearest")[:, 0] / weights
            for i in maps.unique().tolist():
                inside = maps == i
                best = (ratio * inside).flatten(1).amax(1)[present[:, i] > 0]
                kept[k, i] += ratio[inside].clamp(max=1).double().sum()
                lost[k, i] += (best < 0.5).sum()
    kept = 100 * kept / pixels
    lost = 100 * lost / images
    rows = [
        (CLASSES[i], reduction, float(kept[k, i]), float(lost[k, i]), int(images[i]))
        for k, reduction in enumerate(REDUCTIONS)
        for i in images.nonzero()[:, 0].tolist()
    ]
    return pd.DataFrame(rows, columns=["class", "reduction", "kept", "lost", "n"])


def reduced_weights(label_maps: Tensor, counts: Tensor, config: Config) -> dict[str, Tensor]:
    """Eq. 10, its three reductions, and the weights of the training, by their headings.

    The last ones are clipped and normalised as `config.loss` says; the others are as printed.
    """
    maps = {"Eq. 10": long_tail_weights(label_maps, counts)}
    for reduction in REDUCTIONS:
        maps[f"cells: {reduction}"] = _reduced(label_maps, counts, config, reduction)
    maps["as trained"] = latent_weights(label_maps, counts, latent_side(config), config.loss)
    return maps


def _reduced(label_maps: Tensor, counts: Tensor, config: Config, reduction: str) -> Tensor:
    """Raw weights of the latent cells, `b h w`."""
    loss = dataclasses.replace(config.loss, reduction=reduction, normalize="none", clip=0.0)
    return latent_weights(label_maps, counts, latent_side(config), loss)


def weighting_effect(
    label_maps: Tensor, counts: Tensor, config: Config, clips: Sequence[float] = (30.0, 10.0)
) -> DataFrame:
    """The effect of Eq. 11's squared weights on the loss of these faces, before any training.

    Args:
        label_maps: `b h w`.
        counts: pixels of each class in the training set, `(19,)`.
        config: the latent grid and the loss.
        clips: upper bounds of the weights.

    Returns:
        One row for the raw weights, the mean-normalised ones and each
        clipped one. factor: mean squared weight, by which loss and gradient grow. largest: largest
        squared weight over that mean. rare_share: share of the loss's weight in cells with earring
        or necklace (percent). effective_cells: share of the cells that would make an unweighted
        mean equally steady (Kish, percent). rare_cells: cells with earring or necklace (percent).
    """
    import pandas as pd

    settings = {"raw": (0.0, "none"), "normalised": (0.0, "mean")}
    settings |= {f"clipped at {clip:g}, normalised": (clip, "mean") for clip in clips}
    side = latent_side(config)
    rows = []
    rare = torch.isin(label_maps, torch.tensor(GROUPS["RFA"])).float()
    rare = F.adaptive_max_pool2d(rare, side) > 0
    for name, (clip, normalize) in settings.items():
        loss = dataclasses.replace(config.loss, clip=clip, normalize=normalize)
        squared = latent_weights(label_maps, counts, side, loss).double().square()
        total = squared.sum()
        mean = squared.mean()
        kish = total.square() / squared.square().sum() / squared.numel()
        share = squared[rare].sum() / total
        values = (mean, squared.max() / mean, 100 * share, 100 * kish, 100 * rare.double().mean())
        rows.append((name, *map(float, values)))
    columns = ["weights", "factor", "largest", "rare_share", "effective_cells", "rare_cells"]
    return pd.DataFrame(rows, columns=columns)


def describe_frequency(frequency: DataFrame) -> str:
    """From `attribute_frequency`: the span of the long tail."""
    shares = frequency.set_index("class")["pixel_share"].astype(float)
    shares = shares[shares > 0]
    first = display_name(CLASS_ID[shares.idxmax()])
    last = display_name(CLASS_ID[shares.idxmin()])
    return (
        f"{first} has {shares.max() / shares.min():,.0f} times the pixels of {last} "
        f"({shares.max():.1f} % against {shares.min():.2g} %)."
    )


def describe_reductions(reductions: DataFrame) -> str:
    """From `reduction_table`: what mean and nearest lose of the rare classes."""
    kept = reductions.pivot(index="class", columns="reduction", values="kept")
    lost = reductions.pivot(index="class", columns="reduction", values="lost")
    parts = [
        f"{word}: mean {kept['mean'][name]:.0f} %, nearest {kept['nearest'][name]:.0f} % "
        f"(lost in {lost['mean'][name]:.0f} % and {lost['nearest'][name]:.0f} % of the faces)"
        for name, word in RARE
        if name in kept.index
    ]
    return f"Weight kept on the latent grid (the maximum keeps all): {'; '.join(parts)}."


def attribute_frequency(faces: Tensor | FaceDataset) -> DataFrame:
    """How often each class occurs (Fig. 5, Appendix A).

    Args:
        faces: label maps `n h w`, or a dataset, whose images are not read.

    Returns:
        One row for each class in id order: class, group, pixel_share (mean over images of its share
        of the pixels, in percent), image_share (images that have it, in percent), pixels (T of
        Eq. 10).
    """
    import pandas as pd

    counts = pixel_counts(faces) if isinstance(faces, Tensor) else class_areas(faces, faces.ids)
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
