"""Scores of pictures as long rows of a table: values, intervals, paired differences, families.

A method has one table of scores for each of its trainings. `ci_low` and `ci_high` bound the 95 %
interval over faces, which holds the trainings fixed. Where a method has several trainings,
`joint_low` and `joint_high` bound the interval over faces and trainings, and `t_low` and `t_high`
that over trainings alone. Recall rises with the painted area, so a claim about attributes needs its
F1, too (`F1_OF`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ec2face_core.attributes import CLASSES, GROUPS
from ec2face_core.config import Config
from ec2face_core.metrics import OVERLAP, RECALL, ratio

from ..plots.save import COLUMNS
from .distribution import paired_draws
from .intervals import (
    Interval,
    bootstrap_accuracy,
    bootstrap_interval,
    holm,
    interval_p_values,
    paired_accuracy_difference,
    ratio_interval,
    t_interval,
    two_level_accuracy,
    two_level_interval,
)
from .scores import FACT, ROLES, counts, is_count

if TYPE_CHECKING:
    from pandas import DataFrame, Series

F1_OF = {"OAA": "F1", "HFA": "F1_HFA", "NFA": "F1_NFA", "RFA": "F1_RFA"}

DISTANCES = ("KID", "CMMD")

# What the table of precision, F1 and IoU keeps of single classes.
RARE = tuple(f"{kind}_{CLASSES[i]}" for i in GROUPS["RFA"] for kind in ("precision", "f1", "iou"))

FAMILY = ("Text", "OAA", "HFA", "RFA")  # what a table of differences claims of each pair

BOUNDS = ("joint_low", "joint_high", "t_low", "t_high")


# ------------------------------------------------------------------------------------------- rows


def summarise(
    trainings: Sequence[DataFrame],
    table: str,
    method: str,
    dataset: str,
    config: Config,
    seeds: str = "",
) -> DataFrame:
    """Long rows of a table, one row for each cell.

    Args:
        trainings: rows of `score_folder`, one frame for each training, of the same faces.
        table: written into every row, like `method`, `dataset` and `seeds`.
        method: name in the table.
        dataset: name of the data root.
        config: number of resamples and seed of the bootstrap.
        seeds: that were trained and sampled.
    """
    pooled = merged(trainings)
    bootstrap = (config.evaluation.bootstrap, config.seed)
    accuracy = {r: bootstrap_accuracy(*counts(pooled, r), *bootstrap) for r in ROLES}
    return _rows(
        pooled, [trainings], accuracy, bootstrap,
        table=table, method=method, dataset=dataset, seeds=seeds,
    )  # fmt: skip


def summarise_difference(
    first: Sequence[DataFrame],
    second: Sequence[DataFrame],
    table: str,
    method: str,
    dataset: str,
    config: Config,
    seeds: str = "",
) -> DataFrame:
    """Long rows of first - second on the same faces.

    Training i of one side is paired with training i of the other. A side of one training is held
    fixed. Arguments as for `summarise`.

    Raises:
        ValueError: the pictures are not of the same faces, in the same order; or both sides have
            several trainings, but not equally many.
    """
    sides = [merged(first), merged(second)]
    if list(sides[0]["id"]) != list(sides[1]["id"]):
        raise ValueError("a paired difference needs the same faces in the same order")
    bootstrap = (config.evaluation.bootstrap, config.seed)
    # shares of pixels are compared, so a side of one training counts as often as the other's
    repeats = [max(len(first), len(second)) // len(side) for side in (first, second)]
    accuracy = {}
    for role in ROLES:
        a, b = (
            tuple(n * x for x in counts(side, role)) for side, n in zip(sides, repeats, strict=True)
        )
        accuracy[role] = paired_accuracy_difference(a, b, *bootstrap)
    scores = [name for name in sides[0] if name != "id" and not is_count(name)]
    difference = sides[0][["id"]].assign(**{k: sides[0][k] - sides[1][k] for k in scores})
    return _rows(
        difference, [first, second], accuracy, bootstrap,
        table=table, method=method, dataset=dataset, seeds=seeds,
    )  # fmt: skip


def merged(trainings: Sequence[DataFrame]) -> DataFrame:
    """Scores over trainings, one row for each face: means of scores, and sums of pixel counts."""
    import pandas as pd

    if len(trainings) == 1:
        return trainings[0]
    groups = pd.concat(trainings).groupby("id", sort=False)
    summed = [name for name in trainings[0] if is_count(name)]
    means = groups.mean().assign(**{name: groups[name].sum() for name in summed})
    return means.reset_index()


def kept_metrics(rows: DataFrame) -> DataFrame:
    """Without precision, F1 and IoU of single classes, except those of the rare ones."""
    names = {*RECALL, *CLASSES, *OVERLAP, *RARE}
    return rows[rows["metric"].isin(names)].reset_index(drop=True)


def _rows(
    scores: DataFrame,
    sides: Sequence[Sequence[DataFrame]],
    accuracy: Mapping[str, DataFrame],
    bootstrap: tuple[int, int],
    **labels: str,
) -> DataFrame:
    """Rows in the order Text, masks, LPIPS, NIQE, Facts; see `summarise_difference`."""
    import pandas as pd

    def of(column: str, metric: str, critic: str) -> dict:
        interval = bootstrap_interval(scores[column], *bootstrap)
        values = _by_training(sides, lambda table: table[column].to_numpy())
        return {
            "metric": metric, "critic": critic, **interval._asdict(),
            **_over_trainings(values, bootstrap),
        }  # fmt: skip

    rows = [of(f"text_{role}", "Text", role) for role in ROLES]
    for role in ROLES:
        table = kept_metrics(accuracy[role].drop(columns="pixels"))
        if max(map(len, sides)) > 1:
            stacks = [_stacked(side, role, max(map(len, sides))) for side in sides]
            joint = two_level_accuracy(*stacks, resamples=bootstrap[0], seed=bootstrap[1])
            joint = joint.rename(columns={"ci_low": "joint_low", "ci_high": "joint_high"})
            table = table.merge(joint[["metric", *BOUNDS]], on="metric", how="left")
        rows += table.assign(critic=role).to_dict("records")
    rows += [of(metric.lower(), metric, "") for metric in ("LPIPS", "NIQE")]
    rows += _fact_rows(sides, bootstrap)
    table = pd.DataFrame(rows).assign(source="ours", **labels)
    return table.reindex(columns=list(COLUMNS))


def _by_training(
    sides: Sequence[Sequence[DataFrame]], column: Callable[[DataFrame], np.ndarray]
) -> np.ndarray:
    """Values of one column, or their differences: `(trainings, faces)`."""
    arrays = [np.stack([column(table) for table in side]) for side in sides]
    return arrays[0] if len(arrays) == 1 else arrays[0] - arrays[1]  # one training: broadcast


def _over_trainings(values: np.ndarray, bootstrap: tuple[int, int]) -> dict[str, float]:
    """The bounds that several trainings allow, of values `(trainings, faces)`."""
    if len(values) == 1:
        return {}
    joint = two_level_interval(values, *bootstrap)
    known = np.isfinite(values)
    alone = t_interval(ratio(np.where(known, values, 0).sum(1), known.sum(1)))
    return dict(
        zip(BOUNDS, (joint.ci_low, joint.ci_high, alone.ci_low, alone.ci_high), strict=True)
    )


def _stacked(side: Sequence[DataFrame], role: str, trainings: int) -> list[np.ndarray]:
    """Correct, support and predicted pixels `(trainings, faces, 19)`."""
    stacks = [np.stack(part) for part in zip(*(counts(t, role) for t in side), strict=True)]
    return [np.broadcast_to(x, (trainings, *x.shape[1:])) for x in stacks]


# ------------------------------------------------------------------------------------------ facts


def _fact_rows(sides: Sequence[Sequence[DataFrame]], bootstrap: tuple[int, int]) -> list[dict]:
    """`Facts`, the share of the captions' facts that are found, and `fact_<name>` one by one."""
    names = [name for name in sides[0][0] if name.startswith(FACT)]
    rows = []
    for metric, columns in {"Facts": names, **{name: [name] for name in names}}.items():
        if not columns:
            continue
        tables = [np.stack([table[columns].to_numpy() for table in side]) for side in sides]
        if len(tables) == 2:
            tables = list(np.broadcast_arrays(*tables))
        interval, by_training, joint = _pooled_shares(tables, bootstrap)
        row = {"metric": metric, "critic": "independent", **interval._asdict()}
        if len(by_training) > 1:
            alone = t_interval(by_training)
            row |= {"joint_low": joint.ci_low, "joint_high": joint.ci_high}
            row |= {"t_low": alone.ci_low, "t_high": alone.ci_high}
        rows.append(row)
    return rows


def _pooled_shares(
    tables: Sequence[np.ndarray], bootstrap: tuple[int, int]
) -> tuple[Interval, np.ndarray, Interval]:
    """Means over the known of each `(trainings, faces, facts)`, or their difference.

    Returns:
        The interval over faces, the value of each training, the interval over faces and trainings.
    """
    known = [np.isfinite(x).sum(2).astype(float) for x in tables]
    found = [np.nansum(x, axis=2) for x in tables]
    parts = list(zip(found, known, strict=True))

    def interval(stack: Callable[[np.ndarray], np.ndarray]) -> Interval:
        return ratio_interval(
            [(stack(a), stack(b)) for a, b in parts], *bootstrap, n=int(known[0].any(0).sum())
        )

    each = [ratio(a.sum(1), b.sum(1)) for a, b in parts]
    by_training = each[0] if len(each) == 1 else each[0] - each[1]
    return interval(lambda x: x.sum(0)[None]), by_training, interval(np.asarray)


# -------------------------------------------------------------------------- distances of two sets


def distance_rows(
    sides: Sequence[Sequence[Mapping[str, np.ndarray]]],
    references: Mapping[str, np.ndarray],
    config: Config,
    **labels: str,
) -> DataFrame:
    """KID and CMMD to the real images of the same faces, by the CLIPs' features, in thousandths.

    Args:
        sides: of one method, or of two for first - second, the features of each training:
            role -> `(n, d)`. A side of one training is held fixed.
        references: features of the real images: role -> `(n, d)`.
        config: number of resamples and seed of the bootstrap.
        labels: written into every row.

    Returns:
        Long rows; intervals over faces are made of random halves (`distribution.kid`), and those
        over faces and trainings resample the trainings of each half.
    """
    import pandas as pd

    bootstrap = (config.evaluation.bootstrap, config.seed)
    rows = []
    for metric in DISTANCES:
        for role in ROLES:
            real = references[role]
            arrays = [
                np.stack([paired_draws(metric, table[role], real, *bootstrap) for table in side])
                for side in sides
            ]
            draws = arrays[0] if len(arrays) == 1 else arrays[0] - arrays[1]
            low, high = np.percentile(draws[:, 1:].mean(0), [2.5, 97.5])
            row = {"metric": metric, "critic": role, "value": float(draws[:, 0].mean())}
            row |= {"ci_low": float(low), "ci_high": float(high), "n": len(real)}
            if len(draws) > 1:
                rng = np.random.default_rng(config.seed)
                drawn = rng.integers(len(draws), size=(len(draws), draws.shape[1] - 1))
                joint = np.take_along_axis(draws[:, 1:], drawn, 0).mean(0)
                low, high = np.percentile(joint, [2.5, 97.5])
                alone = t_interval(draws[:, 0])
                row |= {"joint_low": float(low), "joint_high": float(high)}
                row |= {"t_low": alone.ci_low, "t_high": alone.ci_high}
            rows.append(row)
    table = pd.DataFrame(rows).assign(source="ours", **labels)
    return table.reindex(columns=list(COLUMNS))


def per_face_row(
    metric: str, values: Sequence[np.ndarray], config: Config, **labels: str
) -> DataFrame:
    """One long row of the mean of a value for each face, or of the mean difference of two.

    Args:
        metric: its name.
        values: `(n,)` of one method, or of two for first - second.
        config: number of resamples and seed of the bootstrap.
        labels: written into the row.
    """
    import pandas as pd

    shown = values[0] if len(values) == 1 else values[0] - values[1]
    interval = bootstrap_interval(shown, config.evaluation.bootstrap, config.seed)
    row = {"metric": metric, "critic": "", "source": "ours", **interval._asdict(), **labels}
    return pd.DataFrame([row]).reindex(columns=list(COLUMNS))


# ------------------------------------------------------------------------------ families of claims


def shown_bounds(rows: DataFrame) -> DataFrame:
    """Rows whose `ci_low` and `ci_high` are those over faces and trainings where they are known."""
    joint = rows.reindex(columns=["joint_low", "joint_high"]).to_numpy(dtype=float)
    faces = rows[["ci_low", "ci_high"]].to_numpy(dtype=float)
    bounds = np.where(np.isfinite(joint).all(1, keepdims=True), joint, faces)
    return rows.assign(ci_low=bounds[:, 0], ci_high=bounds[:, 1])


def with_holm(rows: DataFrame) -> DataFrame:
    """A table of differences with `p_holm`, the adjusted p-value of the claim of each row.

    The family are the differences of the table in the metrics `FAMILY`, by the evaluators. A claim
    about attributes is one about recall and F1 together: its p-value is the larger one, and 1 where
    the two have different signs. Both rows get the adjusted value; rows of no claim stay NaN.
    """
    shown = shown_bounds(rows)
    p = interval_p_values(shown["value"], shown["ci_low"], shown["ci_high"])
    place = {
        (method, metric): i
        for i, (method, metric, critic) in enumerate(
            zip(rows["method"], rows["metric"], rows["critic"], strict=True)
        )
        if critic == "independent"
    }
    claims = []
    values = []
    signs = np.sign(shown["value"].to_numpy(dtype=float))
    for method in dict.fromkeys(rows["method"]):
        for metric in FAMILY:
            names = (metric, F1_OF[metric]) if metric in F1_OF else (metric,)
            members = [place[method, name] for name in names if (method, name) in place]
            if members:
                agree = len(set(signs[members])) == 1
                claims.append(members)
                values.append(max(p[members]) if agree else 1.0)
    adjusted = np.full(len(rows), np.nan)
    for members, value in zip(claims, holm(values), strict=True):
        adjusted[members] = value
    return rows.assign(p_holm=adjusted)


def cell_of(rows: DataFrame, method: str, metric: str, critic: str) -> Series | None:
    """The row of a cell with the bounds to show, or None; metrics without a critic count, too."""
    cell = rows[(rows["method"] == method) & (rows["metric"] == metric)]
    cell = cell[cell["critic"].isin([critic, ""])]
    return shown_bounds(cell.head(1)).iloc[0] if len(cell) else None
