"""Generation from one condition alone (Fig. 7), and its diversity (Fig. 8)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ec2face_core.attributes import pixel_counts
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.metrics import mask_counts

from .faces import faces
from .intervals import bootstrap_accuracy, bootstrap_interval
from .pictures import sample_grid
from .scores import ROLES, evaluated_ids, perception_models
from .summary import kept_metrics

if TYPE_CHECKING:
    from pandas import DataFrame


def one_condition(config: Config, method: str, split: str, count: int = 64) -> DataFrame:
    """How well a method follows a condition that it gets alone (Eq. 13 trains for it).

    Returns:
        Long rows by role over the split's first `count` faces: `Text, text alone`, `OAA, mask
        alone` and `RFA, mask alone`, one picture for each face.
    """
    import pandas as pd

    dataset = open_dataset(config, split)
    texts, maps, _ = faces(dataset, evaluated_ids(config, dataset, count)[:count])
    from_text = sample_grid(config, method, f"{split}_text_alone", texts, seeds=1)[:, 0]
    from_mask = sample_grid(config, method, f"{split}_mask_alone", [""] * len(maps), maps, 1)[:, 0]
    text = score_pictures(config, from_text, texts, None)
    mask = score_pictures(config, from_mask, None, maps)
    mask = mask[mask["metric"].isin(["OAA", "RFA"])]
    parts = [
        text.assign(metric=text["metric"] + ", text alone"),
        mask.assign(metric=mask["metric"] + ", mask alone"),
    ]
    return pd.concat(parts, ignore_index=True).assign(dataset=dataset.root.name)


def score_pictures(
    config: Config, images: Tensor, texts: Sequence[str] | None, maps: Tensor | None
) -> DataFrame:
    """Long rows, by role, of pictures in memory: Text, and the metrics of masks.

    Args:
        config: names the perception models.
        images: `b 3 h w` in [-1, 1].
        texts: their captions; None: no text score.
        maps: their masks `b h w`; None: no accuracy.
    """
    import pandas as pd

    models = perception_models(config)
    images = images.to(models.device)
    bootstrap = (config.evaluation.bootstrap, config.seed)
    rows = []
    for role in ROLES:
        if texts is not None:
            scores = models.clips[role].score(images, texts).cpu()
            interval = bootstrap_interval(scores, *bootstrap)
            rows.append({"metric": "Text", "critic": role, **interval._asdict()})
        if maps is not None:
            parsed = models.parsers[role].parse(images).cpu()
            pixels = (*mask_counts(parsed, maps), pixel_counts(parsed))
            table = kept_metrics(bootstrap_accuracy(*pixels, *bootstrap).drop(columns="pixels"))
            rows += table.assign(critic=role).to_dict("records")
    return pd.DataFrame(rows).assign(source="ours")


def diversity(
    config: Config, modes: Mapping[str, tuple[Tensor, Tensor | None]], dataset: FaceDataset
) -> DataFrame:
    """How much the pictures of one condition differ, and whether they keep their mask.

    Args:
        config: names the perception models.
        modes: name -> (images `rows seeds 3 h w`, label maps `rows h w` or None without masks).
        dataset: its first faces give the scale, the LPIPS between different real faces.

    Returns:
        Rows mode, quantity, value, ci_low, ci_high, n. Quantities: pairwise LPIPS (mean over the
        pairs of a condition; interval over the n conditions) and, with masks, pixels that keep
        their class by the independent parser (percent; interval over the n pictures).
    """
    import pandas as pd

    models = perception_models(config)
    rows = []

    def add(mode: str, quantity: str, values: Tensor) -> None:
        interval = bootstrap_interval(values, config.evaluation.bootstrap, config.seed)
        rows.append({"mode": mode, "quantity": quantity, **interval._asdict()})

    def distances(images: Tensor) -> Tensor:
        pairs = np.array(list(itertools.combinations(range(len(images)), 2)))
        return models.lpips(images[pairs[:, 0]], images[pairs[:, 1]])

    for mode, (images, maps) in modes.items():
        add(mode, "pairwise LPIPS", torch.stack([distances(row).mean() for row in images]))
        if maps is not None:
            target = maps.repeat_interleave(images.shape[1], 0)
            parsed = models.parsers["independent"].parse(images.flatten(0, 1).to(models.device))
            kept = (parsed.cpu() == target).double().flatten(1).mean(1)
            add(mode, "pixels that keep their class (%)", 100 * kept)
    real = torch.stack([dataset.image(name) for name in dataset.ids[:16]])
    add("different real faces", "pairwise LPIPS", distances(real))
    return pd.DataFrame(rows)


def describe_diversity(table: DataFrame) -> str:
    """From the rows of `diversity`, relative to the distance between different real faces."""
    lpips = table[table["quantity"] == "pairwise LPIPS"].set_index("mode")["value"]
    scale = lpips["different real faces"]
    parts = [f"{mode} {100 * value / scale:.0f} %" for mode, value in lpips.items()][:-1]
    return f"LPIPS between seeds, relative to different real faces: {', '.join(parts)}."


def describe_one_condition(rows: DataFrame) -> str:
    """From `one_condition` and the joint scores under the names `Text, EC2Face`, `OAA, EC2Face`."""
    scores = rows[rows["critic"] == "independent"].set_index("metric")["value"]
    return (
        f"Text score {scores['Text, text alone']:.1f} from text alone, "
        f"{scores['Text, EC2Face']:.1f} from both; OAA {scores['OAA, mask alone']:.1f} from the "
        f"mask alone, {scores['OAA, EC2Face']:.1f} from both."
    )
