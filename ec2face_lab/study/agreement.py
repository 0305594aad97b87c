"""How far the tables of a run lie from the published ones, and whether a verdict changed.

Machines round differently, so the last digits of a run differ. A cell's distance is the difference
of its two values as a share of half its published 95 % interval, so 1 means that the run's value
lies on the border of what other faces would give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ec2face_core.config import Config

from ..plots.save import read_rows
from .claims import CLAIMS, judged
from .summary import shown_bounds
from .verdicts import Results

if TYPE_CHECKING:
    from pandas import DataFrame, Series

CELL = ["method", "dataset", "metric", "critic"]
NOT_PERCENT = ("LPIPS", "NIQE", "KID", "CMMD", "Diversity")
LIMITS = (0.0, 0.01, 0.1, 0.5, 1.0)  # distances that the summary counts
WORST = 5  # cells beyond the last limit that are named


class Agreement(NamedTuple):
    """The comparison in words, and the claims whose verdict changed: key -> (published, here)."""

    text: str
    changed: dict[str, tuple[str, str]]


def compare(config: Config) -> Agreement:
    """Hold the tables and verdicts of `config.figure_dir` against those of `published_dir`."""
    cells = distances(config)
    lines = [f"compared with the published tables of {config.profile}:"]
    if cells.empty:
        return Agreement(f"nothing is published for {config.profile}, so nothing is compared", {})
    lines += _counts(cells)
    before, here = (
        judged(Results(config, folder)) for folder in (config.published_dir, config.figure_dir)
    )
    both = [claim for claim in CLAIMS if claim.key in before and claim.key in here]
    changed = {
        claim.key: (before[claim.key].verdict, here[claim.key].verdict)
        for claim in both
        if before[claim.key].verdict != here[claim.key].verdict
    }
    lines.append(f"  verdicts: {len(both) - len(changed)} of {len(both)} are the published ones")
    for claim in both:
        if claim.key in changed:
            old, new = changed[claim.key]
            lines.append(f"  CHANGED  {claim.statement} Published: {old}. Here: {new}.")
    return Agreement("\n".join(lines), changed)


def distances(config: Config) -> DataFrame:
    """One row for each cell that either folder has: table, method, metric, critic, distance.

    The distance is NaN where only one folder has the cell.
    """
    import pandas as pd

    parts = []
    for path in sorted(config.figure_dir.glob("*.csv")):
        published = config.published_dir / path.name
        if published.is_file():
            sides = [_ours(read_rows(file)) for file in (published, path)]
            cells = sides[0].merge(sides[1], on=CELL, how="outer", suffixes=("", "_here"))
            parts.append(cells.assign(table=path.stem))
    if not parts:
        return pd.DataFrame(columns=["table", *CELL, "distance"])
    cells = pd.concat(parts, ignore_index=True)
    gap = (cells["value_here"] - cells["value"]).abs()
    half = (cells["ci_high"] - cells["ci_low"]) / 2
    # a value without an interval may differ by a hundredth of itself
    unit = half.where(half > 0, (cells["value"].abs() / 100).clip(lower=1e-3))
    unmeasured = cells[["value_here", "value"]].isna().all(axis=1)
    return cells.assign(gap=gap, distance=(gap / unit).mask(unmeasured, 0.0))


def _ours(rows: DataFrame) -> DataFrame:
    ours = shown_bounds(rows[rows["source"] == "ours"]).fillna({"dataset": ""})
    return ours[[*CELL, "value", "ci_low", "ci_high"]]


def _counts(cells: DataFrame) -> list[str]:
    """How many cells lie within which distance, and the furthest."""
    known = cells[cells["distance"].notna()]
    lines = [f"  {len(cells):,} cells of {cells['table'].nunique()} tables, by the share of half"]
    lines[0] += " their 95 % interval that lies between the two values"
    last = -1.0
    for limit in LIMITS:
        found = int(((known["distance"] > last) & (known["distance"] <= limit)).sum())
        lines.append(f"  {f'within {limit:.0%}' if limit else 'equal':12} {found:8,}")
        last = limit
    far = known[known["distance"] > last]
    lines.append(f"  {'further':12} {len(far):8,}")
    lines += [f"    {_named(cell)}" for _, cell in far.nlargest(WORST, "distance").iterrows()]
    if missing := len(cells) - len(known):
        lines.append(f"  {'in one only':12} {missing:8,}")
    percent = known[~known["metric"].isin(NOT_PERCENT)]
    if len(percent) and percent["gap"].max() > 0:
        largest = percent.loc[percent["gap"].idxmax()]
        lines.append(f"  largest difference in points: {largest['gap']:.2f} ({_named(largest)})")
    return lines


def _named(cell: Series) -> str:
    name = ", ".join(str(cell[part]) for part in ("table", "method", "metric", "critic"))
    return f"{name}: {cell['value_here']:.4g}, published {cell['value']:.4g}"
