"""What is kept of a run: figures, tables, and the provenance beside them.

A figure is a PNG (200 dpi), a PDF and a JSON. A table's truth is a long CSV, one row a cell; its
Markdown and LaTeX are rendered from that CSV, with the paper's numbers beside ours. Everything is
byte-stable (the same numbers give the same bytes, so that git shows a change only where a result
changed) and written in one move (a reader never meets half a file). Commit, device and seconds
stand in the JSON alone, for the same reason.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attributes import CLASSES, GROUPS, display_name
from .config import ROOT, Config, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

COLUMNS = (
    "table", "method", "dataset", "metric", "source", "critic",
    "value", "ci_low", "ci_high", "n", "seeds",
)  # fmt: skip
CRITICS = ("independent", "guiding")
# metric -> heading; percent unless it is LPIPS or NIQE
METRICS = {
    "Text": "Text (%) ↑", "OAA": "OAA (%) ↑", "HFA": "HFA (%) ↑", "NFA": "NFA (%) ↑",
    "RFA": "RFA (%) ↑", "LPIPS": "LPIPS ↓", "NIQE": "NIQE ↓",
}  # fmt: skip
# Every method in the order in which the tables print it.
METHODS = {
    "TediGAN": "TediGAN", "UaC": "UaC", "PixelFace+": "PixelFace+", "CoDiffusion": "CoDiffusion",
    "ControlNeXt": "ControlNeXt", "MM2Latent": "MM2Latent", "EC2Face": "EC²Face (ours)",
    "without_ltal": "without LTAL", "with_ltal": "with LTAL",
    "none": "no consistency loss", "mask": "L_mask only", "text": "L_text only",
    "both": "L_text and L_mask", "real": "real images (ceiling)",
    "vae_round_trip": "autoencoder round trip (ceiling)",
}  # fmt: skip
FOOTNOTES = {
    "table4": "The paper prints RFA 61.62 in the first row; its OAA and its Table 3 require 61.12.",
}
PACKAGES = (
    "ec2face-core", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate",
    "open_clip_torch", "pyfacer", "lpips", "pyiqa", "numpy", "pandas", "matplotlib",
)  # fmt: skip
LARGE = 32 * 2**20  # bytes above which a file is known by size and time instead of its content


class ResultsError(ValueError):
    """Rows that make no table; the message names them."""


# ------------------------------------------------------------------------------ provenance


def path_digest(path: Path) -> str:
    """Sixteen hex digits of a file's content, or of every file under a folder ("absent" if none).

    Files above 32 MB count by size and modification time.
    """
    if not path.exists():
        return "absent"
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        stat = file.stat()
        content = f"{stat.st_size} {stat.st_mtime_ns}".encode()
        if stat.st_size <= LARGE:
            content = hashlib.sha256(file.read_bytes()).digest()
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        total.update(name.encode() + b"\0" + content)
    return total.hexdigest()[:16]


def provenance(
    config: Config,
    *,
    notebook: str | None = None,
    seconds: float | None = None,
    inputs: Iterable[str | Path] = (),
    **parameters: Any,
) -> dict[str, Any]:
    """What made a result, as JSON-ready values.

    Args:
        notebook: its name; default: what the runner or JupyterLab says it is.
        seconds: how long the computation took.
        inputs: files and folders that were read; each is recorded by name and content hash.
        parameters: whatever else shaped the result (the notebook's parameters, variants, ...).
    """
    commit, dirty = _git_state()
    asked = os.environ.get("EC2FACE_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME") or ""
    return {
        "notebook": notebook or Path(asked).name or None,
        "profile": config.profile,
        "seeds": {
            "run": config.seed, "data": config.data.seed, "sampling": config.sampling.seed,
        },
        "parameters": parameters,
        "commit": commit,
        "dirty": dirty,
        "config_hash": config.digest(),
        "inputs": {_relative(resolve(path)): path_digest(resolve(path)) for path in inputs},
        "packages": {"python": platform.python_version(), **_versions()},
        "device": _device(),
        "seconds": None if seconds is None else round(seconds, 2),
    }  # fmt: skip


def _git_state() -> tuple[str | None, bool | None]:
    """The commit, and whether anything but results differs from it; None outside a repository."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # A figure that was just saved must not make the next one look dirty.
    changed = git("status", "--porcelain", "--", ".", ":!figures")
    return git("rev-parse", "--verify", "HEAD"), None if changed is None else bool(changed)


def _relative(path: Path) -> str:
    """A path as results record it: below the repository root, else the bare name."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def _write(path: Path, content: bytes | str) -> None:
    """Write a file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def _write_provenance(path: Path, config: Config, details: Mapping[str, Any]) -> None:
    record = provenance(config, **details)
    _write(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")


# --------------------------------------------------------------------------------- figures


def save_figure(fig: Figure, name: str, config: Config, **details: Any) -> Path:
    """Write `<figure_dir>/<name>.png|.pdf|.json`; returns the PNG's path.

    The PNG's text chunks name the profile, the configuration and the notice that generated faces
    are synthetic. `details` are the keywords of `provenance`.
    """
    import matplotlib

    text = {
        "Title": name,
        "Source": f"EC2Face, profile {config.profile}, configuration {config.digest()}",
        "Disclaimer": "Every generated face in this figure is synthetic "
        f"(EC2Face on {config.backbone.path}, sampling seed {config.sampling.seed}).",
    }
    pdf_text = {"Title": name, "Subject": f"{text['Source']}. {text['Disclaimer']}"}
    target = config.figure_dir / f"{name}.png"
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for suffix, chunks in ((".png", text), (".pdf", pdf_text | {"CreationDate": None})):
            buffer = io.BytesIO()
            kind = {"format": suffix[1:], "metadata": chunks}
            fig.savefig(buffer, dpi=200, bbox_inches="tight", pad_inches=0.06, **kind)
            _write(target.with_suffix(suffix), buffer.getvalue())
    _write_provenance(target.with_suffix(".json"), config, details)
    return target


# ---------------------------------------------------------------------------------- tables


def read_rows(path: Path) -> DataFrame:
    """A long table from CSV, with the design's columns; a missing critic reads as ''."""
    import pandas as pd

    rows = pd.read_csv(path, dtype={"critic": str, "seeds": str})
    return rows.fillna({"critic": "", "seeds": ""})[list(COLUMNS)]


def paper_table(number: int) -> DataFrame:
    """Every cell of the paper's Table 1-4, as printed, in the long form (`source = paper`)."""
    return read_rows(ROOT / "data" / "paper" / f"table{number}.csv")


def save_table(
    rows: DataFrame, name: str, config: Config, *, caption: str = "", **details: Any
) -> Path:
    """Write `<figure_dir>/<name>.csv|.md|.tex|.json`; returns the Markdown's path.

    Args:
        rows: our cells in the long form; columns that are missing stay empty. For the names
            table1 ... table4 the paper's cells are added.
        caption: printed above the table; names every substitute metric or data set.
        details: the keywords of `provenance`.

    Raises:
        ResultsError: a column that is not in the long form, or two rows for one cell.
    """
    import pandas as pd

    if unknown := sorted(set(rows.columns) - set(COLUMNS)):
        raise ResultsError(f"{name}: unknown columns {unknown}; a long table has {list(COLUMNS)}")
    rows = rows.reindex(columns=COLUMNS).astype(object).assign(table=name)
    rows = rows.fillna({"source": "ours", "critic": "", "seeds": ""})
    if name in {"table1", "table2", "table3", "table4"}:
        rows = pd.concat([rows, paper_table(int(name[-1])).astype(object)])
    rows = rows.astype({"value": float, "ci_low": float, "ci_high": float, "n": "Int64"})
    cell = ["method", "metric", "source", "critic"]
    if (twice := rows[rows.duplicated(cell, keep=False)]).size:
        raise ResultsError(f"{name}: more than one row for a cell:\n{twice[cell].to_string()}")
    target = config.figure_dir / f"{name}.csv"
    _write(target, rows.to_csv(index=False, float_format="%.6g", lineterminator="\n"))

    rows = read_rows(target)
    _write(target.with_suffix(".md"), render_markdown(rows, caption))
    _write(target.with_suffix(".tex"), render_latex(rows, caption))
    _write_provenance(target.with_suffix(".json"), config, details)
    return target.with_suffix(".md")


def render_markdown(rows: DataFrame, caption: str = "") -> str:
    """Long rows -> Markdown: methods down, metrics across, ours left and the paper's right."""
    blocks = [f"**{_title(rows)}.** {caption}".strip()]
    for header, body in _layouts(rows, _interval):
        lines = [header, ["---", *[":---" if h in ("Critic", "Group") else "---:"
                                   for h in header[1:]]], *body]  # fmt: skip
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join([*blocks, *_notes(rows)]) + "\n"


def render_latex(rows: DataFrame, caption: str = "") -> str:
    """Long rows -> a LaTeX `table` with booktabs rules, the same layout as the Markdown."""
    blocks = []
    for header, body in _layouts(rows, _interval_latex):
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


def _layouts(
    rows: DataFrame, interval: Callable[[float, float, int], str]
) -> list[tuple[list[str], list[list[str]]]]:
    """(header, lines) of the main table and, where classes were scored, of the class table."""
    main = rows[rows["metric"].isin(METRICS)]
    classes = rows[rows["metric"].isin(CLASSES) & (rows["source"] == "ours")]
    made = [_main_layout(main, interval)] if len(main) else []
    for critic in CRITICS:
        if len(scored := classes[classes["critic"] == critic]):
            made.append(_class_layout(scored, critic, interval))
    return made


def _main_layout(
    rows: DataFrame, interval: Callable[[float, float, int], str]
) -> tuple[list[str], list[list[str]]]:
    """Methods (and critics) down; n, our metrics and the paper's metrics across."""
    metrics = [metric for metric in METRICS if (rows["metric"] == metric).any()]
    paper = rows[rows["source"] == "paper"].set_index(["method", "metric"])["value"]
    ours = rows[rows["source"] == "ours"]
    header = ["Method", "Critic", "n", *[METRICS[m] for m in metrics]]
    if len(paper):
        header += [f"paper: {m}" for m in metrics]
    lines = []
    for method in _in_order(rows["method"].unique()):
        of_method = ours[ours["method"] == method]
        critics = [c for c in CRITICS if (of_method["critic"] == c).any()] or [""]
        for critic in critics:
            # What no critic scores (LPIPS, NIQE) stands in the method's first line.
            shown = of_method["critic"].eq(critic)
            if critic == critics[0]:
                shown |= ~of_method["critic"].isin(CRITICS)
            cells = of_method[shown].set_index("metric")
            first = critic == critics[0]
            line = [METHODS.get(method, method) if first else "", critic or "–"]
            line.append(_count(cells["n"].max()) if len(cells) else "–")
            line += [_cell(cells, m, interval) for m in metrics]
            for m in metrics if len(paper) else ():
                line.append(f"{paper[method, m]:.2f}" if first and (method, m) in paper else "")
            lines.append(line)
    return header, lines


def _class_layout(
    rows: DataFrame, critic: str, interval: Callable[[float, float, int], str]
) -> tuple[list[str], list[list[str]]]:
    """Classes down, methods across; n is the number of images that contain the class."""
    methods = _in_order(rows["method"].unique())
    by_method = {m: rows[rows["method"] == m].set_index("metric") for m in methods}
    group = {i: name for name, ids in GROUPS.items() for i in ids}
    header = [f"Class (%, {critic})", "Group", "n", *[METHODS.get(m, m) for m in methods]]
    lines = []
    for i, name in enumerate(CLASSES):
        if (of_class := rows[rows["metric"] == name]).empty:
            continue
        cells = [_cell(by_method[m], name, interval) for m in methods]
        lines.append([display_name(i), group[i], _count(of_class["n"].max()), *cells])
    return header, lines


def _cell(rows: DataFrame, metric: str, interval: Callable[[float, float, int], str]) -> str:
    """`85.13 [84.20, 86.01]`, or – where nothing was measured."""
    if metric not in rows.index or rows.loc[metric, "value"] != rows.loc[metric, "value"]:
        return "–"
    row = rows.loc[metric]
    digits = 3 if metric == "LPIPS" else 2
    value = f"{row['value']:.{digits}f}"
    known = row["ci_low"] == row["ci_low"] and row["ci_high"] == row["ci_high"]
    return value + (interval(row["ci_low"], row["ci_high"], digits) if known else "")


def _interval(low: float, high: float, digits: int) -> str:
    return f" [{low:.{digits}f}, {high:.{digits}f}]"


def _interval_latex(low: float, high: float, digits: int) -> str:
    return rf" {{\tiny[{low:.{digits}f}, {high:.{digits}f}]}}"


def _count(n: float) -> str:
    return f"{n:,.0f}" if n == n else "–"


def _in_order(methods: Iterable[str]) -> list[str]:
    known = list(METHODS)
    return sorted(methods, key=lambda m: known.index(m) if m in known else len(known))


def _title(rows: DataFrame) -> str:
    name = rows["table"].iloc[0]
    return f"Table {name[5:]}" if name[5:].isdigit() else name.replace("_", " ").capitalize()


def _notes(rows: DataFrame) -> list[str]:
    """What the reader must know of the numbers: intervals, seeds, misprints."""
    ours = rows[rows["source"] == "ours"]
    seeds = sorted({str(s) for s in ours["seeds"] if s})
    notes = ["Brackets: 95 % interval; – : not measured here."] if len(ours) else []
    notes += [f"Seeds: {', '.join(seeds)}."] if seeds else []
    notes += ["Paper: the numbers it reports, at its own scale."] if len(ours) < len(rows) else []
    return notes + [FOOTNOTES[t] for t in rows["table"].unique()[:1] if t in FOOTNOTES]


def _latex(text: str) -> str:
    """Escape what LaTeX reads as markup; the interval's own braces and command stay."""
    for plain, tex in {
        "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "²": r"$^2$", "↑": r"$\uparrow$",
        "↓": r"$\downarrow$", "–": "--", "α": r"$\alpha$", "β": r"$\beta$",
    }.items():  # fmt: skip
        text = text.replace(plain, tex)
    return text
