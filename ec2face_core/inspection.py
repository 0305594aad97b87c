"""The quality of what everything rests on (notebook 00), and class weights (notebook 01).

Functions return numbers and pictures; drawing them is `plotting.py`'s and `grids.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import CLASSES, GROUPS, class_weights, long_tail_weights, pixel_counts
from .config import Config, resolve
from .datasets import open_dataset
from .generate import REAL, ROUND_TRIP, evaluated_ids, generate_split, load_pictures
from .losses import latent_weights
from .metrics import psnr
from .scoring import load_critics
from .statistics import bootstrap_interval

if TYPE_CHECKING:
    from pandas import DataFrame

CHUNK = 64  # pictures in memory at once


# ------------------------------------------------------------------------ the bundle (notebook 00)


def bundle_provenance(folder: str = "data/mini") -> DataFrame:
    """What made each part of the bundle: part, MB, and the training's samples, minutes, commit."""
    import pandas as pd

    rows, root = [], resolve(folder)
    for path in sorted(root.rglob("*.json")):
        try:
            about = json.loads(path.read_text())
        except ValueError:
            continue
        if not isinstance(about, dict) or "seconds" not in about or "commit" not in about:
            continue  # a model's own configuration
        whole = path.parent if path.stem == "provenance" else path.with_suffix(".pt")
        files = whole.rglob("*") if whole.is_dir() else [whole]
        size = sum(f.stat().st_size for f in files if f.is_file())
        made = about["parameters"]
        samples = made.get("samples", made.get("faces_seen"))
        minutes, commit = round((about["seconds"] or 0) / 60, 1), (about["commit"] or "–")[:7]
        part, size = whole.relative_to(root).as_posix(), round(size / 2**20, 2)
        rows.append((part, size, samples, minutes, commit))
    return pd.DataFrame(rows, columns=["part", "MB", "samples", "minutes", "commit"])


def round_trip_quality(
    config: Config, split: str = "test", shown: int = 8
) -> tuple[DataFrame, ...]:
    """The autoencoder on held-out faces.

    Returns:
        One row metric, value, ci_low, ci_high, n (PSNR in dB); the first real images and their
        round trips, each `shown 3 h w`.
    """
    import pandas as pd

    ids = evaluated_ids(config, open_dataset(config, split))
    real, copies = (generate_split(config, source, split) for source in (REAL, ROUND_TRIP))
    parts = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]
    values = [psnr(load_pictures(copies, part), load_pictures(real, part)) for part in parts]
    interval = bootstrap_interval(torch.cat(values), config.evaluation.bootstrap, config.seed)
    table = pd.DataFrame([{"metric": "PSNR (dB)", **interval._asdict()}])
    return table, load_pictures(real, ids[:shown]), load_pictures(copies, ids[:shown])


def clip_retrieval(config: Config, split: str = "test", candidates: int = 256) -> DataFrame:
    """How often each CLIP finds a real face's own caption among others; rows critic, columns of
    `critics.retrieval` in percent."""
    import pandas as pd

    from .critics import retrieval

    dataset = open_dataset(config, split)
    ids, rows = dataset.ids[:candidates], []
    captions = [dataset.manifest_caption(name) for name in ids]
    for critic, clip in load_critics(config).clips.items():
        with torch.no_grad():
            seen = [clip.image_features(dataset.image(n)[None].to(clip.device)) for n in ids]
        found = retrieval(torch.cat(seen), clip.text_features(captions), captions)
        rows.append({"critic": critic, **found})
    return pd.DataFrame(rows)


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
