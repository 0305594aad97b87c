"""`REPORT.md`: every claim of the paper, what the tables of a run say, and further questions.

It is made from the tables that the notebooks wrote and the paper's own (`data/paper/*.csv`).
`claims` makes the verdicts.
"""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from ec2face_core.attributes import CLASS_ID, display_name
from ec2face_core.config import Config
from ec2face_core.runs import whole_file

from ..plots.differences import noise_band
from ..plots.save import paper_table
from .claims import CLAIMS, DIFFERENCES, LTAL, judged, leads
from .robustness import common_accuracy
from .sweeps import compared, kept_sweeps
from .tables import RARE_CLASSES
from .verdicts import Measured, Results, interval

if TYPE_CHECKING:
    from pandas import DataFrame

NEEDED = ("ablation_differences", "ablation_seeds", "table1", "table2", "hand_drawn")

# sweep -> the question that it answers
SWEPT = {
    "beta": "Which β(t) is best, and is it needed?",
    "weights": "What do very large class weights do?",
    "lora": "Where should the LoRA act, and of which rank should it be?",
    "attention": "Is attention among mask tokens alone enough?",
    "dropout": "How often should a condition be dropped?",
    "length": "Would longer training bring the gain of the weights as well?",
}

METRICS = ("RFA", "OAA", "HFA", "Text")

HEAD = """# Claim by claim

This report holds every claim of the paper against profile `{profile}`: {n} test faces, scored by
perception models that did not guide the training. The variants of EC²Face were trained with the
seeds {seeds}; their differences are paired by face, and their 95 % intervals are over faces and
trainings where there are several. The comparison systems were trained once, and their intervals are
over faces. The paper's accuracy is recall, which also rises when a model paints more of a class.
Therefore F1 stands beside it.

A claim *holds* if the interval of its difference lies above 0 (or above the bound that it names),
in recall and in F1, for every training, and after Holm's adjustment over the claims of its table.
It is *inconclusive* if the interval contains the bound, and *not tested* where the reason stands
beside it. `python -m ec2face_lab report` makes this page from the CSVs of this folder.

| claim of the paper | where | paper | here | verdict |
|---|---|---|---|---|
"""

GUIDED = """
A gain that only the guiding models measure is not a gain, so the guides score once more. Both kinds
learnt from the same faces, so their agreement is no proof. ± is half the interval over trainings
alone (Student's t).

| difference | metric | here | trainings | each seed | scored by the guides |
|---|---|---:|---:|---:|---:|
"""

SYSTEMS = """
The table shows EC²Face minus a miniature of each system on the same faces, and the paper's
difference where it has the system. Two systems are newer than the paper.

| EC²Face minus | Text | OAA | RFA |
|---|---|---|---|
"""

RARE = """
Long-tail learning may find more of a class because it paints more. The first table shows what it
changes, in points; the second shows in how many pictures the parser finds the class, where the mask
has it and where it has none, in percent.
"""


def report(config: Config, folder: Path | None = None) -> str:
    """The report as Markdown.

    Args:
        config: the profile.
        folder: of the tables; None: those of the profile's own run.

    Raises:
        FileNotFoundError: a table is missing; the message names the notebooks that make it.
    """
    results = Results(config, folder or config.figure_dir)
    for name in NEEDED:
        if results.table(name) is None:
            raise FileNotFoundError(
                f"{results.folder / name}.csv is missing: `make reproduce "
                f"PROFILE={config.profile}` makes it"
            )
    differences = results.table("ablation_differences")
    scores = differences[differences["critic"] == "independent"]
    head = HEAD.format(
        profile=config.profile, n=int(scores["n"].max()), seeds=scores["seeds"].iloc[0]
    )
    sections = {
        "": head.rstrip("\n").splitlines() + _claims(results),
        "What each training says, and the guides": _differences(results),
        "Painted, or painted right?": _rare_classes(results),
        "How near are the ceilings?": _ceilings(results),
        "Against the comparison systems": _leads(results),
        "Further questions": _questions(results),
    }
    parts = []
    for title, lines in sections.items():
        parts += ["", f"## {title}", *lines] if title else lines
    return "\n".join(parts) + "\n"


def save_report(config: Config) -> Path:
    """Write `REPORT.md` beside the tables of a run, and return its path."""
    text = report(config)
    path = config.figure_dir / "REPORT.md"
    with whole_file(path) as part:
        part.write_text(text)
    return path


def _claims(results: Results) -> list[str]:
    answers = judged(results)
    lines = []
    for claim in CLAIMS:
        answer = answers.get(claim.key)
        ours, said = answer or ("not measured here", "–")
        lines.append(f"| {claim.statement} | {claim.where} | {claim.paper} | {ours} | {said} |")
    return lines


def _differences(results: Results) -> list[str]:
    """Each difference of two variants: trainings together, alone, and scored by the guides."""
    table = "ablation_differences"
    lines = GUIDED.rstrip("\n").splitlines()
    for item in DIFFERENCES.values():
        for metric, cell in item.cells(results).items():
            known = results.cell(table, item.label, metric)
            half = (known.t_high - known.t_low) / 2
            guides = results.measured(table, item.label, metric, "guiding")
            values = [
                item.label, metric, interval(cell), "–" if isnan(half) else f"±{half:.2f}",
                ", ".join(f"{value:+.2f}" for value in cell.each), interval(guides),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(values)} |")
    return lines


def _rare_classes(results: Results) -> list[str]:
    """What long-tail learning changes for earrings and necklaces: recall, precision, F1, IoU."""
    lines = [*RARE.splitlines(), ""]
    lines += ["| class | recall | precision | F1 | IoU |", "|---|---:|---:|---:|---:|"]
    for name in RARE_CLASSES:
        metrics = [name, *(f"{kind}_{name}" for kind in ("precision", "f1", "iou"))]
        cells = [results.measured("ablation_differences", LTAL[0], m) for m in metrics]
        if None not in cells:
            lines.append(f"| {_class(name)} | {' | '.join(map(interval, cells))} |")
    if results.table("presence_ltal") is None:
        return lines
    lines += ["", "| class | without LTAL | with LTAL | real images |", "|---|---|---|---|"]
    for name in RARE_CLASSES:
        parts = []
        for method in ("without_ltal", "with_ltal", "real"):
            found, false = (
                results.measured("presence_ltal", method, f"{kind}_{name}").value
                for kind in ("presence", "false_presence")
            )
            parts.append(f"{found:.0f} where it is, {false:.0f} where it is not")
        lines.append(f"| {_class(name)} | {' | '.join(parts)} |")
    return lines


def _ceilings(results: Results) -> list[str]:
    """EC²Face's scores as shares of the real images', on test and on zero-shot faces."""
    lines = ["", "| faces | metric | EC²Face | real images | share |", "|---|---|---:|---:|---:|"]
    for table, faces in (("table1", "test"), ("table2", "zero-shot")):
        for metric in ("Text", "OAA", "HFA", "NFA", "RFA", "F1", "F1_RFA", "mIoU"):
            ours = results.measured(table, "EC2Face", metric)
            real = results.measured(table, "real", metric)
            if ours and real:
                share = f"{100 * ours.value / real.value:.0f} %"
                cells = [faces, metric, interval(ours, sign=False), f"{real.value:.1f}", share]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _leads(results: Results) -> list[str]:
    """EC²Face minus each comparison system on the test faces, beside the paper's difference."""
    metrics = ("Text", "OAA", "RFA")
    by_metric = {metric: leads(results, "table1_lead", metric) for metric in metrics}
    if not by_metric["OAA"]:
        return ["", "No system has pictures or weights here."]
    paper = paper_table(1).pivot(index="method", columns="metric", values="value")
    lines = SYSTEMS.rstrip("\n").splitlines()
    for system in by_metric["OAA"]:
        cells = []
        for metric in metrics:
            lead = by_metric[metric][system]
            parts = [_named(name, cell) for name, cell in lead.cells.items()]
            if system in paper.index:
                gap = paper[metric]["EC2Face"] - paper[metric][system]
                parts.append(f"paper {gap:+.2f}")
            cells.append(f"{', '.join(parts)}: {lead.verdict}")
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return lines


def _named(metric: str, cell: Measured) -> str:
    return f"F1 {interval(cell)}" if metric.startswith("F1") else interval(cell)


def _questions(results: Results) -> list[str]:
    """Questions that the paper leaves open, and the answers of this profile, as sentences."""
    table = "ablation_differences"
    evaluators, guides = (
        results.measured(table, "both - none", "OAA", role).value
        for role in ("independent", "guiding")
    )
    edits = common_accuracy(results.table("hand_drawn"))
    worst = edits.idxmin()
    foreign, known = (
        results.measured(name, "EC2Face", "OAA").value for name in ("table2", "table1")
    )
    answers = {
        "The parser is both loss and metric. Is its gain real?": (
            f"A second parser measures a gain in OAA of {evaluators:+.2f} by both losses, the "
            f"guiding one {guides:+.2f}."
        ),
        "What do masks cost that are drawn by hand?": (
            f"Over the classes that every edit keeps, accuracy is {edits['as parsed']:.1f} with "
            f"masks as parsed, and falls to {edits[worst]:.1f} at worst ({worst})."
        ),
        "Does it work on faces and words of another data set?": (
            f"OAA is {foreign:.1f} on the zero-shot faces and {known:.1f} on the test faces. The "
            "LoRA never saw such faces; the base and the perception models may have seen them."
        ),
    }
    rows, _ = kept_sweeps(results.config)
    answers |= {question: sweep_answer(rows, sweep) for sweep, question in SWEPT.items()}
    lines = [
        "",
        "The answers from sweeps are exploratory: each point is one training, scored on",
        "validation faces. They name the settings whose intervals do not contain 0 and whose",
        "differences exceed those between other seeds.",
        "",
        "| question | answer here |",
        "|---|---|",
    ]
    return lines + [f"| {question} | {answer} |" for question, answer in answers.items()]


def sweep_answer(rows: DataFrame, sweep: str) -> str:
    """What a sweep found, in sentences: one for each metric that a setting moves."""
    differences, noise, labels, reference = compared(rows, sweep)
    if differences.empty:
        return "This is not trained here: `make reproduce SWEEPS=1` trains it."
    sentences = []
    for metric in METRICS:
        low, high = noise_band(noise, metric)
        table = differences[differences["metric"] == metric].set_index("method")
        parts = []
        for name, label in labels.items():
            value = table["value"][name]
            clear = table["ci_low"][name] > 0 or table["ci_high"][name] < 0
            if clear and not low <= value <= high:
                parts.append(f"{value:+.1f} with “{label}”")
        if parts:
            sentences.append(f"{metric} changes by {_listed(parts)}.")
    if not sentences:
        return f"No setting differs from “{reference}”."
    return f"Against “{reference}”, {' '.join(sentences)}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _class(name: str) -> str:
    return display_name(CLASS_ID[name])
