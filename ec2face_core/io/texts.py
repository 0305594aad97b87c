"""The one way to read text: captions, the manifest, and other tables.

Text is bytes first. UTF-8 with or without a byte order mark and UTF-16 with one are read; anything
else is refused with its line. Lines end with LF, CRLF or CR and with nothing else, so that a U+2028
of an editor does not split a caption. Captions are in Unicode's composed form (NFC), because a
tokenizer tells `é` from `e` and an accent.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .report import DataError, Report

MANIFEST_COLUMNS = ["id", "split", "caption_index", "caption"]
MAX_BYTES = 2**20  # of a caption file
MAX_CAPTION = 2**17  # characters; readers of CSV files take no longer cells
MAX_ID = 160  # bytes: with a suffix, and what a file is called while it is written, at most 255

MARKS = {  # byte order mark -> encoding; UTF-32's begin with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u2060\u00ad\u200e\u200f"))  # of no width
LINE_END = re.compile(r"\r\n|\r|\n")
MARKUP = re.compile(r"<(!doctype|html|\?xml)|\{\\rtf", re.IGNORECASE)
KEYED = re.compile(r"""["'{\[\s-]*(captions?|text|prompts?)["']?\s*[:=]""", re.IGNORECASE)
STRUCTURE = re.compile(r"""[\[{]\s*(["'\[{]|$)""")  # of JSON, whole or cut off
CAPTION_COLUMNS = {"text", "prompt", "description"}
ID_COLUMNS = {"id", "image", "image_id", "image_path", "file", "file_name", "filename", "name"}
COUNT = re.compile(r"[0-9]{1,6}")


class LostWordsWarning(UserWarning):
    """A text is longer than its encoder reads."""


class Row(NamedTuple):
    """One line of the manifest: the split of a face and the caption that evaluation uses."""

    split: str
    caption_index: int
    caption: str


def read_text(path: Path) -> str:
    """The text of a file; line ends stay as they are.

    Raises:
        DataError: it cannot be read, or is not text; the message names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"unreadable ({error.strerror})") from error
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line(data[: error.start].decode(encoding, "replace"))
        raise DataError(
            f"not {encoding.removesuffix('-sig').upper()} ({error.reason} at byte {error.start}, "
            f"line {line}): save it as UTF-8, if it is Windows text by `iconv -f cp1252 -t utf-8`"
        ) from error
    if "\0" in text:
        line = _line(text[: text.index("\0")])
        raise DataError(
            f"a NUL byte in line {line}: no text, or UTF-16 without a byte order mark; save it as "
            "UTF-8"
        )
    return text


def clean(text: str) -> str:
    """A caption or prompt in one line: composed (NFC), spaces only, nothing invisible.

    Raises:
        DataError: a control character.
    """
    line = re.sub(r"\s", " ", unicodedata.normalize("NFC", text).translate(INVISIBLE)).strip()
    for character in line:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise DataError(f"control character U+{ord(character):04X}: {line[:40]!r}")
    return line


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions of one face, one per line without blank lines; DataError if none or no text."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{size / 1e6:.1f} MB are no captions (limit {MAX_BYTES / 1e6:.1f})")
        lines = []
        whole = read_text(path)
        _refuse_table(path.stem, whole)
        for number, text in enumerate(LINE_END.split(whole), start=1):
            try:
                lines.append(clean(text))
            except DataError as error:
                raise DataError(f"line {number}: {error}") from error
            if len(lines[-1]) > MAX_CAPTION:
                raise DataError(
                    f"line {number}: {len(lines[-1]):,} characters are no caption (limit "
                    f"{MAX_CAPTION:,}): one caption a line"
                )
    except OSError as error:
        raise DataError(f"unreadable caption ({error.strerror})") from error
    captions = tuple(line for line in lines if line)
    if not captions:
        raise DataError("empty caption file")
    return captions


def _refuse_table(name: str, text: str) -> None:
    """Refuse JSON, CSV and the like, whose brackets, names and numbers would become captions."""
    kind = ""
    lines = [line.strip() for line in LINE_END.split(text.strip("\ufeff\r\n\t ")) if line.strip()]
    if not lines:
        return
    if MARKUP.match(lines[0]):
        kind = "markup, not text"
    elif STRUCTURE.match(lines[0]) or any(_is_structure(line) for line in lines):
        kind = "JSON"
    elif KEYED.match(lines[0]):
        kind = "names of captions, as YAML or JSON have them"
    elif is_header(lines[0]):
        kind = "a table"
    elif any(_names_face(line, name) for line in lines):
        kind = "a table with ids"
    elif any(line.startswith('"') and '""' in line[1:] for line in lines):
        kind = "a table's quotation marks"
    if kind:
        raise DataError(f"holds {kind}: write plain text, one caption a line")


def _is_structure(text: str) -> bool:
    """Whether a text is a list or an object of JSON, or a literal of Python."""
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return False
    for read in (json.loads, ast.literal_eval):
        try:
            return isinstance(read(text), list | dict | set)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return False


def is_header(line: str) -> bool:
    """Whether a line is the header of a table with captions."""
    cells = {cell.lower() for cell in _cells(line)}
    named = cells & {"caption", "captions"} or (cells & ID_COLUMNS and cells & CAPTION_COLUMNS)
    return bool(named) and len(cells) > 1


def _cells(line: str) -> list[str]:
    return [cell.strip(" \"'") for cell in re.split(r"[,;\t|]", line)]


def _names_face(line: str, name: str) -> bool:
    """Whether the first of several cells is the number of a face or the name of its picture."""
    first, *others = _cells(line)
    stem, dot, suffix = first.rpartition(".")
    if dot and f".{suffix.lower()}" in (".png", ".jpg", ".jpeg", ".webp"):
        return bool(others) and stem.lstrip("0") == name.lstrip("0")
    return bool(others) and first.isdecimal() and first.lstrip("0") == name.lstrip("0")


def check_id(name: str) -> None:
    """Refuse an id, the name of a file without its suffix, that a manifest cannot hold.

    Raises:
        DataError: invisible characters, spaces at its ends, a slash, bytes that are no UTF-8, or
            too long a name.
    """
    try:
        kept = clean(name)
    except DataError:
        kept = ""
    length = len(name.encode("utf-8", "surrogatepass"))
    wrong = ""
    if any("\ud800" <= c <= "\udfff" for c in name):
        wrong = "bytes that are not UTF-8"
    elif kept != name or not name:
        wrong = "invisible characters, or spaces at an end"
    elif re.search(r"[/\\]", name) or name.startswith("."):
        wrong = "a slash, or a dot in front"
    elif length > MAX_ID:
        wrong = f"{length} bytes (limit {MAX_ID})"
    if wrong:
        raise DataError(f"the name of the file has {wrong}: rename the files of this face")


def read_manifest(root: Path, report: Report | None = None) -> dict[str, Row]:
    """Rows of `root/manifest.csv`, or of the file `root`, by id, in file order.

    Cells are text: an id `0012` or `NA` stays what it is. Bad rows are added to `report` and left
    out; without a report they raise DataError together.
    """
    own = report or Report(root)
    path = root if root.is_file() else root / "manifest.csv"
    rows: dict[str, Row] = {}
    for number, line in enumerate(_table(path), start=2):
        try:
            name, row = _row(line)
        except DataError as error:
            own.add(f"manifest.csv row {number}", error)
            continue
        where = f"manifest.csv row {number}"
        if name in rows and rows[name].split != row.split:
            own.add(where, f"overlapping splits: id {name} is {rows[name].split} and here again")
        elif name in rows:
            own.add(where, f"duplicate id {name}")
        else:
            rows[name] = row
    own.faces = len(rows)
    if report is None:
        own.raise_if_bad()
    return rows


def _table(path: Path) -> list[dict[Any, Any]]:
    """The rows of a manifest, each with the expected columns."""
    try:
        file = io.StringIO(read_text(path), newline="")
        reader = csv.DictReader(file, strict=True)
        names = [(name or "").strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        lines = list(reader)
    except DataError as error:
        raise DataError(
            f"{path}: {error}; the converters write it, see `python -m ec2face_lab prepare --help`"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: unreadable (line {reader.reader.line_num}: {error})") from error
    if names != MANIFEST_COLUMNS:
        other = next((s for s in ";\t" if len(names) == 1 and s in names[0]), "")
        hint = f"; its cells are separated by {other!r}, export it with commas" if other else ""
        raise DataError(f"{path}: columns {names}, expected {MANIFEST_COLUMNS}{hint}")
    return lines


def _row(line: dict[Any, Any]) -> tuple[str, Row]:
    """Id and row of one line of the manifest; DataError with the reason."""
    if None in line or None in line.values():
        cells = sum(cell is not None for cell in line.values())
        extra = len(line.get(None) or ())
        raise DataError(
            f"{cells + extra - (None in line)} cells instead of {len(MANIFEST_COLUMNS)}: quote a "
            "caption that holds a comma"
        )
    name = clean(line["id"])
    split = clean(line["split"])
    index = line["caption_index"].strip()
    if not name or not split or not COUNT.fullmatch(index):
        raise DataError(f"id {name!r}, split {split!r}, caption_index {index!r}")
    if re.search(r"[/\\\n\r]", line["id"]) or name.startswith("."):
        raise DataError(f"id {name!r} is no name of a file")
    caption = clean(line["caption"])
    if not caption:
        raise DataError(f"empty caption of id {name}")
    return name, Row(split, int(index), caption)


def lost_texts(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, str]:
    """The texts that a tokenizer cuts, each with the words that are lost.

    Args:
        tokenizer: a fast tokenizer of transformers.
        texts: what it is given.
        length: tokens that the encoder reads, special ones included.
    """
    if not texts or not tokenizer.is_fast:
        return {}
    encoded = tokenizer(
        list(texts),
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    rows = zip(texts, encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    lost = {}
    for text, offsets, special in rows:
        starts = [first for (first, _), mark in zip(offsets, special, strict=True) if not mark]
        kept = max(length - sum(special), 0)
        if len(starts) > kept:
            lost[text] = text[starts[kept] :].strip()
    return lost


def describe_loss(lost: dict[str, str], count: int, reader: str) -> str:
    """One sentence on texts that are cut: how many of `count`, and the words of the first."""
    text = next(iter(lost.values()))
    words = text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}"
    return (
        f"{len(lost)} of {count} texts are longer than {reader} reads; lost of the first: {words!r}"
    )


def _line(before: str) -> int:
    """The number of the line after this text."""
    return len(LINE_END.findall(before)) + 1
