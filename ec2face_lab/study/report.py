"""`REPORT.md`: for each claim the paper's number, ours with its interval, and whether it holds.

It is made from the tables that the notebooks wrote (`figures/<profile>/*.csv`) and the paper's own
(`data/paper/*.csv`). A claim holds if the 95 % interval of the difference lies above 0 (or above
the bound that the claim names) and the difference of every training seed does, too. A claim about
attributes has to hold in recall, which is the paper's accuracy, and in F1. A claim of a difference
from 0 has to survive Holm's adjustment over the claims of its table. It is inconclusive if the
interval contains the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ec2face_core.attributes import CLASS_ID, display_name
from ec2face_core.config import Config

from ..plots.render_tables import SIGNIFICANT
from ..plots.save import paper_table, read_rows
from .robustness import common_accuracy
from .summary import F1_OF, cell_of
from .sweeps import conclusion, kept_sweeps
from .tables import RARE_CLASSES, describe_intervals

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Claim:
    """One difference that the paper reports: `first - second` in a metric of a table."""

    statement: str
    metric: str
    label: str  # row of ablation_differences
    table: int  # of the paper
    first: str
    second: str
    bound: float = 0.0  # the interval has to lie above it


LTAL = ("with LTAL - without", 3, "with_ltal", "without_ltal")

CLAIMS = (
    Claim("long-tail learning lifts the rare attributes", "RFA", *LTAL),
    Claim("... and overall accuracy", "OAA", *LTAL),
    Claim("... at little cost to the frequent ones (at most 0.5)", "HFA", *LTAL, bound=-0.5),
    Claim("mask consistency lifts accuracy", "OAA", "mask - none", 4, "mask", "none"),
    Claim("text consistency lifts the text score", "Text", "text - none", 4, "text", "none"),
    Claim("both together keep the one", "OAA", "both - none", 4, "both", "none"),
    Claim("... and the other", "Text", "both - none", 4, "both", "none"),
)

# sweep -> the question that it answers, and the notebooks
SWEPT = {
    "beta": ("Which β(t), and is it needed?", "04, 11"),
    "weights": ("What do very large class weights do?", "02, 11"),
    "lora": ("LoRA on mask tokens only, and of which rank?", "11"),
    "attention": ("Is attention among mask tokens alone enough?", "11"),
    "dropout": ("How often should a condition be dropped?", "11"),
    "length": ("Would longer training give the gain of the weights, too?", "11"),
}

HEAD = """# Claim by claim

Profile `{profile}`, {n} test faces, training seeds {seeds}. Ours: the difference of two variants on
the same faces, the mean over the seeds, with its 95 % interval. {intervals} ± is half the interval
over trainings alone (Student's t), then each seed alone. Attributes are scored in recall, which is
the paper's accuracy and rises with the painted area, and in F1: a claim holds if it holds in both,
for every seed, and after Holm's adjustment over the claims of the table. Scored by the perception
models that did not guide training, and once more by those that did: a gain that only the guides
measure is not a gain. Both learnt from the same procedural faces, so agreement is no proof. Made
from the CSVs of this folder by `python -m ec2face_lab report`.

| claim | metric | paper | ours | trainings | each seed | scored by the guides | |
|---|---|---:|---:|---:|---:|---:|---|
"""


class Measured(NamedTuple):
    """A difference in one metric: its interval, and each training's value."""

    value: float
    low: float
    high: float
    each: tuple[float, ...] = ()


def report(config: Config) -> str:
    """The report as Markdown.

    Raises:
        FileNotFoundError: a table is missing; the message names the notebook that makes it.
    """
    differences = _table(config, "ablation_differences")
    seeds = _table(config, "ablation_seeds")
    scores = differences[differences["critic"] == "independent"]
    used = str(scores["seeds"].iloc[0])
    n = int(scores["n"].max())
    intervals = describe_intervals(differences)
    head = HEAD.format(profile=config.profile, n=n, seeds=used, intervals=intervals)
    lines = [head.rstrip("\n")]
    for claim in CLAIMS:
        lines += _claim_lines(claim, differences, seeds)
    lines += ["", "## Painted, or painted right?", "", *_rare_classes(config, differences)]
    lines += ["", "## Against the ceilings", "", *_ceilings(config)]
    lines += ["", "## Against the comparison systems", "", *_leads(config)]
    lines += ["", "## Questions of reviewers", "", *_questions(config)]
    return "\n".join(lines) + "\n"


def save_report(config: Config) -> Path:
    """Write `figures/<profile>/REPORT.md` and return its path."""
    path = config.figure_dir / "REPORT.md"
    path.write_text(report(config))
    return path


def paper_differences() -> DataFrame:
    """The paper's differences: label (as in `ablation_differences`), metric, value."""
    import pandas as pd

    rows = [(claim.label, claim.metric, _paper_difference(claim)) for claim in CLAIMS]
    return pd.DataFrame(rows, columns=["method", "metric", "value"])


def verdict(measured: Sequence[Measured], bound: float = 0.0, p: float = 0.0) -> str:
    """Whether "the difference is above `bound`" holds.

    Args:
        measured: one metric, or recall and F1.
        bound: to be exceeded, by the interval and by every training.
        p: of the claim after Holm's adjustment; NaN: it is not one of a family.
    """
    outcomes = [_outcome(cell, bound) for cell in measured]
    if len(set(outcomes)) == 1:
        late = outcomes[0] == "holds" and p >= SIGNIFICANT
        return "not after Holm's adjustment" if late else outcomes[0]
    recall, f1 = outcomes
    if recall == "holds":
        return f"in recall only; F1: {f1}"
    if f1 == "holds":
        return f"in F1 only; recall: {recall}"
    return "does not hold" if "does not hold" in outcomes else "inconclusive"


def _outcome(cell: Measured, bound: float) -> str:
    if cell.low > bound:
        return "holds" if all(value > bound for value in cell.each) else "not for every seed"
    return "does not hold" if cell.high < bound else "inconclusive"


def _claim_lines(claim: Claim, differences: DataFrame, seeds: DataFrame) -> list[str]:
    """A line for the paper's metric with the verdict, and one for its F1."""
    alone = seeds[seeds["method"].str.startswith(f"{claim.label}, seed")]
    alone = alone[alone["critic"] == "independent"]
    measured = []
    cells = []
    p = nan
    for metric in _with_f1(differences, claim.label, claim.metric):
        row = cell_of(differences, claim.label, metric, "independent")
        each = tuple(alone[alone["metric"] == metric]["value"])
        measured.append(Measured(row["value"], row["ci_low"], row["ci_high"], each))
        guiding = _measured(differences, claim.label, metric, "guiding")
        half = (row["t_high"] - row["t_low"]) / 2
        p = float(row["p_holm"])
        cells.append([
            metric, _interval(measured[-1]), "–" if isnan(half) else f"±{half:.2f}",
            ", ".join(f"{value:+.2f}" for value in each), _interval(guiding),
        ])  # fmt: skip
    # no p-value stands for another bound than 0
    said = verdict(measured, claim.bound, nan if claim.bound else p)
    paper = f"{_paper_difference(claim):+.2f}"
    lines = []
    for i, (metric, *numbers) in enumerate(cells):
        first = (claim.statement, metric, paper) if i == 0 else ("", metric, "")
        lines.append(f"| {' | '.join([*first, *numbers, said if i == 0 else ''])} |")
    return lines


def _with_f1(rows: DataFrame, label: str, metric: str) -> list[str]:
    """A metric and, for attributes, its F1 if the table has it."""
    names = [metric, F1_OF[metric]] if metric in F1_OF else [metric]
    return [name for name in names if cell_of(rows, label, name, "independent") is not None]


def _rare_classes(config: Config, differences: DataFrame) -> list[str]:
    """What long-tail learning changes for earrings and necklaces: recall, precision, F1, IoU."""
    label = LTAL[0]
    lines = [
        "What long-tail learning changes for the rare classes, in points: more of a class may be",
        "found because more is painted.",
        "",
        "| class | recall | precision | F1 | IoU |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in RARE_CLASSES:
        metrics = [name, *(f"{kind}_{name}" for kind in ("precision", "f1", "iou"))]
        if all(cell_of(differences, label, m, "independent") is not None for m in metrics):
            cells = [_interval(_measured(differences, label, m, "independent")) for m in metrics]
            lines.append(f"| {display_name(CLASS_ID[name])} | {' | '.join(cells)} |")
    path = config.figure_dir / "presence_ltal.csv"
    if not path.is_file():
        return lines
    rows = read_rows(path)
    lines += [
        "",
        "Share of the pictures in which the parser finds the class, where the mask has it and",
        "where it has none (percent):",
        "",
        "| class | without LTAL | with LTAL | real images |",
        "|---|---:|---:|---:|",
    ]
    for name in RARE_CLASSES:
        cells = []
        for method in ("without_ltal", "with_ltal", "real"):
            found, false = (
                _measured(rows, method, f"{kind}_{name}", "independent")
                for kind in ("presence", "false_presence")
            )
            cells.append(f"{found.value:.1f}, {false.value:.1f}")
        lines.append(f"| {display_name(CLASS_ID[name])} | {' | '.join(cells)} |")
    return lines


def _ceilings(config: Config) -> list[str]:
    """EC²Face's scores as shares of the real images', on test and on zero-shot faces."""
    lines = ["| faces | metric | EC²Face | real images | share |", "|---|---|---:|---:|---:|"]
    for name, faces in (("table1", "test"), ("table2", "zero-shot")):
        rows = _table(config, name)
        rows = rows[rows["source"] == "ours"]
        for metric in ("Text", "OAA", "HFA", "NFA", "RFA", "F1", "F1_RFA", "mIoU"):
            if cell_of(rows, "EC2Face", metric, "independent") is None:
                continue
            ours, real = (_measured(rows, m, metric, "independent") for m in ("EC2Face", "real"))
            span = f"{ours.value:.2f} [{ours.low:.2f}, {ours.high:.2f}]"
            share = f"{100 * ours.value / real.value:.0f} %"
            lines.append(f"| {faces} | {metric} | {span} | {real.value:.2f} | {share} |")
    return lines


def _leads(config: Config) -> list[str]:
    """EC²Face minus each comparison system on the test faces, beside the paper's difference."""
    if not (config.figure_dir / "table1_lead.csv").is_file():
        return ["No system has pictures or weights here."]
    rows = _table(config, "table1_lead")
    metrics = ("Text", "OAA", "RFA")
    paper = paper_table(1).pivot(index="method", columns="metric", values="value")
    lines = [
        "EC²Face minus a miniature of each system on the same faces, scored by the independent",
        "perception models; then the paper's difference, if it has this system. Each system was",
        f"trained once. {describe_intervals(rows)} A lead in attributes holds if it holds in",
        "recall and F1 and after Holm's adjustment over this table's claims.",
        "",
        f"| EC²Face minus | {' | '.join(metrics)} |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(rows["method"]):
        name = method.partition(" - ")[2]
        cells = []
        for metric in metrics:
            names = _with_f1(rows, method, metric)
            ours = [_measured(rows, method, one, "independent") for one in names]
            parts = [_interval(ours[0])]
            parts += [f"{one} {_interval(cell)}" for one, cell in zip(names, ours, strict=True)][1:]
            if name in paper.index:
                parts.append(f"paper {paper[metric]['EC2Face'] - paper[metric][name]:+.2f}")
            p = float(cell_of(rows, method, metric, "independent")["p_holm"])
            cells.append(f"{', '.join(parts)}: {verdict(ours, p=p)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _questions(config: Config) -> list[str]:
    """Questions of reviewers, and the miniature's answers."""
    differences = _table(config, "ablation_differences")
    sweeps, _ = kept_sweeps(config)
    independent, guiding = (
        _measured(differences, "both - none", "OAA", role).value
        for role in ("independent", "guiding")
    )
    edits = common_accuracy(_table(config, "hand_drawn"))
    worst = edits.idxmin()
    foreign, known = (
        _measured(_table(config, name), "EC2Face", "OAA", "independent").value
        for name in ("table2", "table1")
    )
    answers = [
        (
            "The parser is both loss and metric: is the gain real?",
            f"Scored by a second parser: both - none, OAA {independent:+.2f}; "
            f"by the guiding one {guiding:+.2f}. Both learnt from the same procedural faces",
            "06, `critics`",
        ),
        (
            "Where is a reverse estimate reliable?",
            "Latent error, LPIPS, parser and CLIP against t, with bands",
            "02, `fig2`",
        ),
        *(
            (question, conclusion(sweeps, sweep), f"{notebooks}, `sweep_{sweep}`")
            for sweep, (question, notebooks) in SWEPT.items()
        ),
        (
            "Masks drawn by hand?",
            "Accuracy over the classes that every edit keeps: "
            f"{edits['as parsed']:.1f} with parsed masks, at worst {edits[worst]:.1f} ({worst})",
            "10, `hand_drawn`",
        ),
        (
            "Faces and words from another data set?",
            f"OAA {foreign:.1f} on the zero-shot faces, {known:.1f} on the test faces. "
            "The LoRA never saw such faces; the base and the perception models may have",
            "05, `table2`",
        ),
        (
            "What does it cost?",
            "Operations, memory and hours counted on the real configurations",
            "README, `benchmarks/`",
        ),
    ]
    lines = ["| question | answer here | where |", "|---|---|---|"]
    return lines + [f"| {question} | {answer} | {where} |" for question, answer, where in answers]


def _paper_difference(claim: Claim) -> float:
    rows = paper_table(claim.table)
    first, second = (
        rows[(rows["method"] == method) & (rows["metric"] == claim.metric)]["value"].iloc[0]
        for method in (claim.first, claim.second)
    )
    return float(first - second)


def _measured(rows: DataFrame, method: str, metric: str, role: str) -> Measured:
    """The interval of one cell."""
    row = cell_of(rows, method, metric, role)
    return Measured(row["value"], row["ci_low"], row["ci_high"])


def _interval(cell: Measured) -> str:
    return f"{cell.value:+.2f} [{cell.low:+.2f}, {cell.high:+.2f}]"


def _table(config: Config, name: str) -> DataFrame:
    path = config.figure_dir / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is missing: `make reproduce PROFILE={config.profile} ONLY="06 07 12"` makes it'
        )
    return read_rows(path)
