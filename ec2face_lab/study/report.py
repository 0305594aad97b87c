"""`REPORT.md`: claim by claim the paper's number, ours with its interval, and whether it holds.

    python -m ec2face_lab report --profile mini

Made from the tables that the notebooks wrote (`figures/<profile>/*.csv`) and the paper's own
(`data/paper/*.csv`), so it says what they say. A claim holds if the 95 % interval of the difference
lies above 0 (or above the bound that the claim names) and every training seed says so, too; `not
seen` is an interval that holds 0.
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

    says: str
    metric: str
    label: str  # row of ablation_differences
    table: int  # of the paper
    first: str
    second: str
    least: float = 0.0  # the interval has to lie above it


LTAL = ("with LTAL - without", 3, "with_ltal", "without_ltal")

CLAIMS = (
    Claim("long-tail learning lifts the rare attributes", "RFA", *LTAL),
    Claim("... and overall accuracy", "OAA", *LTAL),
    Claim("... at little cost to the frequent ones (at most 0.5)", "HFA", *LTAL, least=-0.5),
    Claim("mask consistency lifts accuracy", "OAA", "mask - none", 4, "mask", "none"),
    Claim("text consistency lifts the text score", "Text", "text - none", 4, "text", "none"),
    Claim("both together keep the one", "OAA", "both - none", 4, "both", "none"),
    Claim("... and the other", "Text", "both - none", 4, "both", "none"),
)

# sweep -> the question that it answers, and the notebooks
SWEPT = {
    "beta": ("Which β(t), and is it needed?", "03, 09"),
    "weights": ("What do very large class weights do?", "01, 09"),
    "lora": ("LoRA on mask tokens alone, and of which rank?", "09"),
    "attention": ("May mask tokens see mask tokens only?", "09"),
    "dropout": ("How often should a condition be dropped?", "09"),
    "length": ("Would longer training bring the gain of the weights as well?", "09"),
}

HEAD = """# Claim by claim

Profile `{profile}`, {n} test faces, training seeds {seeds}. Ours: the difference of two variants on
the same faces, the mean over the seeds, with its 95 % interval over faces; then each seed alone.
Scored by the critics that did not guide training, and once more by those that did: a gain that only
the guiding critics see is not a gain. Made from the CSVs of this folder by
`python -m ec2face_lab report`.

| claim | paper | ours | each seed | guiding critics | |
|---|---:|---:|---:|---:|---|
"""


def report(config: Config) -> str:
    """The report as Markdown.

    Raises:
        FileNotFoundError: a table is missing; the message names the notebook that makes it.
    """
    differences = _table(config, "ablation_differences")
    seeds = _table(config, "ablation_seeds")
    own = differences[differences["critic"] == "independent"]
    used, n = str(own["seeds"].iloc[0]), int(own["n"].max())
    lines = [HEAD.format(profile=config.profile, n=n, seeds=used).rstrip("\n")]
    for claim in CLAIMS:
        paper = _paper_difference(claim)
        ours = _cell(differences, claim.label, claim.metric, "independent")
        guiding = _cell(differences, claim.label, claim.metric, "guiding")
        alone = seeds[seeds["method"].str.startswith(f"{claim.label}, seed")]
        alone = alone[(alone["metric"] == claim.metric) & (alone["critic"] == "independent")]
        each = ", ".join(f"{value:+.2f}" for value in alone["value"])
        lines.append(
            f"| {claim.says}: {claim.metric} | {paper:+.2f} | {_interval(ours)} | {each} | "
            f"{_interval(guiding)} | {verdict(ours, claim.least, list(alone['value']))} |"
        )
    lines += ["", "## Against the ceilings", "", *_ceilings(config)]
    lines += ["", "## Against the comparison systems", "", *_leads(config)]
    lines += ["", "## What reviewers asked", "", *_questions(config)]
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


def verdict(row: Sequence[float], least: float = 0.0, each: Sequence[float] = ()) -> str:
    """What an interval `(value, low, high)` allows to say of "the difference is above `least`".

    each: the difference of every training seed; a claim holds only if all of them say so.
    """
    _, low, high = row
    if low > least:
        return "holds" if all(value > least for value in each) else "not in every training"
    return "does not hold" if high < least else "not seen"


def _ceilings(config: Config) -> list[str]:
    """How much of what real images reach EC²Face reaches, known world and foreign."""
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
    """EC²Face minus each comparison system on the test faces, the paper's difference beside it."""
    if not (config.figure_dir / "table1_lead.csv").is_file():
        return ["No system has pictures or weights here."]
    rows, paper, metrics = _table(config, "table1_lead"), paper_table(1), ("Text", "OAA", "RFA")
    paper = paper.pivot(index="method", columns="metric", values="value")
    lines = [
        "One training of EC²Face minus a miniature of each system on the same faces, independent",
        "critics; then the paper's difference, where it compares with it.",
        "",
        f"| EC²Face minus | {' | '.join(metrics)} |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(rows["method"]):
        name, cells = method.partition(" - ")[2], []
        for metric in metrics:
            ours = _cell(rows, method, metric, "independent")
            theirs = ""
            if name in paper.index:
                theirs = f", paper {paper[metric]['EC2Face'] - paper[metric][name]:+.2f}"
            cells.append(f"{_interval(ours)}{theirs}: {verdict(ours)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _questions(config: Config) -> list[str]:
    """The questions that were put to the paper, and what the miniature answers."""
    differences, hand = (_table(config, name) for name in ("ablation_differences", "hand_drawn"))
    sweeps, _ = kept_sweeps(config)
    guided = {
        critic: _cell(differences, "both - none", "OAA", critic)[0]
        for critic in ("independent", "guiding")
    }
    edits = common_accuracy(hand)
    worst = edits.idxmin()
    foreign, known = (
        _cell(_table(config, name), "EC2Face", "OAA", "independent")[0]
        for name in ("table2", "table1")
    )
    answers = [
        (
            "The parser is both loss and metric: is the gain real?",
            f"Scored by a parser that never guided: both - none, OAA {guided['independent']:+.2f}; "
            f"by the guiding one {guided['guiding']:+.2f}",
            "06, `critics`",
        ),
        (
            "Where may a reverse estimate be trusted?",
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
            "Faces and words of another world?",
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


def _cell(rows: DataFrame, method: str, metric: str, critic: str) -> tuple[float, float, float]:
    found = rows[
        (rows["method"] == method) & (rows["metric"] == metric) & (rows["critic"] == critic)
    ].iloc[0]
    return found["value"], found["ci_low"], found["ci_high"]


def _interval(row: Sequence[float]) -> str:
    return f"{row[0]:+.2f} [{row[1]:+.2f}, {row[2]:+.2f}]"


def _table(config: Config, name: str) -> DataFrame:
    path = config.figure_dir / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is missing: `make reproduce PROFILE={config.profile} ONLY="05 06 10"` makes it'
        )
    return read_rows(path)
