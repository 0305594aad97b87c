"""`REPORT.md`: for each claim the paper's number, ours with its interval, and whether it holds.

It is made from the tables that the notebooks wrote (`figures/<profile>/*.csv`) and the paper's own
(`data/paper/*.csv`). A claim holds if the 95 % interval of the difference lies above 0 (or above
the bound that the claim names) and the difference of every training seed does, too. It is
inconclusive if the interval contains that bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ec2face_core.config import Config

from ..plots.save import paper_table, read_rows
from .robustness import common_accuracy
from .sweeps import conclusion, kept_sweeps

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
    "beta": ("Which β(t), and is it needed?", "03, 09"),
    "weights": ("What do very large class weights do?", "01, 09"),
    "lora": ("LoRA on mask tokens only, and of which rank?", "09"),
    "attention": ("Is attention among mask tokens alone enough?", "09"),
    "dropout": ("How often should a condition be dropped?", "09"),
    "length": ("Would longer training give the gain of the weights, too?", "09"),
}

HEAD = """# Claim by claim

Profile `{profile}`, {n} test faces, training seeds {seeds}. Ours: the difference of two variants on
the same faces, the mean over the seeds, with its 95 % interval over faces; then each seed alone.
Scored by the perception models that did not guide training, and once more by those that did: a gain
that only the guides measure is not a gain. Made from the CSVs of this folder by
`python -m ec2face_lab report`.

| claim | paper | ours | each seed | scored by the guides | |
|---|---:|---:|---:|---:|---|
"""


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
    lines = [HEAD.format(profile=config.profile, n=n, seeds=used).rstrip("\n")]
    for claim in CLAIMS:
        paper = _paper_difference(claim)
        ours = _cell(differences, claim.label, claim.metric, "independent")
        guiding = _cell(differences, claim.label, claim.metric, "guiding")
        alone = seeds[seeds["method"].str.startswith(f"{claim.label}, seed")]
        alone = alone[(alone["metric"] == claim.metric) & (alone["critic"] == "independent")]
        each = ", ".join(f"{value:+.2f}" for value in alone["value"])
        lines.append(
            f"| {claim.statement}: {claim.metric} | {paper:+.2f} | {_interval(ours)} | {each} | "
            f"{_interval(guiding)} | {verdict(ours, claim.bound, list(alone['value']))} |"
        )
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


def verdict(row: Sequence[float], bound: float = 0.0, each: Sequence[float] = ()) -> str:
    """Whether "the difference is above `bound`" holds.

    Args:
        row: the difference as (value, low, high).
        bound: to be exceeded.
        each: the difference of every training seed; a claim holds only if all exceed the bound.
    """
    _, low, high = row
    if low > bound:
        return "holds" if all(value > bound for value in each) else "not for every seed"
    return "does not hold" if high < bound else "inconclusive"


def _ceilings(config: Config) -> list[str]:
    """EC²Face's scores as shares of the real images', on test and on zero-shot faces."""
    lines = ["| faces | metric | EC²Face | real images | share |", "|---|---|---:|---:|---:|"]
    for name, faces in (("table1", "test"), ("table2", "zero-shot")):
        rows = _table(config, name)
        rows = rows[rows["source"] == "ours"]
        for metric in ("Text", "OAA", "HFA", "NFA", "RFA"):
            ours, real = (_cell(rows, m, metric, "independent") for m in ("EC2Face", "real"))
            span = f"{ours[0]:.2f} [{ours[1]:.2f}, {ours[2]:.2f}]"
            share = f"{100 * ours[0] / real[0]:.0f} %"
            lines.append(f"| {faces} | {metric} | {span} | {real[0]:.2f} | {share} |")
    return lines


def _leads(config: Config) -> list[str]:
    """EC²Face minus each comparison system on the test faces, beside the paper's difference."""
    if not (config.figure_dir / "table1_lead.csv").is_file():
        return ["No system has pictures or weights here."]
    rows = _table(config, "table1_lead")
    metrics = ("Text", "OAA", "RFA")
    paper = paper_table(1).pivot(index="method", columns="metric", values="value")
    lines = [
        "One training of EC²Face minus a miniature of each system on the same faces, scored by the",
        "independent perception models; then the paper's difference, if it has this system.",
        "",
        f"| EC²Face minus | {' | '.join(metrics)} |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(rows["method"]):
        name = method.partition(" - ")[2]
        cells = []
        for metric in metrics:
            ours = _cell(rows, method, metric, "independent")
            theirs = ""
            if name in paper.index:
                theirs = f", paper {paper[metric]['EC2Face'] - paper[metric][name]:+.2f}"
            cells.append(f"{_interval(ours)}{theirs}: {verdict(ours)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _questions(config: Config) -> list[str]:
    """Questions of reviewers, and the miniature's answers."""
    differences = _table(config, "ablation_differences")
    sweeps, _ = kept_sweeps(config)
    independent, guiding = (
        _cell(differences, "both - none", "OAA", role)[0] for role in ("independent", "guiding")
    )
    edits = common_accuracy(_table(config, "hand_drawn"))
    worst = edits.idxmin()
    foreign, known = (
        _cell(_table(config, name), "EC2Face", "OAA", "independent")[0]
        for name in ("table2", "table1")
    )
    answers = [
        (
            "The parser is both loss and metric: is the gain real?",
            f"Scored by an independent parser: both - none, OAA {independent:+.2f}; "
            f"by the guiding one {guiding:+.2f}",
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
            f"OAA {foreign:.1f} on the zero-shot faces, {known:.1f} on the test faces",
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


def _cell(rows: DataFrame, method: str, metric: str, role: str) -> tuple[float, float, float]:
    """(value, ci_low, ci_high) of one cell."""
    row = rows[
        (rows["method"] == method) & (rows["metric"] == metric) & (rows["critic"] == role)
    ].iloc[0]
    return row["value"], row["ci_low"], row["ci_high"]


def _interval(row: Sequence[float]) -> str:
    return f"{row[0]:+.2f} [{row[1]:+.2f}, {row[2]:+.2f}]"


def _table(config: Config, name: str) -> DataFrame:
    path = config.figure_dir / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is missing: `make reproduce PROFILE={config.profile} ONLY="05 06 10"` makes it'
        )
    return read_rows(path)
