"""Pictures that are edited through their masks: what is kept, what is added, who it still is.

Each edit adds one rare thing (`painter/stamps.py`) to the mask of a test face that wears none. The
edited picture is compared with one that is sampled anew from the same mask, text and noise, and
with the autoencoder's round trip, which shows what the latents can keep at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, pixel_counts
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.io.report import DataError
from ec2face_core.metrics import mask_counts

from ..painter.edits import changed_pixels
from ..painter.stamps import STAMPS, stamp
from .faces import faces
from .intervals import bootstrap_accuracy, bootstrap_interval
from .painters import EC2Face, RoundTrip, picture_seed
from .scores import evaluated_ids, perception_models

if TYPE_CHECKING:
    from pandas import DataFrame

PHRASES = {
    "earrings": "earrings",
    "necklace": "a necklace",
    "glasses": "eyeglasses",
    "hat": "a hat",
}

EDITED = "edited"
ANEW = "sampled anew"
COPY = "round trip"
WORN = "worn in the data, round trip"

Row = dict[str, "str | float | int"]


class Edits(NamedTuple):
    """Faces before and after one edit; label maps `b h w`, images `b 3 h w` in [-1, 1]."""

    masks: Tensor
    new_masks: Tensor
    images: Tensor
    copies: Tensor
    edited: Tensor
    anew: Tensor


def edit_prompt(name: str) -> str:
    """A sentence that asks for a stamp and says nothing else."""
    return f"This person is wearing {PHRASES[name]}."


def stamped_faces(dataset: FaceDataset, ids: Sequence[str], name: str) -> tuple[list[str], Tensor]:
    """Those of these faces that wear no such thing and have room for it, and their new masks."""
    class_id = CLASS_ID[STAMPS[name][0]]
    kept = []
    masks = []
    for face in ids:
        label_map = dataset.label_map(face)
        if (label_map == class_id).any():
            continue
        try:
            stamped = stamp(label_map.numpy(), name)
        except DataError:  # no neck is visible, for example
            continue
        kept.append(face)
        masks.append(torch.from_numpy(stamped))
    return kept, torch.stack(masks)


def edits(
    config: Config, method: str, name: str, count: int = 100, margin: int | None = None
) -> Edits:
    """The first test faces that wear no such thing, edited so that they do.

    Args:
        config: weights and sampling.
        method: one of `VARIANTS`.
        name: one of `STAMPS`.
        count: faces at most.
        margin: of the edit, in pixels; None: 1/32 of the side.
    """
    dataset = open_dataset(config, "test")
    ids, new_masks = stamped_faces(dataset, evaluated_ids(config, dataset), name)
    ids = ids[:count]
    new_masks = new_masks[:count]
    _, masks, images = faces(dataset, ids)
    painter = EC2Face(config, method, dataset)
    prompts = [edit_prompt(name)] * len(ids)
    seeds = [picture_seed(config, face) for face in ids]
    edited = []
    anew = []
    for start in range(0, len(ids), config.sampling.batch_size):
        part = slice(start, start + config.sampling.batch_size)
        given = (images[part] / 2 + 0.5, masks[part], new_masks[part])
        edited.append(painter.edit(*given, prompts[part], seeds[part], margin))
        anew.append(painter.sample(prompts[part], new_masks[part], seeds[part]))
    copies = RoundTrip(config, COPY, dataset).paint(ids)
    pictures = (copies, torch.cat(edited), torch.cat(anew))
    return Edits(masks, new_masks, images, *(2 * part.cpu() - 1 for part in pictures))


def edit_study(
    config: Config, method: str = "both", count: int = 100
) -> tuple[DataFrame, dict[str, Edits]]:
    """Every stamp on the first test faces that wear no such thing.

    Args:
        config: weights and sampling.
        method: one of `VARIANTS`.
        count: faces of each stamp, at most.

    Returns:
        Long rows, method = `<stamp>: edited`, `<stamp>: sampled anew`, `<stamp>: round trip` and
        `<stamp>: worn in the data, round trip`. Metrics: PSNR_copy and PSNR_photo, of the pixels
        that the edit is to keep, against the round trip and the photo (dB, mean over faces);
        F1_added, of the class that was added (percent, pooled); and Identity, the distance of the
        evaluating CLIP's image features from the round trip's (100 - 100 cosine). And the edits.
    """
    import pandas as pd

    shown = {name: edits(config, method, name, count) for name in STAMPS}
    rows: list[Row] = []
    for name, made in shown.items():
        rows += edit_rows(config, name, made)
        rows.append(_worn(config, name, count))
    return pd.DataFrame(rows), shown


def edit_rows(config: Config, name: str, made: Edits) -> list[Row]:
    """The rows of one stamp, from its edits."""
    resamples = config.evaluation.bootstrap
    models = perception_models(config)
    clip = models.clips["independent"]
    kept = ~changed_pixels(made.masks, made.new_masks)
    features = clip.image_features(made.copies.to(models.device))
    rows: list[Row] = []
    for kind, images in ((EDITED, made.edited), (ANEW, made.anew), (COPY, made.copies)):
        values = {"PSNR_photo": psnr_of(images, made.images, kept)}
        if kind != COPY:
            own = clip.image_features(images.to(models.device))
            values["PSNR_copy"] = psnr_of(images, made.copies, kept)
            values["Identity"] = 100 - 100 * (own * features).sum(-1).cpu()
        for metric, value in values.items():
            interval = bootstrap_interval(value, resamples)
            critic = "independent" if metric == "Identity" else ""
            rows.append(_row(name, kind, metric, critic) | interval._asdict())
        if kind != COPY:
            rows.append(_row(name, kind, "F1_added", "independent"))
            rows[-1] |= _f1(config, name, images, made.new_masks)
    return rows


def psnr_of(images: Tensor, references: Tensor, where: Tensor) -> Tensor:
    """PSNR in dB over some pixels of images `b 3 h w` in [-1, 1], `(b,)`; at most 106 dB.

    where: `b h w` bool; NaN for an image without such pixels.
    """
    error = (images.clamp(-1, 1) - references.clamp(-1, 1)).square().mean(1)
    mean = (error * where).flatten(1).sum(1) / where.flatten(1).sum(1)
    return 10 * torch.log10(4 / mean.clamp(min=1e-10))


def _f1(config: Config, name: str, images: Tensor, masks: Tensor) -> Row:
    """F1 of a stamp's class as the evaluating parser reads the images, with its interval."""
    parser = perception_models(config).parsers["independent"]
    parsed = parser.parse(images.to(parser.device)).cpu()
    counts = (*mask_counts(parsed, masks), pixel_counts(parsed))
    table = bootstrap_accuracy(*counts, config.evaluation.bootstrap).set_index("metric")
    row = table.loc[f"f1_{STAMPS[name][0]}"]
    return {key: float(row[key]) for key in ("value", "ci_low", "ci_high")} | {"n": len(images)}


def _worn(config: Config, name: str, count: int) -> Row:
    """F1 of the class on faces that wear it in the data, after the autoencoder: a ceiling."""
    dataset = open_dataset(config, "test")
    class_id = CLASS_ID[STAMPS[name][0]]
    ids = evaluated_ids(config, dataset)
    worn = [face for face in ids if (dataset.label_map(face) == class_id).any()][:count]
    row = _row(name, WORN, "F1_added", "independent")
    if not worn:
        return row | {"value": np.nan, "ci_low": np.nan, "ci_high": np.nan, "n": 0}
    copies = 2 * RoundTrip(config, COPY, dataset).paint(worn) - 1
    masks = torch.stack([dataset.label_map(face) for face in worn])
    return row | _f1(config, name, copies.cpu(), masks)


def _row(name: str, kind: str, metric: str, critic: str) -> Row:
    return {"method": f"{name}: {kind}", "metric": metric, "critic": critic}


def feature_scale(config: Config, count: int = 100) -> float:
    """Median distance of features (100 - 100 cosine) between two different test faces."""
    dataset = open_dataset(config, "test")
    _, _, images = faces(dataset, evaluated_ids(config, dataset)[:count])
    models = perception_models(config)
    features = models.clips["independent"].image_features(images.to(models.device))
    pairs = torch.triu_indices(len(features), len(features), 1)
    return float((100 - 100 * features @ features.T)[pairs[0], pairs[1]].median())


def describe_edits(rows: DataFrame) -> str:
    """What is kept and what is added, from the rows of `edit_study`."""
    values = rows.set_index(["method", "metric"])["value"]
    parts = []
    for name in STAMPS:
        kept = [values[f"{name}: {kind}", "PSNR_copy"] for kind in (EDITED, ANEW)]
        f1 = [values[f"{name}: {kind}", "F1_added"] for kind in (EDITED, ANEW, WORN)]
        parts.append(
            f"{name}: {kept[0]:.1f} dB to the round trip where nothing was to change (sampled anew "
            f"{kept[1]:.1f}), F1 {f1[0]:.1f} (sampled anew {f1[1]:.1f}; worn in the data, after "
            f"the autoencoder, {f1[2]:.1f})"
        )
    return ";\n".join(parts) + "."
