"""Quality of the foundation: the autoencoder, the parsers, the CLIPs and the base model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, display_name
from ec2face_core.config import Config
from ec2face_core.data import open_dataset
from ec2face_core.io.paths import resolve
from ec2face_core.metrics import psnr

from .intervals import bootstrap_interval
from .painters import REAL, ROUND_TRIP
from .pictures import PictureSet
from .scores import ROLES, perception_models

if TYPE_CHECKING:
    from pandas import DataFrame


CHUNK = 64  # pictures in memory at once


def bundle_provenance(folder: str = "data/mini") -> DataFrame:
    """The parts of a bundle: part, MB, and the training's samples, steps, minutes and commit.

    A comparison system is trained in stages, whose steps and minutes are added up.
    """
    import pandas as pd

    root = resolve(folder)
    rows = []
    for path in sorted(root.rglob("*.json")):
        try:
            record = json.loads(path.read_text())
        except ValueError:
            continue
        if not isinstance(record, dict) or "seconds" not in record or "commit" not in record:
            continue  # a model's own configuration
        part = path.parent if path.stem == "provenance" else path.with_suffix(".pt")
        if not part.exists():
            continue  # of a table
        files = part.rglob("*") if part.is_dir() else [part]
        size = sum(f.stat().st_size for f in files if f.is_file())
        parameters = record["parameters"]
        stages = parameters.get("stages", {}).values()
        samples = parameters.get("samples", parameters.get("faces_seen"))
        steps = parameters.get("steps", sum(stage["step"] for stage in stages)) or None
        seconds = record["seconds"] or sum(stage["seconds"] for stage in stages)
        commit = (record["commit"] or "–")[:7]
        name = part.relative_to(root).as_posix()
        rows.append((name, round(size / 2**20, 2), samples, steps, round(seconds / 60, 1), commit))
    columns = ["part", "MB", "samples", "steps", "minutes", "commit"]
    return pd.DataFrame(rows, columns=columns).convert_dtypes()


def round_trip_quality(
    config: Config, split: str = "test", shown: int = 8
) -> tuple[DataFrame, ...]:
    """The autoencoder's round trip of held-out faces.

    Returns:
        One row metric, value, ci_low, ci_high, n (PSNR in dB); the first real images and their
        round trips, each `shown 3 h w`.
    """
    import pandas as pd

    real = PictureSet(config, REAL, split)
    copies = PictureSet(config, ROUND_TRIP, split)
    ids = real.ids
    parts = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]
    values = [psnr(copies.load(part), real.load(part)) for part in parts]
    interval = bootstrap_interval(torch.cat(values), config.evaluation.bootstrap, config.seed)
    table = pd.DataFrame([{"metric": "PSNR (dB)", **interval._asdict()}])
    return table, real.load(ids[:shown]), copies.load(ids[:shown])


def clip_retrieval(config: Config, split: str = "test", candidates: int = 256) -> DataFrame:
    """How often each CLIP finds a real face's own caption among those of other faces.

    Returns:
        A row for each role in the column `critic`, and the columns of
        `world.retrieval.retrieval` in percent.
    """
    import pandas as pd

    from ..world.retrieval import retrieval

    dataset = open_dataset(config, split)
    ids = dataset.ids[:candidates]
    captions = [dataset.manifest_caption(name) for name in ids]
    rows = []
    for role, clip in perception_models(config).clips.items():
        with torch.no_grad():
            features = [clip.image_features(dataset.image(n)[None].to(clip.device)) for n in ids]
        shares = retrieval(torch.cat(features), clip.text_features(captions), captions)
        rows.append({"critic": role, **shares})
    return pd.DataFrame(rows)


def describe_round_trip(quality: DataFrame) -> str:
    """From the table of `round_trip_quality`."""
    row = quality.iloc[0]
    return (
        f"The autoencoder returns a test face with {row['value']:.1f} {row['metric']} "
        f"[{row['ci_low']:.1f}, {row['ci_high']:.1f}], n = {row['n']:.0f}."
    )


def describe_parsers(rows: DataFrame) -> str:
    """From the rows of `real`: both parsers' accuracy, and the class that is parsed worst."""
    parts = []
    for role in ROLES:
        values = rows[rows["critic"] == role].set_index("metric")["value"].astype(float)
        classes = values[[name for name in CLASS_ID if name in values]]
        worst = display_name(CLASS_ID[classes.idxmin()])
        parts.append(f"{role} {values['OAA']:.1f} (worst: {worst} {classes.min():.0f})")
    return f"OAA of the parsers on real test faces: {', '.join(parts)}."


def describe_text_pictures(config: Config, images: Tensor, captions: Sequence[str]) -> str:
    """Whether pictures match their own caption better than others, by the independent CLIP.

    Args:
        config: names the CLIP.
        images: `rows seeds 3 h w` in [-1, 1].
        captions: one for each row.
    """
    clip = perception_models(config).clips["independent"]
    with torch.no_grad():
        features = clip.image_features(images.flatten(0, 1).to(clip.device))
    scores = 100 * (features @ clip.text_features(list(captions)).T).cpu()
    own = torch.eye(len(captions), dtype=torch.bool).repeat_interleave(images.shape[1], 0)
    matched = (scores.argmax(1) == own.float().argmax(1)).float().mean()
    others = scores[~own].mean() if len(captions) > 1 else float("nan")
    return (
        f"Text score with the own caption {scores[own].mean():.1f}, with the other rows' "
        f"{others:.1f}; {100 * matched:.0f} % of the pictures match their own best."
    )
