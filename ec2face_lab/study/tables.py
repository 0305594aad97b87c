"""What the notebooks of the tables and picture grids call: one function an experiment.

Everything is kept (`generate.py`, `scoring.py`): an experiment whose pictures and scores are there
is read, not repeated. Sentences about results are made from the numbers, so they stay true
whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ec2face_core.attributes import CLASS_ID, GROUPS, display_name
from ec2face_core.config import VARIANTS, Config, ConfigError, adapter_dir
from ec2face_core.data import open_dataset

from ..baselines import PAPER, SYSTEMS
from ..launch import run
from ..plots.render_tables import METHODS
from .intervals import summarise, summarise_difference
from .pictures import (
    REAL,
    available,
    draw_split,
    evaluated_ids,
    generate_split,
    load_pictures,
    missing_pictures,
    missing_system_pictures,
    official_pictures,
)
from .scores import score_folder

if TYPE_CHECKING:
    from pandas import DataFrame


MAIN = ("Text", "OAA", "HFA", "NFA", "RFA", "LPIPS", "NIQE")


# --------------------------------------------------------------------------------------- tables


def scored(config: Config, variant: str, split: str = "test", seeds: int = 1) -> DataFrame:
    """Scores of a variant's (or a reference's) pictures, one row a face.

    Args:
        seeds: trainings of the variant, with `seed`, + 1, + 2 ..., each with one picture of each
            face; scores are their mean, pixel counts their sum. References have one.
    """
    import pandas as pd

    dataset, tables = open_dataset(config, split), []
    for k in range(seeds if variant in VARIANTS else 1):
        seeded = with_seed(config, k)
        folder = _pictures(seeded, variant, split)
        tables.append(score_folder(folder, dataset, seeded))
    if len(tables) == 1:
        return tables[0]
    groups = pd.concat(tables).groupby("id", sort=False)
    counted = [name for name in tables[0] if name.startswith(("support_", "correct_"))]
    merged = groups.mean().assign(**{name: groups[name].sum() for name in counted})
    return merged.reset_index()


def with_seed(config: Config, k: int) -> Config:
    """The same experiment with the k-th seed: of training, and of the pictures' noise."""
    return config.replace(seed=config.seed + k, sampling={"seed": config.sampling.seed + k})


def draw_missing(config: Config, variants: Sequence[str], split: str) -> None:
    """Draw what is missing of a split's pictures by as many processes as configured, if several.

    Raises:
        ConfigError: a variant has no adapter.
    """
    wanted = []
    for variant in variants:
        if variant in SYSTEMS:
            official = official_pictures(config, variant, split).is_dir()
            if not official and missing_system_pictures(config, variant, split):
                wanted.append(variant)
        elif variant in VARIANTS:
            if not (folder := adapter_dir(config, variant)).is_dir():
                count = config.seed - Config.seed + 1
                raise ConfigError(
                    f"no adapter in {folder}: `make reproduce PROFILE={config.profile} TRAIN=1 "
                    f"SEEDS={max(1, count)}` trains it"
                )
            if missing_pictures(config, variant, split):
                wanted.append(variant)
    if wanted and config.sampling.num_processes > 1:  # all at once: a start takes long
        settings = config.run_dir / "images" / f"{split}-{config.seed}.yaml"
        config.save(settings)
        run(
            "ec2face_lab", "generate", "--config", str(settings), "--method", *wanted,
            "--split", split, num_processes=config.sampling.num_processes,
        )  # fmt: skip


def _pictures(config: Config, variant: str, split: str) -> Path:
    """Folder of a split's pictures, drawn where they are missing.

    Of a comparison system its official code's pictures, where they were scored.
    """
    if variant in SYSTEMS and (official := official_pictures(config, variant, split)).is_dir():
        return official.resolve()
    draw_missing(config, [variant], split)
    return (draw_split if variant in SYSTEMS else generate_split)(config, variant, split)


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
        methods: name in the table -> variant or reference.
        metrics: of these metrics and the classes only; empty: all.
    """
    import pandas as pd

    name, parts, variants = open_dataset(config, split).root.name, [], list(methods.values())
    for k in range(seeds):
        own = [v for v in variants if k == 0 or v in VARIANTS]  # others have one picture of a face
        draw_missing(with_seed(config, k), own, split)
    for method, variant in methods.items():
        per_image = scored(config, variant, split, seeds)
        used = seed_label(config, seeds) if variant in VARIANTS else ""
        parts.append(summarise(per_image, table, method, name, config, used))
    rows = pd.concat(parts, ignore_index=True)
    wanted = rows["metric"].isin([*metrics, *CLASS_ID]) if metrics else slice(None)
    return rows[wanted].reset_index(drop=True)


def difference_rows(
    config: Config,
    table: str,
    pairs: Mapping[str, tuple[str, str]],
    split: str = "test",
    seeds: int = 1,
) -> DataFrame:
    """Long rows of paired differences; pairs: label -> (variant, variant to subtract)."""
    import pandas as pd

    name, used, parts = open_dataset(config, split).root.name, seed_label(config, seeds), []
    for label, variants in pairs.items():
        first, second = (scored(config, variant, split, seeds) for variant in variants)
        parts.append(summarise_difference(first, second, table, label, name, config, used))
    rows = pd.concat(parts, ignore_index=True)
    return rows[rows["metric"].isin(MAIN)].reset_index(drop=True)


def seed_rows(
    config: Config, table: str, pairs: Mapping[str, tuple[str, str]], seeds: int
) -> DataFrame:
    """`difference_rows` of each seed by itself; a row's method says which: `label, seed 43`."""
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


def substitutes(config: Config) -> str:
    """What stands in for the paper's data and critics in this profile; "" at paper scale."""
    e, p, found = config.evaluation, config.perception, []
    if config.data.procedural:
        found.append("procedural faces instead of photographs")
    if p.clip.startswith("local-dir:"):
        found.append("mini CLIP instead of ViT-L-14")
    if p.parser.startswith("data/mini/"):
        found.append("mini parsers instead of FaRL")
    if e.lpips == "alex-random":
        found.append("LPIPS with a randomly initialised AlexNet trunk")
    if e.niqe_refit:
        found.append(f"NIQE refitted on the training faces, block {e.niqe_block}")
    return f"In this profile: {', '.join(found)}." if found else ""


def table_caption(config: Config, split: str, what: str) -> str:
    """`what`, the faces it was measured on, and the profile's substitutes."""
    dataset = open_dataset(config, split)
    n = len(evaluated_ids(config, dataset))
    return f"{what} {n} faces of {dataset.root.name}. {substitutes(config)}".strip()


def describe_ceiling(rows: DataFrame, method: str, critic: str = "independent") -> str:
    """How close a method comes to the real images, from the rows of a table."""
    rows = rows[rows["critic"] == critic].set_index(["method", "metric"])["value"]
    parts = []
    for metric in [name for name in ("OAA", *GROUPS) if (method, name) in rows]:
        value, top = rows[method, metric], rows[REAL, metric]
        parts.append(f"{metric} {value:.1f} of {top:.1f} ({100 * value / top:.0f} %)")
    return (
        f"{METHODS.get(method, method)} against real images, {critic} parser: {'; '.join(parts)}."
    )


def describe_differences(
    rows: DataFrame, metrics: Sequence[str] = ("Text", "OAA", "RFA"), critic: str = "independent"
) -> str:
    """A line a difference: what the intervals allow to say, and nothing more."""
    lines = []
    for label in dict.fromkeys(rows["method"]):
        for metric in metrics:
            row = rows[(rows["method"] == label) & (rows["metric"] == metric)]
            row = row[row["critic"].isin([critic, ""])].iloc[0]
            verdict = "no difference that these faces would show"
            if row["ci_low"] > 0 or row["ci_high"] < 0:
                verdict = "higher" if row["value"] > 0 else "lower"
            span = f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
            lines.append(f"{label}, {metric}: {row['value']:+.2f} {span}: {verdict}")
    return "\n".join(lines)


def describe_critics(rows: DataFrame, metrics: Sequence[str] = ("OAA", "RFA", "Text")) -> str:
    """Does guidance please its own critics more than others? From rows of paired differences."""
    parts = []
    for label in dict.fromkeys(rows["method"]):
        of = rows[rows["method"] == label].set_index(["critic", "metric"])["value"]
        gaps = [f"{m} {of['guiding', m] - of['independent', m]:+.2f}" for m in metrics]
        parts.append(f"{label}: {', '.join(gaps)}")
    return (
        f"Gain by the guiding critics above the gain by the independent ones: {'; '.join(parts)}."
    )


def describe_classes(rows: DataFrame, method: str, ceiling: str = "vae_round_trip") -> str:
    """The classes in which a method is furthest below a ceiling, independent critic."""
    own = rows[(rows["critic"] == "independent") & rows["metric"].isin(CLASS_ID)]
    table = own.pivot(index="metric", columns="method", values="value")
    gap = (table[ceiling] - table[method]).dropna().nlargest(3)
    worst = ", ".join(f"{display_name(CLASS_ID[name])} {value:.0f}" for name, value in gap.items())
    middle = (table[ceiling] - table[method]).median()
    return f"Furthest below the {METHODS[ceiling]}: {worst} points; median class {middle:.1f}."


def systems(
    config: Config, ids: Sequence[str], split: str = "test", names: Sequence[str] = tuple(PAPER)
) -> dict[str, Tensor | None]:
    """Columns of Figs. 3 and 6: nothing for the systems without pictures here, and EC²Face."""
    dataset = open_dataset(config, split)
    known = set(evaluated_ids(config, dataset))
    if unknown := [name for name in ids if name not in known]:
        raise ValueError(f"faces {unknown} are not among those evaluated: see evaluation.limit")
    here = [name for name in available(config, split) if name in names]
    pictures = {name: load_pictures(_pictures(config, name, split), ids) for name in here}
    pictures["EC²Face"] = load_pictures(_pictures(config, "both", split), ids)
    return dict.fromkeys(names) | pictures
