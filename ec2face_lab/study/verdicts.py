"""Verdicts on differences, and the words for intervals: the one place where both are made.

`verdict` answers a claim; `verdict_of` says which side of a difference is higher. A claim *holds*
if the 95 % interval of its difference lies above a bound and the difference of every training does,
too. One about attributes has to hold in recall, which is the paper's accuracy and rises with the
painted area, and in F1. A difference from 0 has to survive Holm's adjustment over the claims of its
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ec2face_core.config import Config

from ..plots.render_tables import SIGNIFICANT, decimals
from ..plots.save import read_rows
from .summary import F1_OF, cell_of, shown_bounds

if TYPE_CHECKING:
    from pandas import DataFrame

HOLDS = "holds"
FAILS = "does not hold"
OPEN = "inconclusive"
UNTESTED = "not tested"

EVALUATORS = "independent"


class Measured(NamedTuple):
    """A difference in one metric: its interval, and each training's value."""

    value: float
    low: float
    high: float
    each: tuple[float, ...] = ()


def verdict(measured: Sequence[Measured], bound: float = 0.0, p: float = nan) -> str:
    """Whether "the difference is above `bound`" holds.

    Args:
        measured: one metric, or recall and F1.
        bound: to be exceeded, by the interval and by every training.
        p: of the claim after Holm's adjustment; NaN: it is not one of a family.
    """
    outcomes = [_outcome(cell, bound) for cell in measured]
    if len(set(outcomes)) == 1:
        late = outcomes[0] == HOLDS and p >= SIGNIFICANT
        return "not after Holm's adjustment" if late else outcomes[0]
    recall, f1 = outcomes
    if recall == HOLDS:
        return f"in recall only; F1: {f1}"
    if f1 == HOLDS:
        return f"in F1 only; recall: {recall}"
    return FAILS if FAILS in outcomes else OPEN


def _outcome(cell: Measured, bound: float) -> str:
    if cell.low > bound:
        return HOLDS if all(value > bound for value in cell.each) else "not for every seed"
    return FAILS if cell.high < bound else OPEN


def verdict_of(rows: DataFrame, method: str, metric: str, critic: str = "independent") -> str:
    """What a table of differences says of a method in a metric, and for attributes in its F1.

    Returns:
        higher, lower, not significant, or in which of recall and F1 alone it is so; followed by
        `before Holm's adjustment` where the claim does not survive it.
    """
    found = []
    p = nan
    for name in (metric, F1_OF.get(metric)):
        row = cell_of(rows, method, name, critic) if name else None
        if row is not None:
            found.append(int(row["ci_low"] > 0) - int(row["ci_high"] < 0))
            p = float(row.get("p_holm", nan))
    words = {1: "higher", -1: "lower"}
    if not any(found):
        return "not significant"
    if len(found) == 2 and found[0] != found[1]:
        parts = zip(found, ("recall", "F1"), strict=True)
        said = [f"{words[sign]} in {name}" for sign, name in parts if sign]
        return said[0] + " only" if len(said) == 1 else ", ".join(said)
    return words[found[0]] + (" before Holm's adjustment" if p >= SIGNIFICANT else "")


def interval(cell: Measured, sign: bool = True) -> str:
    """`+13.2 [10.3, 17.0]`, with the digits that the width of the interval allows."""
    places = decimals((cell.high - cell.low) / 2)
    value = f"{cell.value:{'+' if sign else ''}.{places}f}"
    return f"{value} [{cell.low:.{places}f}, {cell.high:.{places}f}]"


class Cell(NamedTuple):
    """A cell of a table: its value, the interval to show, and what else is known of it."""

    value: float
    low: float
    high: float
    t_low: float
    t_high: float
    p_holm: float


@dataclass(frozen=True)
class Results:
    """The tables of a folder of results, each read once."""

    config: Config
    folder: Path
    _tables: dict[str, DataFrame | None] = field(default_factory=dict)
    _cells: dict[str, dict[tuple[str, str, str], Cell]] = field(default_factory=dict)

    def table(self, name: str) -> DataFrame | None:
        """Our rows of `<folder>/<name>.csv`, or None without such a file."""
        if name not in self._tables:
            path = self.folder / f"{name}.csv"
            rows = read_rows(path) if path.is_file() else None
            self._tables[name] = None if rows is None else rows[rows["source"] == "ours"]
        return self._tables[name]

    def methods(self, table: str) -> list[str]:
        """The methods of a table in their order; none without the table."""
        return list(dict.fromkeys(method for method, _, _ in self._of(table)))

    def cell(self, table: str, method: str, metric: str, role: str = EVALUATORS) -> Cell | None:
        """A cell of a table, or None; metrics without a perception model count, too."""
        cells = self._of(table)
        return cells.get((method, metric, role)) or cells.get((method, metric, ""))

    def measured(
        self, table: str, method: str, metric: str, role: str = EVALUATORS
    ) -> Measured | None:
        """The value and interval of a cell, or None."""
        cell = self.cell(table, method, metric, role)
        return cell and Measured(cell.value, cell.low, cell.high)

    def with_f1(self, table: str, method: str, metric: str) -> list[str]:
        """A metric and, for attributes, its F1, as far as the table has them."""
        names = [metric, F1_OF[metric]] if metric in F1_OF else [metric]
        return [name for name in names if self.cell(table, method, name)]

    def _of(self, table: str) -> dict[tuple[str, str, str], Cell]:
        if table not in self._cells:
            rows = self.table(table)
            found = {}
            for row in [] if rows is None else shown_bounds(rows).to_dict("records"):
                numbers = ("value", "ci_low", "ci_high", "t_low", "t_high", "p_holm")
                key = (row["method"], row["metric"], row["critic"])
                found[key] = Cell(*(float(row[name]) for name in numbers))
            self._cells[table] = found
        return self._cells[table]
