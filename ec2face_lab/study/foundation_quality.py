"""The quality of what everything rests on (notebook 00), and class weights (notebook 01).

Functions return numbers and pictures; drawing them is `plotting.py`'s and `grids.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, display_name
from ec2face_core.config import Config, resolve
from ec2face_core.data import open_dataset
from ec2face_core.metrics import psnr

from .intervals import bootstrap_interval
from .pictures import REAL, ROUND_TRIP, evaluated_ids, generate_split, load_pictures
from .scores import CRITICS, load_critics

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

    from ..world.pretrain_perception import retrieval

    dataset = open_dataset(config, split)
    ids, rows = dataset.ids[:candidates], []
    captions = [dataset.manifest_caption(name) for name in ids]
    for critic, clip in load_critics(config).clips.items():
        with torch.no_grad():
            seen = [clip.image_features(dataset.image(n)[None].to(clip.device)) for n in ids]
        found = retrieval(torch.cat(seen), clip.text_features(captions), captions)
        rows.append({"critic": critic, **found})
    return pd.DataFrame(rows)


def about_round_trip(quality: DataFrame) -> str:
    """From `inspection.round_trip_quality`."""
    row = quality.iloc[0]
    return (
        f"The autoencoder returns a test face with {row['value']:.1f} {row['metric']} "
        f"[{row['ci_low']:.1f}, {row['ci_high']:.1f}], n = {row['n']:.0f}."
    )


def about_parsers(rows: DataFrame) -> str:
    """From the rows of `real`: both parsers' accuracy, and the class that each reads worst."""
    parts = []
    for critic in CRITICS:
        own = rows[rows["critic"] == critic].set_index("metric")["value"].astype(float)
        classes = own[[name for name in CLASS_ID if name in own]]
        worst = display_name(CLASS_ID[classes.idxmin()])
        parts.append(f"{critic} {own['OAA']:.1f} (worst: {worst} {classes.min():.0f})")
    return f"OAA of the parsers on real test faces: {', '.join(parts)}."


def about_text_pictures(config: Config, images: Tensor, captions: Sequence[str]) -> str:
    """Do pictures fit their own caption better than the other rows'? Independent CLIP.

    images: `rows seeds 3 h w` in [-1, 1], a row for each caption.
    """
    clip = load_critics(config).clips[CRITICS[0]]
    with torch.no_grad():
        seen = clip.image_features(images.flatten(0, 1).to(clip.device))
    scores = 100 * (seen @ clip.text_features(list(captions)).T).cpu()
    own = torch.eye(len(captions), dtype=torch.bool).repeat_interleave(images.shape[1], 0)
    found = (scores.argmax(1) == own.float().argmax(1)).float().mean()
    others = scores[~own].mean() if len(captions) > 1 else float("nan")
    return (
        f"Text score with the own caption {scores[own].mean():.1f}, with the other rows' "
        f"{others:.1f}; {100 * found:.0f} % of the pictures fit their own best."
    )
