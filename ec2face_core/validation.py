"""Readers of single files, the manifest, and one report of everything that is wrong with a folder.

The data contract: `root/{image,mask,text}/{id}.*` and `root/manifest.csv` with the columns
`id,split,caption_index,caption`, one row a face. Images are square RGB (png or jpg), masks palette
or grey PNG of the same size holding ids 0-18, texts UTF-8 with one caption a line. Chosen here: a
reader raises `DataError` with the reason; `validate` collects the reasons of all files instead of
stopping at the first.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from .attributes import CLASS_ID, FLIP_PAIRS, NUM_CLASSES
from .config import Refusal

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MANIFEST_COLUMNS = ["id", "split", "caption_index", "caption"]
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass
class Report:
    """What is wrong with a folder of faces: `problems` are (file or row, reason)."""

    root: Path
    faces: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: Path | str, reason: object) -> None:
        where = Path(where)
        inside = where.is_relative_to(self.root)
        self.problems.append((str(where.relative_to(self.root) if inside else where), str(reason)))

    def raise_if_bad(self) -> None:
        """Raise `DataError` carrying this report if anything is wrong."""
        if self.problems:
            raise DataError(str(self), self)

    def __str__(self) -> str:
        if not self.problems:
            return f"{self.root}: {self.faces} faces, nothing wrong"
        lines = [f"  {where}: {reason}" for where, reason in sorted(self.problems)]
        return "\n".join([f"{self.root}: {len(lines)} problem(s), {self.faces} faces", *lines])


class DataError(Refusal, ValueError):
    """Data that cannot be used. `report` lists every bad file."""

    def __init__(self, message: str, report: Report | None = None):
        super().__init__(message)
        self.report = report


class Row(NamedTuple):
    """One line of the manifest: the split of a face and the caption that evaluation uses."""

    split: str
    caption_index: int
    caption: str


def read_image(path: Path, size: int | None = None) -> Image.Image:
    """Square RGB picture; DataError with the reason otherwise.

    With a size, a JPEG of twice that size or more is halved (quartered ...) while it is decoded, to
    no less than `size`: six times faster, and as close to bicubic as Lanczos is (47 dB, measured).
    """
    try:
        with Image.open(path) as file:
            if size:
                file.draft("RGB", (size, size))  # other formats than JPEG ignore it
            picture = file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable image ({error})") from error
    if picture.width != picture.height:
        raise DataError(f"wrong size {picture.width}x{picture.height}: faces are square")
    return picture


def read_mask(path: Path) -> np.ndarray:
    """Class ids of a palette or grey PNG, `(h, w)` uint8, checked; DataError otherwise."""
    try:
        with Image.open(path) as file:
            mode, ids = file.mode, np.array(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable mask ({error})") from error
    if mode not in ("P", "L"):
        raise DataError(f"mask is {mode}, not ids: `convert-merged` turns colours into ids")
    check_ids(ids)
    return ids


def check_ids(ids: np.ndarray) -> None:
    """Refuse ids above 18 and a mask that shows one class only."""
    if ids.max() >= NUM_CLASSES:
        raise DataError(f"label {ids.max()} above {NUM_CLASSES - 1}")
    if ids.min() == ids.max():
        raise DataError(f"constant mask (every pixel is {ids.min()})")


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions of one face, one a line, blank lines dropped; DataError if none or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"caption is not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"unreadable caption ({error.strerror})") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise DataError("empty caption file")
    return lines


def read_manifest(root: Path, report: Report | None = None) -> dict[str, Row]:
    """Rows of `root/manifest.csv`, or of the file `root`, by id, in file order.

    Bad rows are added to `report` and left out; without a report they raise DataError together.
    """
    own = report or Report(root)
    path = root if root.is_file() else root / "manifest.csv"
    rows: dict[str, Row] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: unreadable ({error}); the converters write it, see "
            "`python -m ec2face_core.datasets --help`"
        ) from error
    if reader.fieldnames != MANIFEST_COLUMNS:
        raise DataError(f"{path}: columns {reader.fieldnames}, expected {MANIFEST_COLUMNS}")
    for number, line in enumerate(lines, start=2):
        where, name, index = f"manifest.csv row {number}", line["id"], line["caption_index"] or ""
        if not name or not line["split"] or not index.isdigit():
            own.add(where, f"id {name!r}, split {line['split']!r}, caption_index {index!r}")
        elif name in rows and rows[name].split != line["split"]:
            own.add(where, f"overlapping splits: id {name} is {rows[name].split} and here again")
        elif name in rows:
            own.add(where, f"duplicate id {name}")
        else:
            rows[name] = Row(line["split"], int(index), line["caption"] or "")
    own.faces = len(rows)
    if report is None:
        own.raise_if_bad()
    return rows


def files_by_id(folder: Path, suffixes: Iterable[str], report: Report) -> dict[str, Path]:
    """Files of a folder with one of these suffixes, by name without suffix; reports duplicates."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and files.setdefault(path.stem, path) != path:
            report.add(path, f"duplicate id: {files[path.stem].name} is there too")
    return files


def parallel(
    function: Callable[[_T], _R],
    items: Iterable[_T],
    progress: str | None = None,
    processes: bool = False,
) -> Iterator[_R]:
    """Map over items, in order, with a bar; on threads (decoding releases the interpreter lock).

    Results wait in memory for a slow consumer: let `function` return little. With `processes`,
    for work that holds the lock, function, items and results have to be picklable.

    Raises:
        OSError: a process was killed.
    """
    from tqdm.auto import tqdm

    items = list(items)
    pool: Executor
    if processes:
        affinity = getattr(os, "sched_getaffinity", None)  # what a cluster lends may be fewer cores
        workers = min(len(items), len(affinity(0)) if affinity else os.cpu_count() or 1)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        pool = ProcessPoolExecutor(max(1, workers), context, torch.set_num_threads, (1,))
    else:
        pool = ThreadPoolExecutor()
    with pool:
        results = pool.map(function, items, chunksize=8)
        hidden = progress is None
        try:
            yield from tqdm(results, progress, len(items), mininterval=1.0, disable=hidden)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, most likely for want of memory: run the same command "
                "again, it goes on where it stopped"
            ) from error


def validate(root: str | Path, progress: bool = False) -> Report:
    """Read every file of a folder of faces and report all that is wrong.

    Looks for: missing or unreadable images, masks and captions; ids above 18; constant masks; sizes
    that differ between image and mask or from the other faces; empty or non-UTF-8 captions; rows
    and files without each other; duplicate ids; overlapping splits; a manifest caption that its
    text file does not hold; and exchanged left and right: `mean_x(l_eye) > mean_x(r_eye)`.
    """
    root = Path(root)
    report = Report(root)
    try:
        rows = read_manifest(root, report)
    except DataError as error:
        report.add(root / "manifest.csv", str(error).removeprefix(f"{root / 'manifest.csv'}: "))
        return report
    kinds = {"image": IMAGE_SUFFIXES, "mask": (".png",), "text": (".txt",)}
    files = {kind: files_by_id(root / kind, suffixes, report) for kind, suffixes in kinds.items()}
    for kind, known in files.items():
        for name in known.keys() - rows.keys():
            report.add(known[name], "has no row in manifest.csv")
        for name in rows.keys() - known.keys():
            report.add(root / kind / f"{name}{kinds[kind][0]}", f"missing {kind}")

    def check(name: str) -> _Checked:
        return _check_face({kind: known.get(name) for kind, known in files.items()}, rows[name])

    label = "validating" if progress else None
    checked = dict(zip(rows, parallel(check, rows, label), strict=True))
    usual = Counter(c.size for c in checked.values() if c.size).most_common(1)
    for name, face in checked.items():
        for path, reason in face.problems:
            report.add(path, reason)
        if face.size and face.size != usual[0][0]:
            report.add(files["image"][name], f"wrong size {face.size}, the others {usual[0][0]}")
    eyes = [face.eyes for face in checked.values() if face.eyes is not None]
    if eyes and np.mean(eyes) <= 0:
        report.add(
            root / "mask",
            f"left and right are exchanged: l_eye lies left of r_eye in the picture in "
            f"{sum(e <= 0 for e in eyes)} of {len(eyes)} faces; l_ is the subject's left "
            f"(image right): exchange the ids {FLIP_PAIRS}",
        )
    return report


class _Checked(NamedTuple):
    size: int | None  # of the image
    eyes: float | None  # mean_x(l_eye) - mean_x(r_eye), where both are seen
    problems: list[tuple[Path, str]]


def _check_face(files: dict[str, Path | None], row: Row) -> _Checked:
    """All that is wrong with the existing files of one face."""
    problems: list[tuple[Path, str]] = []
    found: dict[str, object] = {}
    for kind, read in (("image", read_image), ("mask", read_mask), ("text", read_captions)):
        path = files[kind]
        if path is None:
            continue
        try:
            found[kind] = read(path)
        except DataError as error:
            problems.append((path, str(error)))
    image, ids, lines = (found.get(kind) for kind in ("image", "mask", "text"))
    if image is not None and ids is not None and ids.shape != (image.height, image.width):
        size = f"{ids.shape[1]}x{ids.shape[0]}"
        problems.append((files["mask"], f"mask {size}, image {image.width}x{image.height}"))
    if lines is not None and (
        row.caption_index >= len(lines) or lines[row.caption_index] != row.caption.strip()
    ):
        problems.append((files["text"], f"manifest caption {row.caption_index} is not its line"))
    return _Checked(
        size=image.width if image is not None else None,
        eyes=None if ids is None else eye_order(ids),
        problems=problems,
    )


def eye_order(ids: np.ndarray) -> float | None:
    """mean_x(l_eye) - mean_x(r_eye) in pixels; None without both.

    Positive where sides are CelebAMask-HQ's: l_ is the subject's left, image right.
    """
    left, right = (np.nonzero(ids == CLASS_ID[name])[1] for name in ("l_eye", "r_eye"))
    return float(left.mean() - right.mean()) if len(left) and len(right) else None
