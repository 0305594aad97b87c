"""Tables in Markdown and LaTeX from long rows.

The first table has one value a cell, with the digits that its interval allows; the paper's numbers,
the intervals, the guiding models' scores and the classes follow in tables of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import ceil, isfinite, isnan, log10
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from ec2face_core.attributes import CLASSES, GROUPS, display_name

if TYPE_CHECKING:
    from pandas import DataFrame, Series


LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "²": r"$^2$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "α": r"$\alpha$", "β": r"$\beta$",
    "†": r"$\dagger$", "<": r"\textless{}", ">": r"\textgreater{}",
})  # fmt: skip

MISSING = "–"
GUIDES = "Scored by the guiding models, which training optimises."

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

PRESENCE = {
    "presence_": "where the mask has it (%)",
    "false_presence_": "where it has none (%)",
}

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

TITLES = {
    "table1": "EC²Face and the comparison systems are scored on the test faces.",
    "table2": "EC²Face and the comparison systems are scored on the zero-shot faces.",
    "table3": "Long-tail adaptive learning is switched off and on.",
    "table4": "The consistency losses are switched on one by one.",
    "table1_lead": "EC²Face minus each system, on the same test faces.",
    "table2_lead": "EC²Face minus each system, on the same zero-shot faces.",
    "ablation_differences": "Variants differ in one part; differences are paired by face.",
    "ablation_seeds": "Variants differ in one part; each training stands alone.",
    "hand_drawn": "EC²Face is given masks that were edited as if drawn by hand.",
    "presence": "The parser counts the pictures of each system with an accessory.",
    "presence_ltal": "The parser counts the pictures with an accessory, without and with LTAL.",
}

FOOTNOTES = {
    "hand_drawn": "An edit may remove a class from every mask. OAA and RFA are then means over "
    "fewer classes; REPORT.md compares the classes that every edit keeps.",
    "table4": "The paper prints RFA 61.62 in the first row; its OAA and its Table 3 require 61.12.",
}


class Block(NamedTuple):
    """One of the tables that show some rows."""

    title: str
    header: list[str]
    lines: list[list[str]]


def render_markdown(rows: DataFrame, caption: str = "") -> str:
    """Long rows -> Markdown: methods are rows, metrics are columns."""
    parts = [f"{_title(rows)} {caption}".strip()]
    for block in _blocks(rows, markdown_name):
        rule = [":---" if heading == "Group" else "---:" for heading in block.header[1:]]
        lines = [block.header, ["---", *rule], *block.lines]
        parts += [block.title] if block.title else []
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join([*parts, *_notes(rows)]) + "\n"


def render_latex(rows: DataFrame, caption: str = "") -> str:
    """Long rows -> a LaTeX `table` with booktabs rules, the same layout as the Markdown."""
    parts = []
    for block in _blocks(rows, _plain_name):
        lines = [" & ".join(map(_latex, block.header)), r"\midrule"]
        lines += [" & ".join(map(_latex, line)) for line in block.lines]
        lines = [line if line.startswith("\\midrule") else line + r" \\" for line in lines]
        inside = "\n".join([r"\toprule", *lines, r"\bottomrule"])
        columns = f"l{'r' * (len(block.header) - 1)}"
        title = f"{_latex(block.title)}\\\\[2pt]\n" if block.title else ""
        parts.append(f"{title}\\begin{{tabular}}{{{columns}}}\n{inside}\n\\end{{tabular}}")
    text = _latex(" ".join([_sentence(rows), caption, *_notes(rows)]).strip())
    body = "\n\n\\medskip\n".join(parts)
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


def decimals(half_width: float, digits: int = 2) -> int:
    """Decimals that show an interval's half width with so many significant digits, 0 to 5."""
    if not isfinite(half_width) or half_width <= 0:
        return 2
    return min(5, max(0, digits - ceil(log10(half_width) + 1e-9)))


# ------------------------------------------------------------------------------------------ blocks


def _blocks(rows: DataFrame, name: Callable[[str], str]) -> list[Block]:
    """All tables of some rows: values, the paper's, intervals, the guides' values, classes."""
    ours = rows[rows["source"] == "ours"]
    shown = ours[ours["critic"] != "guiding"]
    guides = ours[ours["critic"] == "guiding"]
    presence = _presence_headings(rows)
    blocks = [
        _value_block("", shown, METRICS, name),
        _paper_block(rows[rows["source"] == "paper"], name),
        _value_block("Further scores.", shown, MORE, name),
        _value_block("", shown, EDITS, name),
        _value_block("How often a class is found.", shown, presence, name),
        _interval_block("95 % intervals of the first table.", shown, METRICS, name),
        _interval_block("95 % intervals of the further scores.", shown, MORE, name),
        _interval_block("95 % intervals.", shown, EDITS, name),
        _interval_block("95 % intervals of these shares.", shown, presence, name),
        _value_block(GUIDES, guides, METRICS | presence, name),
        _class_block("Recall of each class in percent.", shown, name),
        _class_block("Recall of each class in percent, scored by the guide.", guides, name),
    ]
    return [block for block in blocks if block]


def _presence_headings(rows: DataFrame) -> dict[str, str]:
    """Metric -> heading of the shares of pictures in which a class is found, class by class."""
    present = set(rows["metric"])
    return {
        f"{start}{name}": f"{display_name(i)} {words}"
        for i, name in enumerate(CLASSES)
        for start, words in PRESENCE.items()
        if f"{start}{name}" in present
    }


def _cells(rows: DataFrame, metrics: Iterable[str]) -> dict[str, dict[str, Series]]:
    """Metric -> method -> its row, of the metrics that any method has."""
    found = {}
    for metric in metrics:
        scores = rows[rows["metric"] == metric]
        if len(scores):
            found[metric] = {row["method"]: row for _, row in scores.iterrows()}
    return found


def _value_block(
    title: str, rows: DataFrame, headings: Mapping[str, str], name: Callable[[str], str]
) -> Block | None:
    """Methods down, metrics across, one value a cell; the last line counts the images."""
    cells = _cells(rows, headings)
    if not cells:
        return None
    lines = []
    places = {m: _places(column.values(), "%" in headings[m]) for m, column in cells.items()}
    for method in _in_order(rows["method"].unique()):
        line = [_value(column.get(method), places[metric]) for metric, column in cells.items()]
        if set(line) != {MISSING}:
            lines.append([name(method), *line])
    lines.append(["n", *(_counts(column.values()) for column in cells.values())])
    return Block(title, ["Method", *(headings[metric] for metric in cells)], lines)


def _paper_block(rows: DataFrame, name: Callable[[str], str]) -> Block | None:
    """The numbers that the paper prints."""
    cells = _cells(rows, METRICS)
    if not cells:
        return None
    lines = []
    for method in _in_order(rows["method"].unique()):
        values = [column.get(method) for column in cells.values()]
        line = [MISSING if row is None else f"{row['value']:.2f}" for row in values]
        lines.append([name(method), *line])
    return Block(
        "The paper's numbers, at its own scale.", ["Method", *map(METRICS.get, cells)], lines
    )


def _interval_block(
    title: str, rows: DataFrame, headings: Mapping[str, str], name: Callable[[str], str]
) -> Block | None:
    """Methods down, metrics across: the bounds of each value."""
    cells = _cells(rows[rows["ci_low"].notna()], headings)
    if not cells:
        return None
    lines = []
    for method in _in_order(rows["method"].unique()):
        line = [_interval(column.get(method)) for column in cells.values()]
        if set(line) != {MISSING}:
            lines.append([name(method), *line])
    return Block(title, ["Method", *(headings[metric] for metric in cells)], lines)


def _class_block(title: str, rows: DataFrame, name: Callable[[str], str]) -> Block | None:
    """Classes down, methods across. n is the number of images that contain the class."""
    cells = _cells(rows, CLASSES)
    if not cells:
        return None
    methods = _in_order(rows[rows["metric"].isin(CLASSES)]["method"].unique())
    group = {i: name for name, ids in GROUPS.items() for i in ids}
    lines = []
    for i, metric in enumerate(CLASSES):
        if metric in cells:
            column = cells[metric]
            values = [_value(column.get(method), 1) for method in methods]
            lines.append([display_name(i), group[i], _counts(column.values()), *values])
    return Block(title, ["Class", "Group", "n", *(name(m) for m in methods)], lines)


# ------------------------------------------------------------------------------------------- cells


def _bounds(row: Series) -> tuple[float, float]:
    """The interval to show: over faces and trainings where that is known."""
    if isnan(row["joint_low"]) or isnan(row["joint_high"]):
        return row["ci_low"], row["ci_high"]
    return row["joint_low"], row["joint_high"]


def _half_width(row: Series) -> float:
    low, high = _bounds(row)
    return (high - low) / 2


def _is_difference(row: Series) -> bool:
    return " - " in row["method"]


def _places(rows: Iterable[Series], in_percent: bool) -> int:
    """Decimals of a column: two significant digits of its usual interval; of percents, one."""
    widths = [width for row in rows if (width := _half_width(row)) > 0]
    places = decimals(median(widths)) if widths else 2
    return min(places, 1) if in_percent else places


def _value(row: Series | None, places: int) -> str:
    """`85.1`, `-0.12` for a difference, or – where nothing was measured; † as the notes say."""
    if row is None or isnan(row["value"]):
        return MISSING
    mark = " †" if row["p_holm"] < SIGNIFICANT else ""
    if _is_difference(row):
        return f"{row['value']:+.{decimals(_half_width(row))}f}{mark}"
    return f"{row['value']:.{places}f}{mark}"


def _interval(row: Series | None) -> str:
    if row is None or isnan(_half_width(row)):
        return MISSING
    places = decimals(_half_width(row))
    low, high = _bounds(row)
    return f"[{low:.{places}f}, {high:.{places}f}]"


def _counts(rows: Iterable[Series]) -> str:
    """How many images the values of a column rest on: `300`, or `17-20` where methods differ."""
    known = sorted({int(row["n"]) for row in rows if not isnan(row["n"])})
    if not known:
        return MISSING
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,}-{known[-1]:,}"


def _in_order(methods: Iterable[str]) -> list[str]:
    known = list(METHODS)
    return sorted(methods, key=lambda m: known.index(m) if m in known else len(known))


def _title(rows: DataFrame) -> str:
    """`**Table 1.** EC²Face and ...`: the number, if it has one, and what the table shows."""
    name = rows["table"].iloc[0]
    number = f"**Table {name[5:]}.** " if name[5:].isdigit() else ""
    return f"{number}{_sentence(rows)}"


def _sentence(rows: DataFrame) -> str:
    return TITLES.get(rows["table"].iloc[0], "")


def _notes(rows: DataFrame) -> list[str]:
    """Footnotes: intervals, seeds, misprints."""
    ours = rows[rows["source"] == "ours"]
    seeds = sorted({str(s) for s in ours["seeds"] if s})
    notes = []
    if len(ours):
        notes.append(
            f"The intervals are {_covers(ours)}; n counts the images that a value rests on; "
            f"{MISSING} was not measured here. The CSV has every interval."
        )
    if ours["metric"].str.startswith(tuple(PRESENCE)).any():
        notes.append("The intervals of shares take the pictures as independent.")
    if ours["p_holm"].notna().any():
        notes.append(
            "†: a claim of this table that holds after Holm's adjustment over all of them, for "
            "attributes one in recall and F1 together."
        )
    notes += [f"Seeds: {', '.join(seeds)}."] if seeds else []
    return notes + [FOOTNOTES[t] for t in rows["table"].unique()[:1] if t in FOOTNOTES]


def _covers(rows: DataFrame) -> str:
    """What the intervals of the rows are over."""
    joint = rows["joint_low"].notna()
    alone = rows["ci_low"].notna() & ~joint
    if not joint.any():
        return "over faces, with the trainings held fixed"
    rest = ", or over faces alone where there is one training" if alone.any() else ""
    return f"over faces and trainings{rest}"


def _latex(text: str) -> str:
    """Escape every character that LaTeX reads as markup."""
    return text.translate(LATEX)
