"""What the notebooks of the parts call: bundle, class weights, reverse estimation, framework.

Each function returns numbers or pictures; drawing is `plotting.py`'s, `grids.py`'s and, for what
only a notebook draws, the figures at the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import CLASSES, class_weights, long_tail_weights, pixel_counts
from .backbone import decode_latents, encode_images, encode_text, load_backbone, load_mask_lora
from .conditioning import mask_latents_of, predict_velocity
from .config import ROOT, Config, adapter_dir, resolve
from .datasets import FaceDataset, open_dataset
from .flow import interpolate
from .generate import BASE, REAL, ROUND_TRIP, data_digest, generate_split, load_pictures, picture_key
from .losses import latent_weights
from .metrics import psnr
from .plotting import CYCLE, beta_values, mask_picture, new_figure, picture, styled
from .scoring import CRITICS, load_critics, write_frame
from .statistics import bootstrap_interval, reliability, reverse_estimation, suggest_center

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

TIMES = tuple(i / 10 for i in range(11))


# --------------------------------------------------------------------------- the bundle (notebook 00)


def bundle_provenance(folder: str = "data/mini") -> DataFrame:
    """What made each part of the bundle: part, MB, seconds, commit, and what its file records."""
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
        made = {k: v for k, v in about["parameters"].items() if isinstance(v, int | float | str)}
        rows.append(
            {
                "part": whole.relative_to(root).as_posix(),
                "MB": round(size / 2**20, 2),
                "minutes": round((about["seconds"] or 0) / 60, 1),
                "commit": (about["commit"] or "–")[:7],
                "recorded": ", ".join(f"{k} {v}" for k, v in made.items()),
            }
        )
    return pd.DataFrame(rows, columns=["part", "MB", "minutes", "commit", "recorded"])


def round_trip_quality(config: Config, split: str = "test") -> tuple[DataFrame, Tensor, Tensor]:
    """The autoencoder on held-out faces.

    Returns:
        One row metric, value, ci_low, ci_high, n (PSNR in dB); the real images and their round
        trips, `b 3 h w`.
    """
    import pandas as pd

    ids = open_dataset(config, split).ids[: config.evaluation.limit or None]
    real, copies = (
        load_pictures(generate_split(config, source, split), ids) for source in (REAL, ROUND_TRIP)
    )
    interval = bootstrap_interval(psnr(copies, real), config.evaluation.bootstrap, config.seed)
    return pd.DataFrame([{"metric": "PSNR (dB)", **interval._asdict()}]), real, copies


def clip_retrieval(config: Config, split: str = "test", candidates: int = 256) -> DataFrame:
    """How often each CLIP finds a real face's own caption among others; rows critic, columns of
    `critics.retrieval` in percent."""
    import pandas as pd

    from .critics import retrieval

    dataset = open_dataset(config, split)
    ids, rows = dataset.ids[:candidates], []
    images = torch.stack([dataset.image(name) for name in ids])
    captions = [dataset.manifest_caption(name) for name in ids]
    for critic in CRITICS:
        clip = load_critics(config).clips[critic]
        with torch.no_grad():
            seen = torch.cat([clip.image_features(x.to(clip.device)) for x in images.split(32)])
        rows.append({"critic": critic, **retrieval(seen, clip.text_features(captions), captions)})
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


def reduction_table(label_maps: Tensor, counts: Tensor, config: Config) -> DataFrame:
    """What is left of a class's weight when the weights go to the latent grid.

    For each class and reduction: kept, the mean over the class's pixels of min(1, weight of the
    pixel's latent cell / weight of the class), and lost, the share of the images with the class in
    which no cell has half of its weight (both in percent).

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
            rows.append({"class": name, "reduction": reduction, "kept": 100 * float(kept),
                         "lost": 100 * float((best < 0.5).float().mean())})  # fmt: skip
    return pd.DataFrame(rows)


def reduced_weights(label_maps: Tensor, counts: Tensor, config: Config) -> dict[str, Tensor]:
    """The pixel weights and their three reductions, by the headings of `grids.weights_map`."""
    maps = {"pixels": long_tail_weights(label_maps, counts)}
    for reduction in ("max", "mean", "nearest"):
        loss = dataclasses.replace(config.loss, reduction=reduction, normalize="none", clip=0.0)
        maps[f"latent, {reduction}"] = latent_weights(label_maps, counts, latent_side(config), loss)
    return maps


# --------------------------------------------------------- reverse estimation (notebooks 02 and 03)


def reliability_curves(config: Config, variant: str, faces: int = 48) -> DataFrame:
    """Fig. 2's curves for a variant, or for the base model (`base`, text alone).

    The critics are those that guide training: it is their reading of the estimate that Eq. 9 uses.
    Kept in `runs/<profile>/reliability/` and read from there when nothing changed.

    Returns:
        Rows t, metric (PSNR (dB), LPIPS, mask OAA (%), CLIP similarity), value, ci_low, ci_high, n.
    """
    import pandas as pd

    dataset = open_dataset(config, "test")
    ids = dataset.ids[:faces]
    key = picture_key(config, variant, dataset, f"{data_digest(dataset)} {faces}")
    cache = config.run_dir / "reliability" / f"{variant}-{key}.csv"
    if cache.is_file():
        return pd.read_csv(cache)
    model = _Estimator(config, variant, dataset)
    critics, guiding = load_critics(config), CRITICS[1]
    curves = reliability(
        (model.batch(ids[i : i + 16]) for i in range(0, len(ids), 16)),
        model.velocity,
        model.decode,
        TIMES,
        critics.lpips,
        critics.parsers[guiding],
        critics.clips[guiding],
        config.evaluation.bootstrap,
        config.seed,
    )
    names = {"psnr": "PSNR (dB)", "lpips": "LPIPS", "OAA": "mask OAA (%)",
             "clip_similarity": "CLIP similarity"}  # fmt: skip
    curves = curves[curves["metric"].isin(names)].assign(metric=lambda c: c["metric"].map(names))
    curves = curves.sort_values(["metric", "t"], ignore_index=True)
    write_frame(cache, curves)
    return curves


def reverse_examples(
    config: Config, variant: str, ids: Sequence[str], times: Sequence[float]
) -> Tensor:
    """Decoded reverse estimates of test faces: `faces times 3 h w` in [-1, 1]."""
    model = _Estimator(config, variant, open_dataset(config, "test"))
    batch = model.batch(ids)
    noise = torch.randn(batch["z"].shape, generator=torch.Generator().manual_seed(config.seed))
    noise = noise.to(batch["z"])
    columns = [
        reverse_estimation(batch, t, noise, model.velocity, model.decode)[1].cpu() for t in times
    ]
    return torch.stack(columns, 1)


class _Estimator:
    """A variant's velocity on faces of a dataset, in the form that `statistics` asks for."""

    def __init__(self, config: Config, variant: str, dataset: FaceDataset) -> None:
        self.config, self.dataset, self.masked = config, dataset, variant != BASE
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = load_backbone(config.backbone).to(self.device)
        if self.masked:
            load_mask_lora(self.backbone.transformer, adapter_dir(config, variant))

    @torch.no_grad()
    def batch(self, ids: Sequence[str]) -> dict[str, Any]:
        """z, image, label_map, z_mask and the embedded manifest captions of these faces."""
        maps = torch.stack([self.dataset.label_map(name) for name in ids]).to(self.device)
        image = torch.stack([self.dataset.image(name) for name in ids]).to(self.device)
        captions = [self.dataset.manifest_caption(name) for name in ids]
        return {
            "z": encode_images(self.backbone.vae, image),
            "z_mask": mask_latents_of(self.backbone.vae, maps) if self.masked else None,
            "text": encode_text(self.backbone, captions, self.config.backbone.text_length),
            "image": image,
            "label_map": maps,
        }

    def velocity(self, z_t: Tensor, t: Tensor, batch: Mapping[str, Any]) -> Tensor:
        guidance = self.config.sampling.guidance
        return predict_velocity(
            self.backbone.transformer, z_t, t, batch["text"], batch["z_mask"], guidance=guidance
        )

    def decode(self, z: Tensor) -> Tensor:
        return decode_latents(self.backbone.vae, z)


def scaled_curves(curves: DataFrame) -> DataFrame:
    """Each metric brought to [0, 1] with 1 at its reliable end, as `plotting.beta_curves` wants."""
    import pandas as pd

    parts = []
    for _, rows in curves.groupby("metric"):
        rows = rows.sort_values("t")
        first, last = rows["value"].iloc[0], rows["value"].iloc[-1]
        worst = rows["value"].min() if first > last else rows["value"].max()
        best = rows["value"].max() if first > last else rows["value"].min()
        span = best - worst if best != worst else 1.0
        parts.append(rows.assign(value=(rows["value"] - worst) / span)[["t", "metric", "value"]])
    return pd.concat(parts, ignore_index=True)


def fitted_beta(curves: DataFrame, config: Config) -> DataFrame:
    """The β(t) that follows each reliability curve, below the configured one.

    Rows: source, steepness, center, and half_weight, the t at which t · β(t) is largest.
    """
    import pandas as pd

    settings = {"configured (Eq. 8)": (config.loss.steepness, config.loss.center)}
    for metric, rows in curves.groupby("metric"):
        if rows["value"].nunique() >= 3:
            settings[f"fitted to {metric}"] = suggest_center(rows)
    t = np.linspace(0, 1, 1001)
    return pd.DataFrame(
        [
            {"source": source, "steepness": steepness, "center": center,
             "strongest_at": float(t[(t * beta_values(t, steepness, center)).argmax()])}
            for source, (steepness, center) in settings.items()
        ]  # fmt: skip
    )
