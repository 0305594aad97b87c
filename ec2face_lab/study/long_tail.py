"""The quality of what everything rests on (notebook 00), and class weights (notebook 01).

Functions return numbers and pictures; drawing them is `plotting.py`'s and `grids.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ec2face_core.config import Config, resolve
from ec2face_core.losses import class_weights, latent_weights, long_tail_weights

from .faces import RARE

if TYPE_CHECKING:
    from pandas import DataFrame

    from ec2face_core.data import FaceDataset


# --------------------------------------------------------------------- class weights (notebook 01)


def latent_side(config: Config) -> int:
    """Side of the latent grid, read from the autoencoder's configuration (1/8 for FLUX.1-dev)."""
    path = resolve(config.backbone.path) / "vae" / "config.json"
    levels = len(json.loads(path.read_text())["block_out_channels"]) if path.is_file() else 4
    return config.data.size // 2 ** (levels - 1)


def weight_table(counts: Tensor, clip: float) -> DataFrame:
    """Eq. 10 for every class that occurs: raw, normalised, and clipped before normalising.

    Normalised weights have mean square 1 over the pixels. `squared_share` is the part of the sum of
    squared weights over all pixels that a class has: Eq. 11 squares the weight.

    Args:
        counts: pixels of each class in the training set, `(19,)`.
        clip: upper bound of the clipped column.
    """
    import pandas as pd

    T, w = counts.double(), class_weights(counts)
    present = T > 0
    share = T / T.sum()
    clipped = w.clamp(max=clip)

    def normalised(weights: Tensor) -> Tensor:
        return weights / (share * weights.square()).sum().sqrt()

    squared = share * normalised(w).square()
    columns = {
        "pixels": counts, "pixel_share": 100 * share, "raw": w, "normalised": normalised(w),
        f"clipped at {clip:g}": normalised(clipped), "squared_share": 100 * squared,
    }  # fmt: skip
    table = pd.DataFrame({"class": CLASSES, **{k: v.numpy() for k, v in columns.items()}})
    return table[present.numpy()].sort_values("raw", ignore_index=True)


def describe_groups(frequency: DataFrame) -> str:
    """How far the groups of Appendix A lie apart in this data, from `attribute_frequency`."""
    lines = []
    for group, rows in frequency.groupby("group"):
        pixels, images = (
            f"{rows[share].min():.3g} to {rows[share].max():.3g} %"
            for share in ("pixel_share", "image_share")
        )
        lines.append(
            f"{group}: {len(rows)} classes, {pixels} of the pixels, {images} of the images"
        )
    return "\n".join(lines)


def reduction_table(label_maps: Tensor, counts: Tensor, config: Config) -> DataFrame:
    """What is left of a class's weight when the weights go to the latent grid.

    For each class and reduction: kept, the mean over the class's pixels of min(1, weight of the
    pixel's latent cell / weight of the class), and lost, the share of the images with the class in
    which no cell has half of its weight (both in percent); n, the images with the class.

    Args:
        label_maps: `b h w`.
        counts: pixels of each class in the training set, `(19,)`.
    """
    import pandas as pd

    pixel = long_tail_weights(label_maps, counts)
    own, rows = pixel_counts(label_maps), []
    for reduction in ("max", "mean", "nearest"):
        loss = dataclasses.replace(config.loss, reduction=reduction, normalize="none", clip=0.0)
        cells = latent_weights(label_maps, counts, latent_side(config), loss)
        ratio = F.interpolate(cells[:, None], label_maps.shape[-2:], mode="nearest")[:, 0] / pixel
        for i, name in enumerate(CLASSES):
            inside = label_maps == i
            if not inside.any():
                continue
            best = (ratio * inside).flatten(1).amax(1)[own[:, i] > 0]
            kept = ratio[inside].clamp(max=1).mean()
            lost = 100 * float((best < 0.5).float().mean())
            rows.append((name, reduction, 100 * float(kept), lost, len(best)))
    return pd.DataFrame(rows, columns=["class", "reduction", "kept", "lost", "n"])


def reduced_weights(label_maps: Tensor, counts: Tensor, config: Config) -> dict[str, Tensor]:
    """The pixel weights and their three reductions, by the headings of `grids.weights_map`."""
    maps = {"pixels": long_tail_weights(label_maps, counts)}
    for reduction in ("max", "mean", "nearest"):
        loss = dataclasses.replace(config.loss, reduction=reduction, normalize="none", clip=0.0)
        maps[f"latent, {reduction}"] = latent_weights(label_maps, counts, latent_side(config), loss)
    return maps


def weighting_effect(
    label_maps: Tensor, counts: Tensor, config: Config, clips: Sequence[float] = (30.0, 10.0)
) -> DataFrame:
    """What Eq. 11's squared weights do to the loss of these faces, before any training.

    Rows: raw weights, mean-normalised ones (the trainer's default), and clipped ones. Columns:
    factor, the mean squared weight, by which loss and gradient grow; largest, the largest squared
    weight over that mean; rare_share, the part of the loss's weight that cells with earring or
    necklace have (percent; their part of the cells is in the last column); effective_cells, the
    share of cells that would give an unweighted mean as steady (Kish, percent).
    """
    import pandas as pd

    settings = {"raw": (0.0, "none"), "normalised": (0.0, "mean")}
    settings |= {f"clipped at {clip:g}, normalised": (clip, "mean") for clip in clips}
    side, rows = latent_side(config), []
    rare = torch.isin(label_maps, torch.tensor(GROUPS["RFA"])).float()
    rare = F.adaptive_max_pool2d(rare, side) > 0
    for name, (clip, normalize) in settings.items():
        loss = dataclasses.replace(config.loss, clip=clip, normalize=normalize)
        squared = latent_weights(label_maps, counts, side, loss).double().square()
        total, mean = squared.sum(), squared.mean()
        kish = total.square() / squared.square().sum() / squared.numel()
        part = squared[rare].sum() / total
        values = (mean, squared.max() / mean, 100 * part, 100 * kish, 100 * rare.double().mean())
        rows.append((name, *map(float, values)))
    columns = ["weights", "factor", "largest", "rare_share", "effective_cells", "rare_cells"]
    return pd.DataFrame(rows, columns=columns)


def about_frequency(frequency: DataFrame) -> str:
    """From `statistics.attribute_frequency`: the span of the long tail."""
    shares = frequency.set_index("class")["pixel_share"].astype(float)
    shares = shares[shares > 0]
    first, last = (display_name(CLASS_ID[shares.idxmax()]), display_name(CLASS_ID[shares.idxmin()]))
    return (
        f"{first} has {shares.max() / shares.min():,.0f} times the pixels of {last} "
        f"({shares.max():.1f} % against {shares.min():.2g} %)."
    )


def about_reductions(reductions: DataFrame) -> str:
    """From `inspection.reduction_table`: what mean and nearest lose of the rare classes."""
    kept = reductions.pivot(index="class", columns="reduction", values="kept")
    lost = reductions.pivot(index="class", columns="reduction", values="lost")
    parts = [
        f"{word}: mean {kept['mean'][name]:.0f} %, nearest {kept['nearest'][name]:.0f} % "
        f"(lost in {lost['mean'][name]:.0f} % and {lost['nearest'][name]:.0f} % of the faces)"
        for name, word in RARE
        if name in kept.index
    ]
    return f"Weight kept on the latent grid, where the maximum keeps all. {'; '.join(parts)}."


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
