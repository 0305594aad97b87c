"""What each face of an unfinished conversion was made of, so that resuming keeps no other face.

`.{name}.partial/origin/{id}.sha256` holds the digest of the content of a face's source files and of
the options, and appears after the face. A face of another digest is made anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ec2face_core.io.pictures import MAX_BYTES
from ec2face_core.runs import content_key, file_sha256, whole_file

FOLDER = "origin"


def origin(files: Iterable[Path], *options: Any) -> str | None:
    """A digest of the names and the content of some files, and of options.

    Args:
        files: what a face is made of.
        options: JSON-ready values of whatever else shapes it.

    Returns:
        64 hex digits; None if a file cannot be read, which whoever reads it will report.
    """
    content = []
    for path in files:
        try:
            if not path.is_file() or path.stat().st_size > MAX_BYTES:
                return None
            content.append([path.name.encode("utf-8", "surrogatepass").hex(), file_sha256(path)])
        except OSError:
            return None
    return content_key([content, options], digits=64)


def is_of(root: Path, name: str, wanted: str | None) -> bool:
    """Whether a face of an unfinished conversion was made of this origin."""
    try:
        return wanted is not None and _file(root, name).read_text() == wanted
    except (OSError, ValueError):
        return False


def forget(root: Path, name: str) -> None:
    """Before a face is written: whatever is there of it may be of several origins from now on."""
    _file(root, name).unlink(missing_ok=True)


def note(root: Path, name: str, made_of: str | None) -> None:
    """After a face is written."""
    if made_of is not None:
        with whole_file(_file(root, name)) as part:
            part.write_text(made_of)


def _file(root: Path, name: str) -> Path:
    return root / FOLDER / f"{name}.sha256"
