"""Tables in Markdown and LaTeX from long rows: our cells with intervals beside the paper's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import isnan
from typing import TYPE_CHECKING

from ec2face_core.attributes import CLASSES, GROUPS, display_name

if TYPE_CHECKING:
    from pandas import DataFrame, Series


Interval = Callable[[float, float, int], str]  # low, high, digits -> text

SMALL = "\x0e"  # stands for the markup of small print until the text around it is escaped
END = "\x0f"

LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "²": r"$^2$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "α": r"$\alpha$", "β": r"$\beta$",
    "†": r"$\dagger$", "<": r"\textless{}", ">": r"\textgreater{}", SMALL: r"{\tiny", END: "}",
})  # fmt: skip

CRITICS = ("independent", "guiding")  # values of the column critic: evaluators, guides

# metric -> heading. OAA ... RFA are recall, the paper's accuracy; KID and CMMD are in thousandths.
METRICS = {
    "Text": "Text (%) ↑", "OAA": "OAA (%) ↑", "HFA": "HFA (%) ↑", "NFA": "NFA (%) ↑",
    "RFA": "RFA (%) ↑", "F1": "F1 (%) ↑", "mIoU": "mIoU (%) ↑", "LPIPS": "LPIPS ↓",
    "NIQE": "NIQE ↓",
}  # fmt: skip

# The second block of a table.
MORE = {
    "F1_HFA": "F1 of HFA (%) ↑", "F1_NFA": "F1 of NFA (%) ↑", "F1_RFA": "F1 of RFA (%) ↑",
    "Facts": "Facts (%) ↑", "KID": "KID ↓", "CMMD": "CMMD ↓", "Diversity": "Diversity",
}  # fmt: skip

# Pictures that were edited through their masks: what should stay, what was added, who it is.
EDITS = {
    "PSNR_copy": "PSNR to the round trip (dB) ↑", "PSNR_photo": "PSNR to the photo (dB) ↑",
    "F1_added": "F1 of what was added (%) ↑", "Identity": "Distance of features ↓",
}  # fmt: skip

PRESENCE = {"presence_": "found where the mask has it (%)",
            "false_presence_": "found where it has none (%)"}  # fmt: skip

SIGNIFICANT = 0.05

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
    classes = rows[rows["metric"].isin(CLASSES) & (rows["source"] == "ours")]
    layouts = []
    for headings in (METRICS, MORE, EDITS, _presence_headings(rows)):
        shown = rows[rows["metric"].isin(headings)]
        if len(shown):
            layouts.append(_main_layout(shown, headings, interval, name))
    for critic in CRITICS:
        scores = classes[classes["critic"] == critic]
        if len(scores):
            layouts.append(_class_layout(scores, critic, interval, name))
    return layouts


def _presence_headings(rows: DataFrame) -> dict[str, str]:
    """Metric -> heading of the shares of pictures in which a class is found, class by class."""
    present = set(rows["metric"])
    return {
        f"{start}{name}": f"{display_name(i)} {words}"
        for i, name in enumerate(CLASSES)
        for start, words in PRESENCE.items()
        if f"{start}{name}" in present
    }


def _main_layout(
    rows: DataFrame,
    headings: Mapping[str, str],
    interval: Interval,
    name: Callable[[str], str],
) -> tuple[list[str], list[list[str]]]:
    """Rows: methods and their perception models; columns: n, our metrics, the paper's metrics."""
    ours = rows[rows["source"] == "ours"]
    metrics = [metric for metric in headings if (ours["metric"] == metric).any()]
    paper = rows[rows["source"] == "paper"].set_index(["method", "metric"])["value"]
    printed = [m for m in headings if m in paper.index.get_level_values("metric")]
    header = ["Method", "Critic", "n", *[headings[m] for m in metrics]]
    header += [f"paper: {m}" for m in printed]
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
            for m in printed:
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
    """`85.13 [84.20, 86.01]`, or – where nothing was measured; † as the notes say."""
    if metric not in rows.index or isnan(rows.loc[metric, "value"]):
        return "–"
    row = rows.loc[metric]
    digits = 3 if metric in ("LPIPS", "Diversity") else 2
    value = f"{row['value']:.{digits}f}"
    if metric.startswith(tuple(PRESENCE)):
        value += f" of {_count(row['n'])}"
    bounds = row[["joint_low", "joint_high"]] if _is_joint(row) else row[["ci_low", "ci_high"]]
    mark = " †" if row["p_holm"] < SIGNIFICANT else ""
    return value + ("" if bounds.isna().any() else interval(*bounds, digits)) + mark


def _is_joint(row: Series) -> bool:
    """Whether an interval over faces and trainings is known."""
    return not (isnan(row["joint_low"]) or isnan(row["joint_high"]))


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
    notes = []
    if len(ours):
        notes.append(f"Brackets: 95 % interval {_covers(ours)}; – : not measured here.")
    if ours["metric"].str.startswith(tuple(PRESENCE)).any():
        notes.append("Percent of n pictures, which these intervals take as independent.")
    if ours["p_holm"].notna().any():
        notes.append(
            "†: a claim of this table that holds after Holm's adjustment over all of them, for "
            "attributes one in recall and F1 together."
        )
    notes += [f"Seeds: {', '.join(seeds)}."] if seeds else []
    notes += ["Paper: the numbers it reports, at its own scale."] if len(ours) < len(rows) else []
    return notes + [FOOTNOTES[t] for t in rows["table"].unique()[:1] if t in FOOTNOTES]


def _covers(rows: DataFrame) -> str:
    """What the intervals of the rows are over."""
    joint = rows["joint_low"].notna()
    alone = rows["ci_low"].notna() & ~joint
    if not joint.any():
        return "over faces (trainings held fixed)"
    rest = ", or over faces alone where there is one training" if alone.any() else ""
    return f"over faces and trainings{rest}"


def _latex(text: str) -> str:
    """Escape every character that LaTeX reads as markup, and set intervals in small print."""
    return text.translate(LATEX)
