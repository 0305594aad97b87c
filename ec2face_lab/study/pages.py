"""The numbers in README and docs: marked parts, made from the published tables.

A page marks a part with `<!-- numbers: NAME -->` and `<!-- end of numbers -->`. `publish` writes
these parts anew, and a test holds every page against the published tables, so no number there is
typed by hand.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ec2face_core.config import Config
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import whole_file

from ..baselines import NEWER, PAPER
from ..painter.stamps import STAMPS
from ..plots.render_tables import METHODS, METRICS
from ..plots.save import paper_table
from .claims import CLAIMS, judged, leads
from .comparison import MINUS
from .editing import ANEW, EDITED, WORN
from .fairness import MARKS, kept_fairness
from .summary import cell_of
from .verdicts import EVALUATORS, HOLDS, Measured, Results, interval

SHOWN = "mini"  # profile of the pages' numbers
DOCS = ROOT / "docs"
GALLERY = DOCS / "gallery"  # of the profile that the pages show
MANIFEST = "manifest.json"
PAGES = ("README.md", "docs/results.md", "docs/painter.md")
LATENCIES = ROOT / "benchmarks" / "painter.csv"
PART = re.compile(r"(<!-- numbers: ([\w-]+) -->\n)(.*?)(<!-- end of numbers -->)", re.DOTALL)

SHOWN_CLAIMS = (
    "ltal-rare", "ltal-normal", "ltal-frequent", "mask-loss", "text-loss",
    "lead-overall", "lead-rare",
)  # fmt: skip
SHOWN_METRICS = ("Text", "OAA", "RFA", "F1", "NIQE")


def update(page: Path, config: Config) -> None:
    """Write the marked parts of a page anew."""
    text = filled(page.read_text(), config)
    with whole_file(page) as part:
        part.write_text(text)


def filled(text: str, config: Config) -> str:
    """A page with its marked parts made from the published tables of a profile.

    Raises:
        ValueError: a mark names no part that is known.
    """
    results = Results(config, config.published_dir)

    def part(match: re.Match) -> str:
        name = match[2]
        if name not in PARTS:
            raise ValueError(f"no numbers are called {name!r}; known: {', '.join(PARTS)}")
        return f"{match[1]}\n{PARTS[name](results)}\n\n{match[4]}"

    return PART.sub(part, text)


# ------------------------------------------------------------------------------------------- parts


def notebooks(results: Results) -> str:
    """Every notebook: its title, which leads to the executed copy once published, what it makes."""
    import nbformat

    rows = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        title = cells[0].source.splitlines()[0].rpartition("·")[2].strip("# ")
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        saved = dict.fromkeys(re.findall(r"save_\w+\([^()]*?\"((?:fig|table)\d)\"", code))
        makes = sorted(re.sub(r"(fig|table)(\d)", _numbered, name) for name in saved)
        page = GALLERY / f"{path.stem}.md"
        if page.is_file():
            title = f"[{title}]({page.relative_to(ROOT).as_posix()})"
        rows.append((f"[{path.stem}](notebooks/{path.name})", title, ", ".join(makes)))
    return markdown(("notebook", "executed copy", "makes"), rows, "lll")


def _numbered(match: re.Match) -> str:
    return f"{'Fig.' if match[1] == 'fig' else 'Table'} {match[2]}"


def main_claims(results: Results) -> str:
    """The claims that README shows: the paper's number, ours, the verdict."""
    answers = judged(results)
    claims = {claim.key: claim for claim in CLAIMS}
    rows = [(claims[key].statement, claims[key].paper, *answers[key]) for key in SHOWN_CLAIMS]
    return markdown(("claim of the paper", "paper", "here", "verdict"), rows, "lrll")


def scores(results: Results) -> str:
    """README's table: the paper's systems, EC²Face and real images in five metrics."""
    methods = [*PAPER, "EC2Face", "real"]
    rows = [_scores(results, "table1", method, SHOWN_METRICS) for method in methods]
    return markdown(("", *(METRICS[m] for m in SHOWN_METRICS)), rows)


def scores_beside_the_paper(results: Results) -> str:
    """Every system and ceiling with ± half its interval, beside the paper's numbers."""
    metrics = ("Text", "OAA", "HFA", "NFA", "RFA", "F1", "F1_RFA", "mIoU", "NIQE")
    printed = ("Text", "OAA", "RFA")
    paper = paper_table(1).pivot(index="method", columns="metric", values="value")
    methods = [*PAPER, *NEWER, "EC2Face", "real", "vae_round_trip"]
    rows = []
    for method in methods:
        theirs = [
            f"{paper[metric][method]:.1f}" if method in paper.index else "" for metric in printed
        ]
        rows.append((*_scores(results, "table1", method, metrics, widths=True), *theirs))
    names = METRICS | {"F1_RFA": "F1 of RFA (%) ↑"}
    header = ("", *(names[m] for m in metrics), *(f"paper: {m}" for m in printed))
    return markdown(header, rows)


def zero_shot(results: Results) -> str:
    """The same systems on the zero-shot faces."""
    methods = [*PAPER, "EC2Face", "real"]
    rows = [_scores(results, "table2", method, SHOWN_METRICS) for method in methods]
    return markdown(("", *(METRICS[m] for m in SHOWN_METRICS)), rows)


def newer_systems(results: Results) -> str:
    """EC²Face minus the two systems on its own base."""
    metrics = ("Text", "OAA", "HFA", "RFA")
    rows = []
    for system in NEWER:
        cells = []
        for metric in metrics:
            lead = leads(results, "table1_lead", metric).get(system)
            if lead:
                cells.append(", ".join(map(interval, lead.cells.values())))
        rows.append((system, *cells))
    names = [metric if metric == "Text" else f"{metric}, F1" for metric in metrics]
    return markdown(("EC²Face minus", *names), rows)


def long_tail(results: Results) -> str:
    """What long-tail learning changes for earrings and necklaces."""
    label = "with LTAL - without"
    names = {"ear_r": "earring", "neck_l": "necklace"}
    rows = []
    for name, shown in names.items():
        metrics = (name, *(f"{kind}_{name}" for kind in ("precision", "f1", "iou")))
        cells = [results.measured("ablation_differences", label, metric) for metric in metrics]
        rows.append((shown, *(interval(cell) for cell in cells if cell)))
    return markdown(("with minus without", "recall", "precision", "F1", "IoU"), rows)


def consistency(results: Results) -> str:
    """What the consistency losses change."""
    metrics = ("Text", "OAA", "RFA", "F1", "mIoU")
    labels = ("mask - none", "text - none", "both - none")
    rows = []
    for label in labels:
        cells = [results.measured("ablation_differences", label, metric) for metric in metrics]
        rows.append((label, *(interval(cell) for cell in cells if cell)))
    return markdown(("", *metrics), rows)


def fairness(results: Results) -> str:
    """EC²Face minus the systems ahead of it, trained otherwise, on validation faces."""
    kept = kept_fairness(results.config)
    if kept is None:
        return "The systems were not trained otherwise here."
    rows, _ = kept
    found = leads(results, "table1_lead", "OAA")
    ahead = [name for name in PAPER if name in found and found[name].verdict != HOLDS]
    metrics = ("OAA", "RFA")
    lines = []
    for way, (words, *_) in MARKS.items():
        cells = []
        for system in ahead:
            for metric in metrics:
                row = cell_of(rows, f"{MINUS.format(system)}, {way}", metric, EVALUATORS)
                bounds = None if row is None else (row["value"], row["ci_low"], row["ci_high"])
                cells.append("–" if bounds is None else interval(Measured(*bounds)))
        lines.append((words, *cells))
    header = ("EC²Face minus", *(f"{system}: {metric}" for system in ahead for metric in metrics))
    return markdown(header, lines)


def edits(results: Results) -> str:
    """What edits through the mask keep and add, for each stamp."""
    if results.table("edits") is None:
        return "Edits were not measured here."
    both = (EDITED, ANEW)
    wanted = {"PSNR_copy": both, "F1_added": (*both, WORN), "Identity": both}
    names = {"PSNR_copy": "PSNR", "F1_added": "F1", "Identity": "distance", WORN: "worn"}
    rows = []
    for stamp in STAMPS:
        line = [stamp]
        for metric, kinds in wanted.items():
            for kind in kinds:
                cell = results.measured("edits", f"{stamp}: {kind}", metric)
                line.append("–" if cell is None else interval(cell, sign=False))
        rows.append(line)
    header = [
        f"{names[m]}, {names.get(kind, kind)}" for m, kinds in wanted.items() for kind in kinds
    ]
    return markdown(("", *header), rows)


def latencies(results: Results) -> str:
    """How fast the painter was, as `benchmarks/painter.py` measured it."""
    with LATENCIES.open(newline="") as file:
        rows = [(row["what"], f"{row['value']} {row['unit']}") for row in csv.DictReader(file)]
    return markdown(("", "measured"), rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], alignment: str = "") -> str:
    """A Markdown table; alignment: `l` or `r` for each column, by default numbers to the right."""
    alignment = alignment or "l" + "r" * (len(header) - 1)
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])


def _scores(
    results: Results, table: str, method: str, metrics: Sequence[str], widths: bool = False
) -> tuple[str, ...]:
    """A method's name and its scores, with ± half the interval if `widths`."""
    cells = []
    for metric in metrics:
        cell = results.measured(table, method, metric)
        if cell is None:
            cells.append("–")
            continue
        half = (cell.high - cell.low) / 2
        shown = f"{cell.value:.1f}"
        cells.append(f"{shown} ±{half:.1f}" if widths else shown)
    name = METHODS[method]
    return (f"**{name}**" if method == "EC2Face" else name, *cells)


PARTS: Mapping[str, Callable[[Results], str]] = {
    "notebooks": notebooks,
    "main-claims": main_claims,
    "scores": scores,
    "scores-beside-the-paper": scores_beside_the_paper,
    "zero-shot": zero_shot,
    "newer-systems": newer_systems,
    "long-tail": long_tail,
    "consistency": consistency,
    "fairness": fairness,
    "edits": edits,
    "latencies": latencies,
}
