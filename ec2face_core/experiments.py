"""What the notebooks of the tables and picture grids call: one function an experiment.

Everything is kept (`generate.py`, `scoring.py`): an experiment whose pictures and scores are there
is read, not repeated. Sentences about results are made from the numbers, so they stay true
whatever the numbers are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .attributes import CLASS_ID, GROUPS, display_name, pixel_counts
from .baselines import PAPER, SYSTEMS
from .baselines.draw import (
    available,
    draw_split,
    missing_system_pictures,
    official_pictures,
)
from .config import VARIANTS, Config, ConfigError, adapter_dir
from .datasets import FaceDataset, open_dataset
from .evaluate import summarise, summarise_difference
from .generate import (
    REAL,
    evaluated_ids,
    generate_split,
    load_pictures,
    missing_pictures,
    sample_grid,
)
from .launch import run
from .metrics import mask_counts
from .scoring import CRITICS, load_critics, score_folder
from .statistics import bootstrap_accuracy, bootstrap_interval
from .tables import METHODS

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
            "ec2face_core.evaluate", "--config", str(settings), "--variant", *wanted,
            "--split", split, "--sample-only", num_processes=config.sampling.num_processes,
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


def one_condition(config: Config, variant: str, split: str, count: int = 64) -> DataFrame:
    """How well a variant follows one condition when it gets only that one (Eq. 13).

    Returns:
        Long rows by critic over the split's first `count` faces: `Text, text alone`, `OAA, mask
        alone` and `RFA, mask alone`, one picture a face.
    """
    import pandas as pd

    dataset = open_dataset(config, split)
    texts, maps, _ = faces(dataset, evaluated_ids(config, dataset, count)[:count])
    from_text = sample_grid(config, variant, f"{split}_text_alone", texts, seeds=1)[:, 0]
    from_mask = sample_grid(config, variant, f"{split}_mask_alone", [""] * len(maps), maps, 1)[:, 0]
    text, mask = (
        score_pictures(config, from_text, texts, None),
        score_pictures(config, from_mask, None, maps),
    )
    mask = mask[mask["metric"].isin(["OAA", "RFA"])]
    parts = [
        text.assign(metric=text["metric"] + ", text alone"),
        mask.assign(metric=mask["metric"] + ", mask alone"),
    ]
    return pd.concat(parts, ignore_index=True).assign(dataset=dataset.root.name)


def score_pictures(
    config: Config, images: Tensor, texts: Sequence[str] | None, maps: Tensor | None
) -> DataFrame:
    """Long rows, by critic, of pictures that lie in memory: Text, and mask accuracies by class.

    Args:
        images: `b 3 h w` in [-1, 1].
        texts: their captions; None: no text score.
        maps: their masks `b h w`; None: no accuracy.
    """
    import pandas as pd

    critics, rows = load_critics(config), []
    images, how = images.to(critics.device), (config.evaluation.bootstrap, config.seed)
    for critic in CRITICS:
        if texts is not None:
            interval = bootstrap_interval(critics.clips[critic].score(images, texts).cpu(), *how)
            rows.append({"metric": "Text", "critic": critic, **interval._asdict()})
        if maps is not None:
            counted = mask_counts(critics.parsers[critic].parse(images).cpu(), maps)
            found = bootstrap_accuracy(*counted, *how).drop(columns="pixels")
            rows += found.assign(critic=critic).to_dict("records")
    return pd.DataFrame(rows).assign(source="ours")


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


# ---------------------------------------------------------------------------------------- grids


def pick_faces(
    dataset: FaceDataset, classes: Sequence[str], skip: Sequence[str] = (), limit: int = 0
) -> list[str]:
    """One face for each class named, chosen by the masks alone, before any picture is drawn.

    The first in manifest order that is not taken yet and shows at least the class's median area;
    any face where no face has the class.
    """
    ids = dataset.ids[: limit or None]
    areas = torch.stack([pixel_counts(dataset.label_map(name)[None])[0] for name in ids])
    chosen: list[str] = []
    for wanted in classes:
        area = areas[:, CLASS_ID[wanted]]
        enough = area[area > 0].median() if (area > 0).any() else 0
        fitting = [n for n, a in zip(ids, area, strict=True) if a >= enough]
        free = [n for n in [*fitting, *ids] if n not in chosen and n not in skip]
        chosen.append(free[0] if free else ids[len(chosen) % len(ids)])
    return chosen


def faces(dataset: FaceDataset, ids: Sequence[str]) -> tuple[list[str], Tensor, Tensor]:
    """(manifest captions, label maps `b h w`, real images `b 3 h w`) of some faces."""
    maps = torch.stack([dataset.label_map(name) for name in ids])
    images = torch.stack([dataset.image(name) for name in ids])
    return [dataset.manifest_caption(name) for name in ids], maps, images


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


def diversity(
    config: Config, modes: Mapping[str, tuple[Tensor, Tensor | None]], dataset: FaceDataset
) -> DataFrame:
    """How much pictures of one condition differ, and whether they keep their mask.

    Args:
        modes: name -> (images `rows seeds 3 h w`, label maps `rows h w` or None without masks).
        dataset: its first faces give the scale, the LPIPS between different real faces.

    Returns:
        Rows mode, quantity, value, ci_low, ci_high, n. Quantities: pairwise LPIPS (mean over the
        pairs of a condition; interval over the n conditions) and, with masks, pixels that keep
        their class by the independent parser (percent; interval over the n pictures).
    """
    import pandas as pd

    critics, how, rows = load_critics(config), (config.evaluation.bootstrap, config.seed), []

    def add(mode: str, quantity: str, values: Tensor) -> None:
        interval = bootstrap_interval(values, *how)
        rows.append({"mode": mode, "quantity": quantity, **interval._asdict()})

    def distances(images: Tensor) -> Tensor:
        pairs = np.array(list(itertools.combinations(range(len(images)), 2)))
        return critics.lpips(images[pairs[:, 0]], images[pairs[:, 1]])

    for mode, (images, maps) in modes.items():
        add(mode, "pairwise LPIPS", torch.stack([distances(row).mean() for row in images]))
        if maps is not None:
            target = maps.repeat_interleave(images.shape[1], 0)
            parsed = critics.parsers[CRITICS[0]].parse(images.flatten(0, 1).to(critics.device))
            kept = (parsed.cpu() == target).double().flatten(1).mean(1)
            add(mode, "pixels that keep their class (%)", 100 * kept)
    real = torch.stack([dataset.image(name) for name in dataset.ids[:16]])
    add("different real faces", "pairwise LPIPS", distances(real))
    return pd.DataFrame(rows)


def describe_diversity(table: DataFrame) -> str:
    """What the rows of `diversity` say, with the distance of different real faces as the scale."""
    lpips = table[table["quantity"] == "pairwise LPIPS"].set_index("mode")["value"]
    scale = lpips["different real faces"]
    parts = [f"{mode} {100 * value / scale:.0f} %" for mode, value in lpips.items()][:-1]
    return f"Distance between seeds, of that between different real faces: {', '.join(parts)}."
