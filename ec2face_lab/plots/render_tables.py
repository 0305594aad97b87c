"""Tables in Markdown and LaTeX from long rows: our cells with intervals beside the paper's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import isnan
from typing import TYPE_CHECKING

from ec2face_core.attributes import CLASSES, GROUPS, display_name

if TYPE_CHECKING:
    from pandas import DataFrame


Interval = Callable[[float, float, int], str]  # low, high, digits -> text

SMALL = "\x0e"  # stands for the markup of small print until the text around it is escaped
END = "\x0f"

LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "²": r"$^2$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "α": r"$\alpha$", "β": r"$\beta$",
    "<": r"\textless{}", ">": r"\textgreater{}", SMALL: r"{\tiny", END: "}",
})  # fmt: skip

CRITICS = ("independent", "guiding")  # values of the column critic: evaluators, guides

# metric -> heading; percent unless it is LPIPS or NIQE
METRICS = {
    "Text": "Text (%) ↑", "OAA": "OAA (%) ↑", "HFA": "HFA (%) ↑", "NFA": "NFA (%) ↑",
    "RFA": "RFA (%) ↑", "LPIPS": "LPIPS ↓", "NIQE": "NIQE ↓",
}  # fmt: skip

# Every method in the order in which the tables print it.
METHODS = {
    "TediGAN": "TediGAN", "UaC": "UaC", "PixelFace+": "PixelFace+", "CoDiffusion": "CoDiffusion",
    "ControlNeXt": "ControlNeXt", "MM2Latent": "MM2Latent",
    "Face-MoGLE": "Face-MoGLE (not in the paper)", "MDiTFace": "MDiTFace (not in the paper)",
    "EC2Face": "EC²Face (ours)",
    "without_ltal": "without LTAL", "with_ltal": "with LTAL",
    "none": "no consistency loss", "mask": "L_mask only", "text": "L_text only",
    "both": "L_text and L_mask", "real": "real images (ceiling)",
    "vae_round_trip": "autoencoder round trip (ceiling)",
}  # fmt: skip

FOOTNOTES = {
    "table4": "The paper prints RFA 61.62 in the first row; its OAA and its Table 3 require 61.12.",
}


def render_markdown(rows: DataFrame, caption: str = "") -> str:
    """Long rows -> Markdown: methods are rows, metrics are columns, the paper's at the right."""
    blocks = [f"**{_title(rows)}.** {caption}".strip()]
    for header, body in _layouts(rows, _interval, markdown_name):
        rule = [":---" if heading in ("Critic", "Group") else "---:" for heading in header[1:]]
        lines = [header, ["---", *rule], *body]
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join([*blocks, *_notes(rows)]) + "\n"


def render_latex(rows: DataFrame, caption: str = "") -> str:
    """Long rows -> a LaTeX `table` with booktabs rules, the same layout as the Markdown."""
    blocks = []
    for header, body in _layouts(rows, _interval_latex, _plain_name):
        lines = [" & ".join(map(_latex, header)), r"\midrule"]
        lines += [" & ".join(map(_latex, line)) for line in body]
        lines = [line if line.startswith("\\midrule") else line + r" \\" for line in lines]
        inside = "\n".join([r"\toprule", *lines, r"\bottomrule"])
        blocks.append(
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n{inside}\n\\end{{tabular}}"
        )
    text = _latex(" ".join([caption, *_notes(rows)]).strip())
    body = "\n\n\\medskip\n".join(blocks)
    label = rows["table"].iloc[0]
    return (
        "\\begin{table}\n\\centering\\scriptsize\n"
        f"\\caption{{{text}}}\\label{{tab:{label}}}\n{body}\n\\end{{table}}\n"
    )


def markdown_name(method: str) -> str:
    """How Markdown prints a method; what is no name of ours, such as a folder's, is escaped."""
    return METHODS.get(method) or re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", method)


def _plain_name(method: str) -> str:
    return METHODS.get(method, method)


def _layouts(
    rows: DataFrame, interval: Interval, name: Callable[[str], str]
) -> list[tuple[list[str], list[list[str]]]]:
    """(header, lines) of the main table and, where classes were scored, of the class table."""
    main = rows[rows["metric"].isin(METRICS)]
    classes = rows[rows["metric"].isin(CLASSES) & (rows["source"] == "ours")]
    layouts = [_main_layout(main, interval, name)] if len(main) else []
    for critic in CRITICS:
        scores = classes[classes["critic"] == critic]
        if len(scores):
            layouts.append(_class_layout(scores, critic, interval, name))
    return layouts


def _main_layout(
    rows: DataFrame, interval: Interval, name: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    """Rows: methods and their perception models; columns: n, our metrics, the paper's metrics."""
    metrics = [metric for metric in METRICS if (rows["metric"] == metric).any()]
    paper = rows[rows["source"] == "paper"].set_index(["method", "metric"])["value"]
    ours = rows[rows["source"] == "ours"]
    header = ["Method", "Critic", "n", *[METRICS[m] for m in metrics]]
    if len(paper):
        header += [f"paper: {m}" for m in metrics]
    lines = []
    for method in _in_order(rows["method"].unique()):
        scores = ours[ours["method"] == method]
        critics = [c for c in CRITICS if (scores["critic"] == c).any()] or [""]
        for critic in critics:
            first = critic == critics[0]
            shown = scores["critic"].eq(critic)
            if first:  # metrics without a perception model (LPIPS, NIQE) are in the first line
                shown |= ~scores["critic"].isin(CRITICS)
            cells = scores[shown].set_index("metric")
            line = [name(method) if first else "", critic or "–"]
            line.append(_count(cells["n"].max()) if len(cells) else "–")
            line += [_cell(cells, m, interval) for m in metrics]
            for m in metrics if len(paper) else ():
                line.append(f"{paper[method, m]:.2f}" if first and (method, m) in paper else "")
            lines.append(line)
    return header, lines


def _class_layout(
    rows: DataFrame, critic: str, interval: Interval, name: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    """Rows: classes; columns: methods. n is the number of images that contain the class."""
    methods = _in_order(rows["method"].unique())
    by_method = {m: rows[rows["method"] == m].set_index("metric") for m in methods}
    group = {i: name for name, ids in GROUPS.items() for i in ids}
    header = [f"Class (%, {critic})", "Group", "n", *[name(m) for m in methods]]
    lines = []
    for i, metric in enumerate(CLASSES):
        scores = rows[rows["metric"] == metric]
        if scores.empty:
            continue
        cells = [_cell(by_method[m], metric, interval) for m in methods]
        lines.append([display_name(i), group[i], _count(scores["n"].max()), *cells])
    return header, lines


def _cell(rows: DataFrame, metric: str, interval: Interval) -> str:
    """`85.13 [84.20, 86.01]`, or – where nothing was measured."""
    if metric not in rows.index or isnan(rows.loc[metric, "value"]):
        return "–"
    row = rows.loc[metric]
    digits = 3 if metric == "LPIPS" else 2
    value = f"{row['value']:.{digits}f}"
    unknown = isnan(row["ci_low"]) or isnan(row["ci_high"])
    return value if unknown else value + interval(row["ci_low"], row["ci_high"], digits)


def _interval(low: float, high: float, digits: int) -> str:
    return f" [{low:.{digits}f}, {high:.{digits}f}]"


def _interval_latex(low: float, high: float, digits: int) -> str:
    return f" {SMALL}[{low:.{digits}f}, {high:.{digits}f}]{END}"


def _count(n: float) -> str:
    return "–" if isnan(n) else f"{n:,.0f}"


def _in_order(methods: Iterable[str]) -> list[str]:
    known = list(METHODS)
    return sorted(methods, key=lambda m: known.index(m) if m in known else len(known))


def _title(rows: DataFrame) -> str:
    name = rows["table"].iloc[0]
    return f"Table {name[5:]}" if name[5:].isdigit() else name.replace("_", " ").capitalize()


def _notes(rows: DataFrame) -> list[str]:
    """Footnotes: intervals, seeds, misprints."""
    ours = rows[rows["source"] == "ours"]
    seeds = sorted({str(s) for s in ours["seeds"] if s})
    notes = ["Brackets: 95 % interval; – : not measured here."] if len(ours) else []
    notes += [f"Seeds: {', '.join(seeds)}."] if seeds else []
    notes += ["Paper: the numbers it reports, at its own scale."] if len(ours) < len(rows) else []
    return notes + [FOOTNOTES[t] for t in rows["table"].unique()[:1] if t in FOOTNOTES]


def _latex(text: str) -> str:
    """Escape every character that LaTeX reads as markup, and set intervals in small print."""
    return text.translate(LATEX)
