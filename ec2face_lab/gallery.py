"""Executed notebooks that one can read without running them.

`tidy` leaves of an executed copy what a reader wants: no progress bar, no dead widget, no path of
this machine. `render` writes a copy as Markdown with small pictures beside it.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ec2face_core.io.paths import ROOT
from ec2face_core.runs import whole_file

from .launch import BAR

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from PIL.Image import Image

LARGEST = 150_000  # bytes of a picture
WIDEST = 1660  # pixels: twice the width at which GitHub shows a page
SHORTENED = 60  # lines of printed text that are shown

CELL_FILE = re.compile(r"\S*/ipykernel_\d+/\d+\.py")  # what tracebacks and warnings call a cell
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)\s]+)(\))")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def tidy_file(path: Path) -> None:
    """`tidy` an executed notebook in its file."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    tidy(notebook)
    with whole_file(path) as part, part.open("w") as file:
        nbformat.write(notebook, file)


def tidy(notebook: NotebookNode) -> None:
    """Join what one cell printed, and drop widgets, progress bars and machine paths."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            if any("widget" in kind for kind in output.get("data", {})):
                continue
            last = kept[-1] if kept else None
            if output.output_type == "stream" and last and last.get("name") == output.name:
                last.text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output.text = without_machine(without_bars(last_states(output.text)))
            elif "text/plain" in output.get("data", {}):
                output.data["text/plain"] = without_machine(output.data["text/plain"])
        cell.outputs = [o for o in kept if o.output_type != "stream" or o.text.strip()]


def last_states(text: str) -> str:
    """Printed text as a terminal shows it in the end, with the last state of each redrawn line."""
    lines = []
    for line in ESCAPES.sub("", text).split("\n"):
        states = [state for state in line.split("\r") if state.strip()]
        if states or "\r" not in line:
            lines.append(states[-1].rstrip() if states else "")
    return "\n".join(lines)


def without_bars(text: str) -> str:
    """Text without the lines of progress bars."""
    return "".join(line for line in text.splitlines(keepends=True) if not BAR.search(line))


def without_machine(text: str) -> str:
    """Text without the folders of this machine: paths begin at the repository root."""
    text = CELL_FILE.sub("cell", text)
    folders = {str(ROOT): "", sys.prefix: ".venv", str(Path.home()): "~"}
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            name = folders[folder]
            text = text.replace(f"{folder}/", f"{name}/" if name else "").replace(
                folder, name or "."
            )
    return text


def render(copy: Path, out: Path, source: Path) -> list[Path]:
    """Write `<out>/<name>.md` and its pictures `<out>/<name>/*`; returns all of them.

    Args:
        copy: an executed notebook.
        out: the folder.
        source: the notebook itself; links in its text begin there.

    Raises:
        ValueError: a picture that cannot be made smaller than `LARGEST`.
    """
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(copy, as_version=4)
    tidy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _prepare(cell)
        elif cell.cell_type == "markdown":
            cell.source = _moved_links(cell.source, source.parent, out)
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    resources = {"output_files_dir": copy.stem, "unique_key": "out"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    files = []
    for name, content in sorted(resources["outputs"].items()):
        path, data = _shrunk(out / name, content)
        text = text.replace(name, path.relative_to(out).as_posix())
        files.append(_write(path, data))
    link = os.path.relpath(source, out)
    head = f"*This is an executed copy of [{source.name}]({link}).*\n\n"
    lines = [line.rstrip() for line in text.replace("![png]", "![figure]").splitlines()]
    text = head + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
    return [_write(out / f"{copy.stem}.md", text.encode()), *files]


def _prepare(cell: NotebookNode) -> None:
    """Shorten long text, and leave of each output the one form that Markdown shows best."""
    for output in cell.outputs:
        if output.output_type == "stream":
            output.text = _shortened(output.text)
        data = output.get("data", {})
        if "text/markdown" in data or "image/png" in data:
            for kind in list(data):
                if kind not in ("text/markdown", "image/png"):
                    del data[kind]
        elif "text/html" in data and "<table" in data["text/html"]:
            data["text/html"] = re.sub(r"<style.*?</style>\s*", "", data["text/html"], flags=re.S)


def _moved_links(text: str, here: Path, out: Path) -> str:
    """Text whose relative links begin in `out`; those to other notebooks lead to their pages."""

    def moved(match: re.Match) -> str:
        target, mark, part = match[2].partition("#")
        path = here / target
        if path.suffix == ".ipynb" and path.parent == here:
            return f"{match[1]}{path.stem}.md{match[3]}"
        return f"{match[1]}{os.path.relpath(path, out)}{mark}{part}{match[3]}"

    return LINK.sub(moved, text)


def _shortened(text: str) -> str:
    lines = text.splitlines()
    if len(lines) <= SHORTENED:
        return text
    half = SHORTENED // 2
    left_out = f"... {len(lines) - 2 * half} lines ..."
    return "\n".join([*lines[:half], left_out, *lines[-half:]]) + "\n"


def _shrunk(path: Path, content: bytes) -> tuple[Path, bytes]:
    """A picture of at most `LARGEST` bytes: as it is, with fewer colours, or as WebP."""
    from PIL import Image

    if len(content) <= LARGEST or path.suffix != ".png":
        if len(content) > LARGEST:
            raise ValueError(f"{path.name} has {len(content)} bytes, more than {LARGEST}")
        return path, content
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.LANCZOS)
    for data in _candidates(image):
        if len(data) <= LARGEST:
            suffix = ".webp" if data[8:12] == b"WEBP" else ".png"
            return path.with_suffix(suffix), data
    raise ValueError(f"{path.name} cannot be made smaller than {LARGEST} bytes")


def _candidates(image: Image) -> Iterable[bytes]:
    """The picture in ever fewer bytes: lossless, then lossy at ever smaller sizes."""
    yield _encoded(image, "PNG", optimize=True)
    yield _encoded(image.quantize(256), "PNG", optimize=True)
    for scale in (1.0, 0.8, 0.65, 0.5):
        size = (round(image.width * scale), round(image.height * scale))
        for quality in (90, 75):
            yield _encoded(image.resize(size), "WEBP", quality=quality, method=6)


def _encoded(image: Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_bytes(content)
    return path
