"""One report of everything that is wrong with a folder of faces.

The readers of `ec2face_core` raise `DataError` with the reason. `validate` collects the
reasons of all files instead of stopping at the first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ec2face_core.attributes import CLASS_ID, FLIP_PAIRS
from ec2face_core.config import Config
from ec2face_core.data import SUFFIXES, files_by_id, report_missing
from ec2face_core.io.masks import read_mask
from ec2face_core.io.pictures import read_image
from ec2face_core.io.report import DataError, Report
from ec2face_core.io.texts import Row, describe_loss, lost_texts, read_captions, read_manifest
from ec2face_core.runs import parallel

from .weights import local_folder

T = TypeVar("T")
Problems = list[tuple[Path, str]]  # files and what is wrong with each


def validate(root: str | Path, progress: bool = False) -> Report:
    """Read every file of a folder of faces and report all that is wrong.

    Looks for: missing or unreadable images, masks and captions; ids above 18; constant masks; sizes
    that differ between image and mask or from the other faces; empty or non-UTF-8 captions; rows
    and files without each other; duplicate ids; overlapping splits; a manifest caption that its
    text file does not hold; and exchanged left and right: `mean_x(l_eye) > mean_x(r_eye)`. Notes
    tell of equal pictures in several splits.

    Raises:
        DataError: `root` is a file.
    """
    root = Path(root)
    if root.is_file():
        check_folder(root)
    report = Report(root)
    try:
        rows = read_manifest(root, report)
    except DataError as error:
        report.add(root / "manifest.csv", str(error).removeprefix(f"{root / 'manifest.csv'}: "))
        return report
    files = {kind: files_by_id(root / kind, SUFFIXES[kind], report) for kind in SUFFIXES}
    for kind, known in files.items():
        for name in known.keys() - rows.keys():
            report.add(known[name], "has no row in manifest.csv")
        report_missing(root / kind, kind, rows.keys() - known.keys(), report)

    def check(name: str) -> _Checked:
        return _check_face({kind: known.get(name) for kind, known in files.items()}, rows[name])

    label = "validating" if progress else None
    faces = dict(zip(rows, parallel(check, rows, label), strict=True))
    usual = Counter(face.size for face in faces.values() if face.size).most_common(1)
    for name, face in faces.items():
        for path, reason in face.problems:
            report.add(path, reason)
        if face.size and face.size != usual[0][0]:
            report.add(files["image"][name], f"wrong size {face.size}, the others {usual[0][0]}")
    report.notes += _shared_pictures(faces, rows)
    eyes = [face.eyes for face in faces.values() if face.eyes is not None]
    if eyes and np.mean(eyes) <= 0:
        report.add(
            root / "mask",
            f"left and right are exchanged: l_eye lies left of r_eye in the picture in "
            f"{sum(e <= 0 for e in eyes)} of {len(eyes)} faces; l_ is the subject's left "
            f"(image right): exchange the ids {FLIP_PAIRS}",
        )
    return report


def check_folder(path: str | Path) -> Path:
    """A folder that a call or a command names.

    Raises:
        DataError: it is a file, or does not exist.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file: name the folder" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}")
    return path


def note_long_captions(root: Path, config: Config, report: Report) -> None:
    """Note captions that the text encoder of a configuration cuts, if its tokenizer is there."""
    name = "tokenizer_2"
    folder = local_folder(config.backbone.path, f"{name}/tokenizer_config.json")
    if folder is not None and folder.name != name:  # a hub's cache knows files, not folders
        folder /= name
    if folder is None or not folder.is_dir():
        return
    from transformers import AutoTokenizer

    texts = files_by_id(root / "text", SUFFIXES["text"], Report(root))
    problems: Problems = []
    read = [try_read(problems, path, read_captions) or () for path in texts.values()]
    captions = [caption for lines in read for caption in lines]
    length = config.backbone.text_length
    lost = lost_texts(AutoTokenizer.from_pretrained(folder), captions, length)
    if lost:
        reader = f"the T5 of {config.profile} ({length} tokens)"
        report.notes.append(describe_loss(lost, len(captions), reader))


class _Checked(NamedTuple):
    size: int | None  # of the image
    eyes: float | None  # mean_x(l_eye) - mean_x(r_eye), where both are visible
    problems: Problems
    pixels: str = ""  # digest of the image


def _check_face(files: dict[str, Path | None], row: Row) -> _Checked:
    """All that is wrong with the existing files of one face."""
    problems: Problems = []
    image = try_read(problems, files["image"], read_image)
    ids = try_read(problems, files["mask"], read_mask)
    lines = try_read(problems, files["text"], read_captions)
    if image is not None and ids is not None and ids.shape != (image.height, image.width):
        shape = f"{ids.shape[1]}x{ids.shape[0]}"
        problems.append((files["mask"], f"mask {shape}, image {image.width}x{image.height}"))
    index = row.caption_index
    if lines is not None and lines[index : index + 1] != (row.caption.strip(),):
        problems.append((files["text"], f"manifest caption {index} is not its line"))
    size = None if image is None else image.width
    pixels = "" if image is None else hashlib.blake2b(image.tobytes()).hexdigest()
    return _Checked(size, None if ids is None else eye_order(ids), problems, pixels)


def _shared_pictures(faces: Mapping[str, _Checked], rows: Mapping[str, Row]) -> list[str]:
    """A note if several splits have the same picture, because then a test is no test."""
    same: dict[str, list[str]] = {}
    for name, face in faces.items():
        if face.pixels:
            same.setdefault(face.pixels, []).append(name)
    shared = [names for names in same.values() if len({rows[n].split for n in names}) > 1]
    if not shared:
        return []
    first = ", ".join(f"{name} ({rows[name].split})" for name in shared[0][:5])
    return [f"{len(shared)} picture(s) are in several splits, pixel for pixel: {first}"]


def try_read(problems: Problems, path: Path | None, read: Callable[..., T], *args: Any) -> T | None:
    """What `read(path, *args)` returns; None without a path, or after adding its `DataError`."""
    try:
        return None if path is None else read(path, *args)
    except DataError as error:
        problems.append((path, str(error)))
        return None


def eye_order(ids: np.ndarray) -> float | None:
    """mean_x(l_eye) - mean_x(r_eye) in pixels; None without both.

    Positive where the sides are CelebAMask-HQ's: l_ is the subject's left, image right.
    """
    left, right = (np.nonzero(ids == CLASS_ID[name])[1] for name in ("l_eye", "r_eye"))
    return float(left.mean() - right.mean()) if len(left) and len(right) else None
