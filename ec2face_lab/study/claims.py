"""Every claim of the paper, and what the tables of a folder say about it.

REPORT.md prints all of them, README shows six, and `make reproduce` compares the verdicts of a run
with the published ones. `verdicts` says what each verdict means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, NamedTuple

from ec2face_core.attributes import CLASS_ID, display_name
from ec2face_core.config import adapter_dir
from ec2face_core.io.paths import resolve

from ..baselines import PAPER
from ..plots.save import paper_table
from .ablation import parameter_count
from .verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    UNTESTED,
    Measured,
    Results,
    interval,
    verdict,
)

if TYPE_CHECKING:
    from pandas import DataFrame

KEPT_SHARE = 0.95  # "quality is kept": at least this share of the score with both conditions
NEARLY_DOUBLE = 1.8  # the paper's 62.78 against 33.40 is 1.88 times
FEW_PARAMETERS = 0.1  # percent
LOWER_IS_BETTER = ("NIQE", "LPIPS")


class Judged(NamedTuple):
    """What a folder of results says about a claim."""

    ours: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        key: its name.
        where: the part of the paper that makes it.
        statement: the claim, as a sentence.
        paper: the number that the paper reports for it.
        judge: what a folder of results says; None if a table is missing.
    """

    key: str
    where: str
    statement: str
    paper: str
    judge: Callable[[Results], Judged | None]


def judged(results: Results) -> dict[str, Judged]:
    """What the results say about each claim that their tables can judge: key -> words."""
    answers = {claim.key: claim.judge(results) for claim in CLAIMS}
    return {key: answer for key, answer in answers.items() if answer is not None}


# ------------------------------------------------------------------- differences of two variants


@dataclass(frozen=True)
class Difference:
    """`first - second` in a metric, as the paper's ablation tables have it."""

    metric: str
    label: str  # row of ablation_differences
    table: int  # of the paper
    first: str
    second: str
    bound: float = 0.0  # the interval has to lie above it

    def paper(self) -> float:
        """The difference of the paper's cells."""
        rows = paper_table(self.table)
        values = rows[rows["metric"] == self.metric].set_index("method")["value"]
        return float(values[self.first] - values[self.second])

    def cells(self, results: Results) -> dict[str, Measured]:
        """The metric and its F1, with the value of each training."""
        seeds = results.methods("ablation_seeds")
        alone = [name for name in seeds if name.startswith(f"{self.label}, seed")]
        found = {}
        for metric in results.with_f1("ablation_differences", self.label, self.metric):
            cells = [results.measured("ablation_seeds", name, metric) for name in alone]
            each = tuple(cell.value for cell in cells if cell)
            cell = results.measured("ablation_differences", self.label, metric)
            found[metric] = cell._replace(each=each)
        return found

    def judge(self, results: Results) -> Judged | None:
        """The interval of each metric, and whether the claim holds."""
        cells = self.cells(results)
        if not cells:
            return None
        p = results.cell("ablation_differences", self.label, self.metric).p_holm
        said = verdict(list(cells.values()), self.bound, nan if self.bound else p)
        return Judged(_in_words(cells), said)


def _in_words(cells: dict[str, Measured]) -> str:
    """`OAA +2.6 [2.2, 3.1], F1 +0.3 [...]`."""
    parts = []
    for metric, cell in cells.items():
        name = "F1" if metric.startswith("F1") else metric
        parts.append(f"{name} {interval(cell)}")
    return ", ".join(parts)


LTAL = ("with LTAL - without", 3, "with_ltal", "without_ltal")
MASK = ("mask - none", 4, "mask", "none")
TEXT = ("text - none", 4, "text", "none")
BOTH = ("both - none", 4, "both", "none")
MULTIMODAL = ("Text", "OAA", "HFA", "NFA", "RFA")

DIFFERENCES = {
    "ltal-rare": Difference("RFA", *LTAL),
    "ltal-overall": Difference("OAA", *LTAL),
    "ltal-normal": Difference("NFA", *LTAL),
    "ltal-frequent": Difference("HFA", *LTAL, bound=-0.5),
    "mask-loss": Difference("OAA", *MASK),
    "text-loss": Difference("Text", *TEXT),
    "both-overall": Difference("OAA", *BOTH),
    "both-text": Difference("Text", *BOTH),
}


def paper_differences() -> DataFrame:
    """The paper's differences: label (as in `ablation_differences`), metric, value."""
    import pandas as pd

    rows = [(item.label, item.metric, item.paper()) for item in DIFFERENCES.values()]
    return pd.DataFrame(rows, columns=["method", "metric", "value"])


def _every_metric(results: Results) -> Judged | None:
    """Both losses against none, in each of the five metrics of both conditions."""
    outcomes = {metric: Difference(metric, *BOTH).judge(results) for metric in MULTIMODAL}
    if None in outcomes.values():
        return None
    good = [metric for metric, answer in outcomes.items() if answer.verdict == HOLDS]
    ours = f"{len(good)} of {len(outcomes)} metrics rise"
    return Judged(ours, HOLDS if len(good) == len(outcomes) else FAILS)


# ------------------------------------------------------------------ against the comparison systems


class Lead(NamedTuple):
    """EC²Face minus one system."""

    cells: dict[str, Measured]
    verdict: str


def leads(results: Results, table: str, metric: str) -> dict[str, Lead]:
    """System -> EC²Face minus it, and whether EC²Face is better.

    table: table1_lead or table2_lead.
    """
    found = {}
    for label in results.methods(table):
        names = results.with_f1(table, label, metric)
        if not names:
            continue
        cells = {name: results.measured(table, label, name) for name in names}
        gains = list(cells.values())
        if metric in LOWER_IS_BETTER:
            gains = [Measured(-cell.value, -cell.high, -cell.low) for cell in gains]
        p = results.cell(table, label, metric).p_holm
        found[label.partition(" - ")[2]] = Lead(cells, verdict(gains, p=p))
    return found


def _of_the_paper(found: dict[str, Lead]) -> dict[str, Lead]:
    return {name: lead for name, lead in found.items() if name in PAPER}


def _leads_all(table: str, metric: str) -> Callable[[Results], Judged | None]:
    """A judge of "it leads every system", which names the best of the others."""

    def judge(results: Results) -> Judged | None:
        found = _of_the_paper(leads(results, table, metric))
        if not found:
            return None
        pick = max if metric in LOWER_IS_BETTER else min
        best = pick(found, key=lambda name: found[name].cells[metric].value)
        beaten = [name for name, lead in found.items() if lead.verdict == HOLDS]
        ours = f"{_in_words(found[best].cells)} against the best other, {best}"
        if len(beaten) == len(found):
            return Judged(ours, HOLDS)
        return Judged(ours, f"{FAILS}: it leads {len(beaten)} of {len(found)}")

    return judge


def _paper_lead(table: int, metric: str) -> float:
    """The paper's EC²Face minus its best other system."""
    rows = paper_table(table)
    values = rows[rows["metric"] == metric].set_index("method")["value"]
    others = values.drop("EC2Face")
    best = others.min() if metric in LOWER_IS_BETTER else others.max()
    return float(values["EC2Face"] - best)


def _paper_leads_most() -> str:
    """In how many metrics the paper's EC²Face leads every system."""
    leads_in = [
        metric
        for metric in (*MULTIMODAL, *LOWER_IS_BETTER)
        if (_paper_lead(1, metric) < 0) == (metric in LOWER_IS_BETTER)
    ]
    return f"{len(leads_in)} of {len(MULTIMODAL) + len(LOWER_IS_BETTER)}"


def _leads_most(results: Results) -> Judged | None:
    """In how many metrics EC²Face leads every system."""
    metrics = [*MULTIMODAL, "NIQE"]
    answers = {metric: _leads_all("table1_lead", metric)(results) for metric in metrics}
    if None in answers.values():
        return None
    good = [metric for metric, answer in answers.items() if answer.verdict == HOLDS]
    named = f" ({', '.join(good)})" if good else ""
    ours = f"it leads all systems in {len(good)} of {len(metrics)} metrics{named}"
    return Judged(ours, HOLDS if 2 * len(good) > len(metrics) else FAILS)


def _nearly_doubles(results: Results) -> Judged | None:
    """RFA against the best other system's."""
    present = [name for name in results.methods("table1") if name in PAPER]
    if not present:
        return None
    values = {name: results.measured("table1", name, "RFA").value for name in present}
    best = max(values, key=lambda name: values[name])
    ratio = results.measured("table1", "EC2Face", "RFA").value / values[best]
    return Judged(
        f"{ratio:.2f} times the RFA of {best}", HOLDS if ratio >= NEARLY_DOUBLE else FAILS
    )


def _lpips(results: Results) -> Judged | None:
    if results.config.evaluation.lpips == "alex-random":
        return Judged("the trunk of LPIPS is random here and ranks no methods", UNTESTED)
    return _leads_all("table1_lead", "LPIPS")(results)


def _shows_rare(results: Results) -> Judged | None:
    """In how many pictures the rare classes of the mask are found, against the best other."""
    parts = []
    ahead = []
    for name in ("ear_r", "neck_l"):
        metric = f"presence_{name}"
        cells = {
            system: results.measured("presence", system, metric) for system in ("EC2Face", *PAPER)
        }
        cells = {system: cell for system, cell in cells.items() if cell and not isnan(cell.value)}
        others = {system: cell.value for system, cell in cells.items() if system != "EC2Face"}
        if "EC2Face" not in cells or not others:
            return None
        best = max(others, key=lambda system: others[system])
        ours = cells["EC2Face"].value
        ahead.append(ours > others[best])
        parts.append(
            f"{display_name(CLASS_ID[name])} {ours:.0f} % (best other: {others[best]:.0f} %)"
        )
    return Judged(
        f"found where the mask has it: {', '.join(parts)}", HOLDS if all(ahead) else FAILS
    )


# -------------------------------------------------------------------- one condition, and diversity


def _mask_alone(results: Results) -> Judged | None:
    alone = results.measured("one_condition", "both", "OAA, mask alone")
    joint = results.measured("table1", "EC2Face", "OAA")
    if alone is None or joint is None:
        return None
    bound = KEPT_SHARE * joint.value
    said = HOLDS if alone.low > bound else FAILS if alone.high < bound else OPEN
    return Judged(
        f"OAA {interval(alone, sign=False)}, with both conditions {joint.value:.1f}", said
    )


def _text_alone(results: Results) -> Judged | None:
    alone = results.measured("one_condition", "both", "Text, text alone")
    if alone is None:
        return None
    if results.config.lora.tokens == "mask":
        ours = "without a mask the LoRA acts on no token: the pictures are the base model's"
        return Judged(ours, UNTESTED)
    joint = results.measured("table1", "EC2Face", "Text")
    bound = KEPT_SHARE * joint.value if joint else 0.0
    said = HOLDS if alone.low > bound else FAILS if alone.high < bound else OPEN
    return Judged(f"Text {interval(alone, sign=False)}", said)


def _diversity(results: Results) -> Judged | None:
    cell = results.measured("table4", "both", "Diversity")
    if cell is None:
        return None
    ours = f"LPIPS {interval(cell, sign=False)} between pictures of a face; no bound to judge it by"
    return Judged(ours, UNTESTED)


def _few_parameters(results: Results) -> Judged | None:
    """The LoRA's share of the transformer's parameters."""
    folders = (
        adapter_dir(results.config, "both"),
        resolve(results.config.backbone.path) / "transformer",
    )
    lora, base = (sum(map(parameter_count, f.glob("*.safetensors"))) for f in folders)
    if not lora or not base:
        return None
    share = 100 * lora / base
    ours = f"{share:.2g} % of the {base:,} of the transformer"
    return Judged(ours, HOLDS if share < FEW_PARAMETERS else FAILS)


# ------------------------------------------------------------------------------------- the claims


def _difference(key: str, where: str, statement: str) -> Claim:
    item = DIFFERENCES[key]
    return Claim(key, where, statement, f"{item.metric} {item.paper():+.2f}", item.judge)


def _lead(key: str, where: str, statement: str, table: int, metric: str) -> Claim:
    judge = _leads_all(f"table{table}_lead", metric)
    return Claim(key, where, statement, f"{metric} {_paper_lead(table, metric):+.2f}", judge)


CLAIMS = (
    Claim(
        "most-metrics",
        "abstract, Sec. 4.2",
        "EC²Face outperforms the other methods in most metrics.",
        _paper_leads_most(),
        _leads_most,
    ),
    _difference(
        "ltal-rare",
        "abstract, Table 3",
        "Long-tail learning raises the accuracy of rare attributes.",
    ),
    Claim(
        "parameters",
        "Sec. 3.5",
        "The LoRA adds less than 0.1 % of parameters.",
        "< 0.1 %",
        _few_parameters,
    ),
    _lead("lead-text", "Sec. 4.2, Table 1", "EC²Face follows the text best.", 1, "Text"),
    _lead("lead-overall", "Sec. 4.2, Table 1", "EC²Face follows the mask best.", 1, "OAA"),
    _lead("lead-frequent", "Sec. 4.2, Table 1", "EC²Face leads in frequent attributes.", 1, "HFA"),
    _lead("lead-normal", "Sec. 4.2, Table 1", "EC²Face leads in normal attributes.", 1, "NFA"),
    _lead("lead-rare", "Sec. 4.2, Table 1", "EC²Face leads in rare attributes.", 1, "RFA"),
    Claim(
        "doubles-rare",
        "Sec. 4.2",
        "EC²Face nearly doubles the second best in rare attributes.",
        "1.88 times",
        _nearly_doubles,
    ),
    _lead(
        "quality-niqe", "Sec. 4.2, Table 1", "EC²Face's pictures are the most natural.", 1, "NIQE"
    ),
    Claim(
        "quality-lpips",
        "Sec. 4.2, Table 1",
        "EC²Face's pictures are the closest to the real ones.",
        f"LPIPS {_paper_lead(1, 'LPIPS'):+.2f}",
        _lpips,
    ),
    _lead(
        "zero-shot-text",
        "Sec. 4.2, Table 2",
        "Zero-shot, EC²Face follows the text best.",
        2,
        "Text",
    ),
    _lead(
        "zero-shot-overall",
        "Sec. 4.2, Table 2",
        "Zero-shot, EC²Face follows the mask best.",
        2,
        "OAA",
    ),
    _lead(
        "zero-shot-rare",
        "Sec. 4.2, Table 2",
        "Zero-shot, EC²Face leads in rare attributes.",
        2,
        "RFA",
    ),
    Claim(
        "shows-rare",
        "Sec. 4.3, App. B, Figs. 3, 6",
        "EC²Face shows earrings and necklaces more clearly than the others.",
        "pictures",
        _shows_rare,
    ),
    _difference("ltal-overall", "Sec. 4.4, Table 3", "Long-tail learning raises overall accuracy."),
    _difference(
        "ltal-normal",
        "Sec. 4.4, Table 3",
        "Long-tail learning raises the accuracy of normal attributes.",
    ),
    _difference(
        "ltal-frequent",
        "Sec. 4.4, Table 3",
        "Long-tail learning costs frequent attributes little (at most 0.5 points).",
    ),
    _difference("mask-loss", "Sec. 4.4, Table 4", "The mask loss alone raises mask accuracy."),
    _difference("text-loss", "Sec. 4.4, Table 4", "The text loss alone raises the text score."),
    _difference("both-overall", "Sec. 4.4, Table 4", "Both losses together raise mask accuracy."),
    _difference("both-text", "Sec. 4.4, Table 4", "Both losses together raise the text score."),
    Claim(
        "both-all",
        "Sec. 4.4, Table 4",
        "Both losses together raise every metric of both conditions.",
        "5 of 5",
        _every_metric,
    ),
    Claim(
        "mask-alone",
        "App. C, Fig. 7",
        f"With a mask alone, quality is kept (at least {100 * KEPT_SHARE:.0f} % of the accuracy).",
        "pictures",
        _mask_alone,
    ),
    Claim(
        "text-alone",
        "App. C, Fig. 7",
        "With a text alone, quality is kept.",
        "pictures",
        _text_alone,
    ),
    Claim(
        "diversity",
        "App. D, Fig. 8",
        "Pictures of one text and mask differ in what neither of them names.",
        "pictures",
        _diversity,
    ),
)
