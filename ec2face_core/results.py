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
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ROOT, Config, resolve
from .tables import render_latex, render_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

COLUMNS = (
    "table", "method", "dataset", "metric", "source", "critic",
    "value", "ci_low", "ci_high", "n", "seeds",
)  # fmt: skip
PACKAGES = (
    "ec2face-core", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate",
    "open_clip_torch", "pyfacer", "lpips", "pyiqa", "numpy", "pandas", "matplotlib",
)  # fmt: skip
LARGE = 32 * 2**20  # bytes above which a file is known by size and time instead of its content


class ResultsError(ValueError):
    """Rows that make no table; the message names them."""


def kept_file(config: Config, name: str) -> Path:
    """Where rows of hours of training are: this profile's own, else those beside its adapters."""
    own = config.run_dir / name / f"{name}.csv"
    return own if own.is_file() else resolve(config.adapters).with_name(own.name)


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

    rows = rows.assign(table=name)
    if name in {"table1", "table2", "table3", "table4"}:
        rows = pd.concat([rows.assign(source="ours"), paper_table(int(name[-1])).astype(object)])
    target = save_rows(rows, config.figure_dir / f"{name}.csv", config, **details)

    rows = read_rows(target)
    _write(target.with_suffix(".md"), render_markdown(rows, caption))
    _write(target.with_suffix(".tex"), render_latex(rows, caption))
    return target.with_suffix(".md")


def save_rows(rows: DataFrame, path: Path, config: Config, **details: Any) -> Path:
    """Write long rows of one or several tables as CSV, and their provenance beside it.

    Raises:
        ResultsError: a column that is not in the long form, or two rows for one cell.
    """
    if unknown := sorted(set(rows.columns) - set(COLUMNS)):
        raise ResultsError(
            f"{path.stem}: unknown columns {unknown}; a long table has {list(COLUMNS)}"
        )
    rows = rows.reindex(columns=COLUMNS).astype(object)
    rows = rows.fillna({"source": "ours", "critic": "", "seeds": ""})
    rows = rows.astype({"value": float, "ci_low": float, "ci_high": float, "n": "Int64"})
    cell = ["table", "method", "metric", "source", "critic"]
    if (twice := rows[rows.duplicated(cell, keep=False)]).size:
        raise ResultsError(f"{path.stem}: more than one row for a cell:\n{twice[cell].to_string()}")
    _write(path, rows.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    _write_provenance(path.with_suffix(".json"), config, details)
    return path
