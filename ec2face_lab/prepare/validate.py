"""Readers of single files, the manifest, and one report of everything that is wrong with a folder.

The data contract: `root/{image,mask,text}/{id}.*` and `root/manifest.csv` with the columns
`id,split,caption_index,caption`, one row a face. Images are square RGB (png or jpg), masks palette
or grey PNG of the same size holding ids 0-18, texts UTF-8 with one caption a line. Chosen here: a
reader raises `DataError` with the reason; `validate` collects the reasons of all files instead of
stopping at the first.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ec2face_core.attributes import CLASS_ID, FLIP_PAIRS
from ec2face_core.data import (
    IMAGE_SUFFIXES,
    DataError,
    Report,
    Row,
    files_by_id,
    read_captions,
    read_image,
    read_manifest,
    read_mask,
)
from ec2face_core.runs import parallel


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
