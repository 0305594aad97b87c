"""Tables 1 to 4: rows of scores with intervals, paired differences, and sentences about them.

Pictures and scores are kept (`pictures`, `scores`), so a table that is made again reads them.
Sentences are made from the numbers, so they stay true whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ec2face_core.attributes import CLASS_ID, GROUPS, display_name
from ec2face_core.config import VARIANTS, Config
from ec2face_core.data import open_dataset

from ..baselines import PAPER
from ..plots.render_tables import METHODS
from .intervals import summarise, summarise_difference
from .painters import REAL, ROUND_TRIP
from .pictures import PictureSet, available, generate_missing
from .scores import evaluated_ids

if TYPE_CHECKING:
    from pandas import DataFrame


MAIN = ("Text", "OAA", "HFA", "NFA", "RFA", "LPIPS", "NIQE")


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


def scored(sets: Sequence[PictureSet]) -> DataFrame:
    """Scores over training seeds, one row for each face: means, and sums of pixel counts."""
    import pandas as pd

    generate_missing(sets)
    tables = [pictures.scores() for pictures in sets]
    if len(tables) == 1:
        return tables[0]
    groups = pd.concat(tables).groupby("id", sort=False)
    counted = [name for name in tables[0] if name.startswith(("support_", "correct_"))]
    merged = groups.mean().assign(**{name: groups[name].sum() for name in counted})
    return merged.reset_index()


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
        metrics: only these metrics and the classes; empty: all.
    """
    import pandas as pd

    sets = {method: picture_sets(config, method, split, seeds) for method in methods.values()}
    generate_missing(pictures for group in sets.values() for pictures in group)
    parts = []
    for name, method in methods.items():
        dataset = sets[method][0].dataset.root.name
        label = seed_label(config, seeds) if method in VARIANTS else ""
        parts.append(summarise(scored(sets[method]), table, name, dataset, config, label))
    rows = pd.concat(parts, ignore_index=True)
    if metrics:
        rows = rows[rows["metric"].isin([*metrics, *CLASS_ID])]
    return rows.reset_index(drop=True)


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
    sets = {method: picture_sets(config, method, split, seeds) for method in methods}
    generate_missing(pictures for group in sets.values() for pictures in group)
    scores = {method: scored(group) for method, group in sets.items()}
    label = seed_label(config, seeds)
    parts = []
    for name, (first, second) in pairs.items():
        dataset = sets[first][0].dataset.root.name
        parts.append(
            summarise_difference(scores[first], scores[second], table, name, dataset, config, label)
        )
    rows = pd.concat(parts, ignore_index=True)
    return rows[rows["metric"].isin(MAIN)].reset_index(drop=True)


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
    """What replaces the paper's data and perception models in this profile; "" at paper scale."""
    e = config.evaluation
    p = config.perception
    parts = []
    if config.data.procedural:
        parts.append("procedural faces instead of photographs")
    if p.clip.startswith("local-dir:"):
        parts.append("mini CLIP instead of ViT-L-14")
    if p.parser.startswith("data/mini/"):
        parts.append("mini parsers instead of FaRL")
    if e.lpips == "alex-random":
        parts.append("LPIPS with a randomly initialised AlexNet trunk")
    if e.niqe_refit:
        parts.append(f"NIQE refitted on the training faces, block {e.niqe_block}")
    return f"In this profile: {', '.join(parts)}." if parts else ""


def table_caption(config: Config, split: str, title: str) -> str:
    """The title, the faces that were measured, and the profile's substitutes."""
    dataset = open_dataset(config, split)
    n = len(evaluated_ids(config, dataset))
    return f"{title} {n} faces of {dataset.root.name}. {substitutes(config)}".strip()


# -------------------------------------------------------------------------------------- sentences


def describe_ceiling(rows: DataFrame, method: str, role: str = "independent") -> str:
    """How close a method comes to the real images, from the rows of a table."""
    values = rows[rows["critic"] == role].set_index(["method", "metric"])["value"]
    parts = []
    for metric in [name for name in ("OAA", *GROUPS) if (method, name) in values]:
        value = values[method, metric]
        top = values[REAL, metric]
        parts.append(f"{metric} {value:.1f} of {top:.1f} ({100 * value / top:.0f} %)")
    return f"{METHODS.get(method, method)} against real images, {role} parser: {'; '.join(parts)}."


def describe_differences(
    rows: DataFrame, metrics: Sequence[str] = ("Text", "OAA", "RFA"), role: str = "independent"
) -> str:
    """One line for each difference: higher, lower, or not significant."""
    lines = []
    for label in dict.fromkeys(rows["method"]):
        for metric in metrics:
            row = rows[(rows["method"] == label) & (rows["metric"] == metric)]
            row = row[row["critic"].isin([role, ""])].iloc[0]
            verdict = "not significant (the 95 % interval contains 0)"
            if row["ci_low"] > 0 or row["ci_high"] < 0:
                verdict = "higher" if row["value"] > 0 else "lower"
            interval = f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
            lines.append(f"{label}, {metric}: {row['value']:+.2f} {interval}: {verdict}")
    return "\n".join(lines)


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
