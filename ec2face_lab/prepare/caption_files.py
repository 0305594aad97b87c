"""Where the captions of a folder of faces are: found, named if they cannot be read, or composed.

A folder of `{id}.txt` with one caption a line is read. Whatever else looks like captions is refused
with the remedy, because composed captions would otherwise take its place without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ec2face_core.data import files_by_id, report_missing, visible_files, without_padding
from ec2face_core.io.report import DataError, Report
from ec2face_core.io.texts import LINE_END, is_header, read_text

from .captions import FaceAttributes, celeba_attributes
from .pairs import paired

ATTRIBUTES = "CelebAMask-HQ-attribute-anno.txt"
FOLDER_NAME = re.compile(r"captions?|texts?|prompts?|descriptions?", re.IGNORECASE)
TABLE_NAME = re.compile(r".*(caption|prompt).*|texts?", re.IGNORECASE)
PLAIN_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".yaml", ".yml")
TABLES = (
    *PLAIN_TABLES, ".xml", ".xlsx", ".xls", ".ods", ".parquet", ".pkl", ".npy", ".db", ".sqlite",
)  # fmt: skip
KEY = re.compile(r"""["']?\b(captions?|text|prompts?|descriptions?)["']?\s*:""", re.IGNORECASE)
WORD = re.compile(r"[^\W\d_]{2,}")
CELL = re.compile(r"[,;\t|:]")
LOOKED_AT = 4096  # characters of a file that may be a table


class Captions(NamedTuple):
    """The captions of some faces by id."""

    found: dict[str, Path | FaceAttributes]  # a text file, or attributes; of others: from the mask
    missing: dict[str, tuple[Path, str]]  # faces without a text file: which, and why
    note: str  # where composed captions come from; empty if none are composed


def find_captions(
    root: Path,
    folder: str | Path | None,
    names: list[str],
    pictures: Iterable[Path],
    report: Report,
) -> Captions:
    """Where captions come from: a folder, else CelebA attributes, else the masks.

    Args:
        root: folder of the faces.
        folder: of the captions, if it is named.
        names: ids of the faces.
        pictures: folders of images and masks, which captions may lie beside.
        report: duplicate files are added to it.

    Raises:
        DataError: the named folder does not exist, several hold captions, or something looks like
            captions that are not read.
    """
    chosen = _named(Path(folder)) if folder is not None else _folder_in(root, names)
    if chosen is not None:
        texts = paired(names, files_by_id(chosen, (".txt",), report))
        absent = Report(chosen)
        report_missing(chosen, "text", [n for n in names if n not in texts], absent)
        missing = {Path(w).stem: (chosen / w, reason) for w, reason in absent.problems}
        return Captions({n: texts[n] for n in names if n in texts}, missing, "")
    _refuse_lookalikes(root, names, list(pictures))
    table = root / ATTRIBUTES
    faces = paired(names, celeba_attributes(table)) if table.exists() else {}
    note = f"captions were composed from {ATTRIBUTES if faces else 'the masks'}"
    return Captions({n: faces[n] for n in names if n in faces}, {}, note)


def _named(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(
            f"{folder} is a file: captions are read from a folder of {{id}}.txt with one caption a "
            "line; write them so and name the folder"
        )
    raise DataError(f"{folder}: no such captions folder")


def _folder_in(root: Path, names: list[str]) -> Path | None:
    """The folder of captions beside those of images and masks, by its name; None without."""
    named = sorted(p for p in root.iterdir() if p.is_dir() and FOLDER_NAME.fullmatch(p.name))
    full = [folder for folder in named if _texts(folder, names)]
    if len(full) > 1:
        raise DataError(
            f"{root} holds several folders of captions, {', '.join(p.name for p in full)}: name "
            "the one to read (`--captions`, or the argument captions)"
        )
    return next(iter(full or named), None)


def _texts(folder: Path, names: list[str]) -> list[Path]:
    """The text files of a folder that are named as faces."""
    files = paired(names, files_by_id(folder, (".txt",), Report(folder)))
    return [files[name] for name in names if name in files]


def _refuse_lookalikes(root: Path, names: list[str], pictures: list[Path]) -> None:
    """Refuse what a person may have meant as captions, and name it."""
    ids = {without_padding(name) for name in names}
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    for folder in (root, *folders):
        texts = _texts(folder, names)
        if any(_is_prose(path) for path in texts[:3]):
            raise DataError(
                f"{texts[0]} looks like a caption: name the folder of the {len(texts)} captions "
                f"(`--captions {folder}`, or the argument captions), or move them away, and "
                "captions are composed"
            )
    for folder in (root, *pictures):
        for path in visible_files(folder):
            if path.suffix.lower() in TABLES and _is_table(path, ids):
                raise DataError(
                    f"{path} looks like captions, which are read from a folder of {{id}}.txt with "
                    "one caption a line: write them so and name the folder by `--captions`, or "
                    "move the file away, and captions are composed"
                )


def _is_prose(path: Path) -> bool:
    """Whether a text has words, and is no list of numbers such as boxes or landmarks."""
    return WORD.search(_start(path)) is not None


def _is_table(path: Path, ids: set[str]) -> bool:
    """Whether a file is a table of captions: by its name, its columns, or texts beside ids.

    ids: of the faces, without padding.
    """
    if path.name == ATTRIBUTES:
        return False
    if TABLE_NAME.fullmatch(path.stem):
        return True
    if path.suffix.lower() not in PLAIN_TABLES:
        return False
    text = _start(path)
    lines = LINE_END.split(text)
    if path.suffix.lower() != ".txt" and (is_header(lines[0]) or KEY.search(text)):
        return True
    return any(_has_text(line, ids) for line in lines)


def _has_text(line: str, ids: set[str]) -> bool:
    """Whether a line has several cells, first an id or a picture's name, and one of two words."""
    first, *others = CELL.split(line)
    name = first.strip(" \"'{[-")
    known = {without_padding(name), without_padding(name.rpartition(".")[0])}
    return bool(known & ids) and any(len(WORD.findall(cell)) > 1 for cell in others)


def _start(path: Path) -> str:
    try:
        return read_text(path)[:LOOKED_AT]
    except DataError:
        return ""
