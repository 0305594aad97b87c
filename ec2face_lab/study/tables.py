"""Tables 1 to 4: rows of scores with intervals, paired differences, and sentences about them.

Pictures and scores are kept (`pictures`, `scores`), so a table that is made again reads them.
Sentences are made from the numbers, so they stay true whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, GROUPS, display_name
from ec2face_core.config import VARIANTS, Config
from ec2face_core.data import open_dataset
from ec2face_core.metrics import OVERLAP, RECALL
from ec2face_core.runs import content_key, whole_file

from ..baselines import PAPER
from ..cache import is_whole, record_hash
from ..plots.render_tables import METHODS
from .distribution import FEWEST, diversity, presence
from .loras import check_one_training
from .painters import REAL, ROUND_TRIP
from .pictures import PictureSet, available, generate_missing
from .scores import BATCH, FACT, ROLES, counts, evaluated_ids, models_digest, perception_models
from .summary import (
    DISTANCES,
    F1_OF,
    RARE,
    cell_of,
    distance_rows,
    per_face_row,
    summarise,
    summarise_difference,
)
from .verdicts import verdict_of

if TYPE_CHECKING:
    from pandas import DataFrame


# The metrics of a table of differences; RARE_CLASSES in recall beside their precision, F1 and IoU.
RARE_CLASSES = ("ear_r", "neck_l")
MAIN = (
    "Text", *RECALL, *OVERLAP, "LPIPS", "NIQE", "Facts", *DISTANCES, "Diversity",
    *RARE_CLASSES, *RARE,
)  # fmt: skip

BESIDE = ("mIoU", "Facts", *DISTANCES, "Diversity")  # stand in every table

ACCESSORIES = ("ear_r", "neck_l", "eye_g", "hat")  # of which presence is asked

# Parsed pixels from which a class is in a picture, as a share of the picture: 3 of 64 x 64.
PRESENT = 3 / 64**2


# ------------------------------------------------------------------------------------------- rows


def picture_sets(
    config: Config, method: str, split: str = "test", seeds: int = 1
) -> list[PictureSet]:
    """A method's pictures of a split, one set for each training seed.

    Args:
        config: the first seed's.
        method: one of `painters.METHODS`.
        split: of the faces.
        seeds: trainings of a variant, with `seed`, + 1, + 2 ..., each with one picture of each
            face. References and comparison systems have one set.
    """
    count = seeds if method in VARIANTS else 1
    return [PictureSet(with_seed(config, k), method, split) for k in range(count)]


def scored(sets: Sequence[PictureSet]) -> list[DataFrame]:
    """The scores of each training, one row for each face."""
    generate_missing(sets)
    return [pictures.scores() for pictures in sets]


def with_seed(config: Config, k: int) -> Config:
    """The same experiment with the k-th seed: of training, and of the pictures' noise."""
    return config.replace(seed=config.seed + k, sampling={"seed": config.sampling.seed + k})


def table_rows(
    config: Config,
    table: str,
    methods: Mapping[str, str],
    split: str = "test",
    seeds: int = 1,
    metrics: Sequence[str] = (),
) -> DataFrame:
    """Long rows of a table.

    Args:
        config: the first seed's.
        table: its name.
        methods: name in the table -> method, one of `painters.METHODS`.
        split: of the faces.
        seeds: trainings of each variant.
        metrics: only these metrics, their F1, and the classes; empty: all.

    Returns:
        Scores with their intervals (see `summary`), KID and CMMD to the real images of the same
        faces, and for several trainings Diversity: the mean LPIPS between the trainings' pictures
        of a face, which have other noise, too.
    """
    import pandas as pd

    check_one_training(config, methods.values(), seeds)
    sets = {method: picture_sets(config, method, split, seeds) for method in methods.values()}
    generate_missing(pictures for group in sets.values() for pictures in group)
    parts = []
    for name, method in methods.items():
        labels = {"table": table, "method": name, "dataset": sets[method][0].dataset.root.name}
        labels["seeds"] = seed_label(config, seeds) if method in VARIANTS else ""
        parts.append(summarise(scored(sets[method]), config=config, **labels))
        parts += set_rows(config, [sets[method]], labels)
    rows = pd.concat(parts, ignore_index=True)
    if metrics:
        beside = [F1_OF[metric] for metric in metrics if metric in F1_OF]
        kept = {*metrics, *beside, *BESIDE, *CLASS_ID}
        rows = rows[rows["metric"].isin(kept)]
    return rows.reset_index(drop=True)


def set_rows(
    config: Config, sides: Sequence[Sequence[PictureSet]], labels: Mapping[str, str]
) -> list[DataFrame]:
    """KID, CMMD and Diversity of one method, or of the first minus the second."""
    first = sides[0][0]
    rows = []
    # of the real images themselves it is 0 by definition
    if all(side[0].method != REAL for side in sides) and len(first.ids) >= FEWEST:
        reference = PictureSet(config, REAL, first.split, first.limit).features()
        features = [[pictures.features() for pictures in side] for side in sides]
        rows.append(distance_rows(features, reference, config, **labels))
    if all(len(side) > 1 for side in sides):
        values = [face_diversity(side) for side in sides]
        rows.append(per_face_row("Diversity", values, config, **labels))
    return rows


def face_diversity(sets: Sequence[PictureSet]) -> np.ndarray:
    """Mean LPIPS between the pictures of a face by several trainings, `(faces,)`; kept."""
    config = sets[0].config
    key = content_key([[pictures.folder.name for pictures in sets], models_digest(config)])
    cache = config.run_dir / "scores" / f"diversity-{sets[0].split}-{sets[0].method}-{key}.npy"
    if not is_whole(cache):
        lpips = perception_models(config).lpips
        ids = sets[0].ids
        parts = []
        for start in range(0, len(ids), BATCH):
            names = ids[start : start + BATCH]
            images = torch.stack([pictures.load(names) for pictures in sets], dim=1)
            parts.append(diversity(images, lpips).cpu())
        with whole_file(cache) as part, part.open("wb") as file:
            np.save(file, torch.cat(parts).double().numpy())
        record_hash(cache)
    return np.load(cache)


def presence_rows(
    config: Config, table: str, methods: Mapping[str, str], split: str = "test", seeds: int = 1
) -> DataFrame:
    """In how many pictures the accessories of the mask are found, and how often others are.

    Arguments as for `table_rows`; trainings are pooled.

    Returns:
        Long rows by role with the metrics `presence_<class>` and `false_presence_<class>` (percent)
        of `ACCESSORIES`; see `distribution.presence`. The intervals take pictures as independent.
    """
    import pandas as pd

    wanted = [f"{kind}_{name}" for name in ACCESSORIES for kind in ("presence", "false_presence")]
    minimum = max(1, round(PRESENT * config.data.size**2))
    parts = []
    for name, method in methods.items():
        sets = picture_sets(config, method, split, seeds)
        scores = pd.concat(scored(sets))
        labels = {"table": table, "method": name, "dataset": sets[0].dataset.root.name}
        labels["seeds"] = seed_label(config, seeds) if method in VARIANTS else ""
        for role in ROLES:
            _, support, predicted = counts(scores, role)
            rows = presence(support, predicted, minimum)
            rows = rows[rows["metric"].isin(wanted)]
            parts.append(rows.assign(critic=role, source="ours", **labels))
    return pd.concat(parts, ignore_index=True)


def difference_rows(
    config: Config,
    table: str,
    pairs: Mapping[str, tuple[str, str]],
    split: str = "test",
    seeds: int = 1,
) -> DataFrame:
    """Long rows of paired differences; pairs: label -> (method, method to subtract)."""
    import pandas as pd

    methods = dict.fromkeys(method for pair in pairs.values() for method in pair)
    check_one_training(config, methods, seeds)
    sets = {method: picture_sets(config, method, split, seeds) for method in methods}
    generate_missing(pictures for group in sets.values() for pictures in group)
    scores = {method: scored(group) for method, group in sets.items()}
    parts = []
    for name, (first, second) in pairs.items():
        labels = {"table": table, "method": name, "dataset": sets[first][0].dataset.root.name}
        labels["seeds"] = seed_label(config, seeds)
        parts.append(summarise_difference(scores[first], scores[second], config=config, **labels))
        parts += set_rows(config, [sets[first], sets[second]], labels)
    rows = pd.concat(parts, ignore_index=True)
    kept = rows["metric"].isin(MAIN) | rows["metric"].str.startswith(FACT)
    return rows[kept].reset_index(drop=True)


def seed_rows(
    config: Config, table: str, pairs: Mapping[str, tuple[str, str]], seeds: int
) -> DataFrame:
    """`difference_rows` of each seed alone; a row's method names the seed: `label, seed 43`."""
    import pandas as pd

    parts = []
    for k in range(seeds):
        seeded = with_seed(config, k)
        rows = difference_rows(seeded, table, pairs)
        parts.append(rows.assign(method=rows["method"] + f", seed {seeded.seed}"))
    return pd.concat(parts, ignore_index=True)


def seed_label(config: Config, seeds: int) -> str:
    """`42`, or `42-44` for three seeds."""
    first = config.sampling.seed
    return str(first) if seeds == 1 else f"{first}-{first + seeds - 1}"


def pictures_by_method(
    config: Config, ids: Sequence[str], split: str = "test", names: Sequence[str] = tuple(PAPER)
) -> dict[str, Tensor | None]:
    """Columns of Figs. 3 and 6: pictures of each system, or None without weights; and EC²Face's.

    Raises:
        ValueError: an id that is not among the evaluated faces.
    """
    known = set(evaluated_ids(config, open_dataset(config, split)))
    if unknown := [name for name in ids if name not in known]:
        raise ValueError(f"faces {unknown} are not among those evaluated: see evaluation.limit")
    present = [name for name in available(config, split) if name in names]
    pictures = {name: PictureSet(config, name, split).load(ids) for name in present}
    pictures["EC²Face"] = PictureSet(config, "both", split).load(ids)
    return dict.fromkeys(names) | pictures


# --------------------------------------------------------------------------------------- captions


def substitutes(config: Config) -> str:
    """What replaces the paper's perception models in this profile; "" at paper scale."""
    e = config.evaluation
    p = config.perception
    small = {}  # a bundle's, by their files' names
    if p.clip.endswith("clip_guiding"):
        small["CLIPs"] = "ViT-L/14"
    if p.parser.endswith("parser_guiding.pt"):
        small["parsers"] = "FaRL"
    parts = []
    if small:
        parts.append(f"small {' and '.join(small)} stand in for {' and '.join(small.values())}")
    if e.niqe_refit:
        parts.append(f"NIQE is refitted on the training faces (blocks of {e.niqe_block} px)")
    said = "; ".join(parts)
    sentences = [f"{said[0].upper()}{said[1:]}."] if said else []
    if e.lpips == "alex-random":
        sentences.append("LPIPS has a random trunk and is in the CSV alone.")
    return " ".join(sentences)


def table_caption(config: Config, split: str) -> str:
    """The faces that were measured, and the profile's substitutes, as sentences.

    What the table shows and what the intervals are over is said by `render_tables`.
    """
    dataset = open_dataset(config, split)
    n = len(evaluated_ids(config, dataset))
    kind = "procedural faces" if config.data.procedural else "faces"
    return f"Scores are of {n:,} {kind} ({dataset.root.name}). {substitutes(config)}".strip()


# -------------------------------------------------------------------------------------- sentences


def describe_ceiling(rows: DataFrame, method: str, role: str = "independent") -> str:
    """How close a method comes to the real images, from the rows of a table."""
    values = rows[rows["critic"] == role].set_index(["method", "metric"])["value"]
    parts = []
    for metric in [name for name in ("OAA", *GROUPS, "F1", "mIoU") if (method, name) in values]:
        value = values[method, metric]
        top = values[REAL, metric]
        parts.append(f"{metric} {value:.1f} of {top:.1f} ({100 * value / top:.0f} %)")
    return f"{METHODS.get(method, method)} against real images, {role} parser: {'; '.join(parts)}."


def describe_differences(
    rows: DataFrame, metrics: Sequence[str] = ("Text", "OAA", "RFA"), role: str = "independent"
) -> str:
    """One line for each difference: higher, lower, or not significant; attributes with their F1."""
    lines = []
    for label in dict.fromkeys(rows["method"]):
        for metric in metrics:
            parts = []
            for name in (metric, F1_OF.get(metric)):
                row = cell_of(rows, label, name, role) if name else None
                if row is not None:
                    interval = f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
                    parts.append(f"{name} {row['value']:+.2f} {interval}")
            verdict = verdict_of(rows, label, metric, role)
            if verdict == "not significant":
                verdict += " (the 95 % interval contains 0)"
            lines.append(f"{label}: {', '.join(parts)}: {verdict}")
    return "\n".join([*lines, describe_intervals(rows)])


def describe_intervals(rows: DataFrame) -> str:
    """What the intervals of the rows are over, in a sentence."""
    if rows.reindex(columns=["joint_low"]).notna().any(axis=None):
        return "Intervals are over faces and trainings."
    return "Intervals are over faces; the trainings are held fixed."


def describe_guide_gain(rows: DataFrame, metrics: Sequence[str] = ("OAA", "RFA", "Text")) -> str:
    """How much more the guides see of a gain than the evaluators, from paired differences."""
    parts = []
    for label in dict.fromkeys(rows["method"]):
        values = rows[rows["method"] == label].set_index(["critic", "metric"])["value"]
        gaps = [f"{m} {values['guiding', m] - values['independent', m]:+.2f}" for m in metrics]
        parts.append(f"{label}: {', '.join(gaps)}")
    return (
        "Gain measured by the guiding models minus gain measured by the independent ones: "
        f"{'; '.join(parts)}."
    )


def describe_classes(rows: DataFrame, method: str, ceiling: str = ROUND_TRIP) -> str:
    """The classes in which a method is furthest below a ceiling, by the independent parser."""
    scores = rows[(rows["critic"] == "independent") & rows["metric"].isin(CLASS_ID)]
    table = scores.pivot(index="metric", columns="method", values="value")
    gap = (table[ceiling] - table[method]).dropna()
    largest = [
        f"{display_name(CLASS_ID[name])} {value:.0f}" for name, value in gap.nlargest(3).items()
    ]
    return (
        f"Furthest below the {METHODS[ceiling]}: {', '.join(largest)} points; median class "
        f"{gap.median():.1f}."
    )
