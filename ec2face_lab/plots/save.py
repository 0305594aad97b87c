"""Saving results: figures, tables, and their provenance beside them.

A figure is a PNG (200 dpi), a PDF and a JSON. A table is a long CSV with one row per cell, from
which its Markdown and LaTeX are rendered, with the paper's numbers beside ours. All files are
byte-stable (equal numbers give equal bytes, so that git shows a change only where a result changed)
and are written in one move. For the same reason commit, device and seconds are in the JSON alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import provenance, whole_file, write_json

from .render_tables import render_latex, render_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


# ci: 95 % interval over faces; joint: over faces and trainings; t: over trainings alone; p_holm: of
# the claim that a difference belongs to, adjusted over the claims of its table.
NUMBERS = (
    "value", "ci_low", "ci_high", "joint_low", "joint_high", "t_low", "t_high", "p_holm",
)  # fmt: skip

COLUMNS = ("table", "method", "dataset", "metric", "source", "critic", *NUMBERS, "n", "seeds")


class ResultsError(ValueError):
    """Rows that do not form a table; the message names them."""


# --------------------------------------------------------------------------------- figures


def save_figure(fig: Figure, name: str, config: Config, **details: Any) -> Path:
    """Write `<figure_dir>/<name>.png|.pdf|.json`; returns the PNG's path.

    The PNG's text chunks name the profile and the configuration, and state that generated faces are
    synthetic.

    Args:
        fig: the figure.
        name: of the files.
        config: names the folder.
        details: the keywords of `provenance`.
    """
    import matplotlib

    text = {
        "Title": name,
        "Source": f"EC2Face, profile {config.profile}, configuration {config.digest()}",
        "Disclaimer": "Every generated face in this figure is synthetic "
        f"(EC2Face on {config.backbone.path}, sampling seed {config.sampling.seed}).",
    }
    pdf_text = {"Title": name, "Subject": f"{text['Source']}. {text['Disclaimer']}"}
    _check_name(name)
    target = config.figure_dir / f"{name}.png"
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        for suffix, chunks in ((".png", text), (".pdf", pdf_text | {"CreationDate": None})):
            kind = {"format": suffix[1:], "metadata": chunks}
            with whole_file(target.with_suffix(suffix)) as part:
                fig.savefig(part, dpi=200, bbox_inches="tight", pad_inches=0.06, **kind)
    size = {"width_in": round(float(fig.get_figwidth()), 2), "smallest_text_pt": smallest_text(fig)}
    write_json(target.with_suffix(".json"), provenance(config, **details) | size)
    return target


def smallest_text(fig: Figure) -> float | None:
    """Size in points of the smallest text that the figure shows; None without any."""
    from matplotlib.text import Text

    sizes = [
        text.get_fontsize()
        for text in fig.findobj(Text)
        if text.get_visible() and text.get_text().strip()
    ]
    return round(float(min(sizes)), 1) if sizes else None


# ---------------------------------------------------------------------------------- tables


def read_rows(path: Path) -> DataFrame:
    """A long table from CSV, with the columns `COLUMNS`; a missing critic reads as ''.

    Columns that an older file lacks are NaN.
    """
    import pandas as pd

    rows = pd.read_csv(path, dtype={"critic": str, "seeds": str})
    return rows.fillna({"critic": "", "seeds": ""}).reindex(columns=list(COLUMNS))


def paper_table(number: int) -> DataFrame:
    """Every cell of the paper's Table 1-4, as printed, in the long form (`source = paper`)."""
    return read_rows(ROOT / "data" / "paper" / f"table{number}.csv")


def save_table(
    rows: DataFrame, name: str, config: Config, *, caption: str = "", **details: Any
) -> Path:
    """Write `<figure_dir>/<name>.csv|.md|.tex|.json`; returns the Markdown's path.

    Args:
        rows: our cells in the long form; missing columns stay empty.
        name: of the files. For table1 ... table4 the paper's cells are added.
        config: names the folder.
        caption: printed above the table; it should name every substitute metric or data set.
        details: the keywords of `provenance`.

    Raises:
        ResultsError: a column that is not in the long form, or two rows for one cell.
    """
    import pandas as pd

    _check_name(name)
    rows = rows.assign(table=name)
    if name in {"table1", "table2", "table3", "table4"}:
        rows = pd.concat([rows.assign(source="ours"), paper_table(int(name[-1])).astype(object)])
    target = save_rows(rows, config.figure_dir / f"{name}.csv", config, **details)

    rows = headline(read_rows(target), config)
    for suffix, render in ((".md", render_markdown), (".tex", render_latex)):
        with whole_file(target.with_suffix(suffix)) as part:
            part.write_text(render(rows, caption))
    return target.with_suffix(".md")


def headline(rows: DataFrame, config: Config) -> DataFrame:
    """The rows that a printed table shows: without our LPIPS where its trunk is random.

    Such a trunk tells a distorted picture from its original, but ranks no methods.
    """
    ours = (rows["metric"] == "LPIPS") & (rows["source"] == "ours")
    return rows[~ours] if config.evaluation.lpips == "alex-random" else rows


def save_rows(rows: DataFrame, path: Path, config: Config, **details: Any) -> Path:
    """Write long rows of one or several tables as CSV, and their provenance beside it.

    Args:
        rows: cells in the long form; missing columns stay empty.
        path: of the CSV.
        config: the experiment.
        details: the keywords of `provenance`.

    Returns:
        `path`.

    Raises:
        ResultsError: a column that is not in the long form, or two rows for one cell.
    """
    if unknown := sorted(set(rows.columns) - set(COLUMNS)):
        raise ResultsError(
            f"{path.stem}: unknown columns {unknown}; a long table has {list(COLUMNS)}"
        )
    rows = rows.reindex(columns=COLUMNS).astype(object)
    rows = rows.fillna({"source": "ours", "critic": "", "seeds": ""})
    rows = rows.astype({**dict.fromkeys(NUMBERS, float), "n": "Int64"})
    cell = ["table", "method", "metric", "source", "critic"]
    repeated = rows[rows.duplicated(cell, keep=False)]
    if len(repeated):
        cells = repeated[cell].to_string()
        raise ResultsError(f"{path.stem}: more than one row for a cell:\n{cells}")
    with whole_file(path) as part:
        rows.to_csv(part, index=False, float_format="%.6g", lineterminator="\n")
    write_json(path.with_suffix(".json"), provenance(config, **details))
    return path


def _check_name(name: str) -> None:
    """Refuse a name of files that would leave the folder of figures."""
    if not name or Path(name).name != name or name.startswith(".") or "\0" in name:
        raise ResultsError(f"{name!r} is no name of a figure or table: leave out folders and dots")
