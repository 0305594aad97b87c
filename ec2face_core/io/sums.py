"""SHA256SUMS: hashes of kept weights, compared when the weights are opened.

A file counts as listed if the SHA256SUMS of its folder, or of one of the two folders above, names
it; the nearest one decides. `sha256sum -c SHA256SUMS` checks the same. Weights that nobody listed
are opened as they are, and those above 1 GB are left to the hub, which compares them itself.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import UserError
from ..runs import SUMS, content_key, file_digest, path_digest, whole_file

FOLDERS = 3  # of a file and above it, in which a list may lie
LARGEST = 2**30  # bytes of a file that is compared
LISTED = (".safetensors", ".pt", ".json", ".txt", ".model")


class DamagedError(UserError, OSError):
    """Weights that are not those that were kept; the message names the file and the remedy."""


def check_sums(path: Path) -> None:
    """Compare a file, or every file below a folder, with its listed hash.

    Raises:
        DamagedError: a file has changed since it was listed.
    """
    for file in _files(path):
        sums = _nearest(file)
        if sums is None or file.stat().st_size > LARGEST:
            continue
        expected = _read(sums).get(file.absolute().relative_to(sums.parent).as_posix())
        if expected and file_digest(file).hex() != expected:
            raise DamagedError(
                f"{file} is damaged: it is not the file that {sums} lists. Copy it again (`git "
                "checkout` for the clone's own, else train it again); if it was changed on "
                "purpose, delete its line there"
            )


def list_sums(path: Path) -> None:
    """List the hash of a file, or of the weights below a folder, in place of what was listed.

    The nearest SHA256SUMS above is used; without one it begins in the folder (of the file).
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    sums = _nearest(folder / "x") or folder / SUMS
    with _alone(sums.parent):
        listed = dict(_read(sums)) if sums.is_file() else {}
        inside = folder.relative_to(sums.parent).as_posix()
        if path.is_dir():
            prefix = "" if inside == "." else f"{inside}/"
            listed = {k: v for k, v in listed.items() if not k.startswith(prefix)}
        for file in _weights(path):
            listed[file.absolute().relative_to(sums.parent).as_posix()] = file_digest(file).hex()
        with whole_file(sums) as part:
            part.write_text("".join(f"{listed[k]}  {k}\n" for k in sorted(listed)))


def weights_digest(path: Path) -> str:
    """Sixteen hex digits of a file of weights, or of the weights and settings below a folder.

    Notes, such as provenance.json, do not count. Large files: see `runs.path_digest`.
    """
    base = path if path.is_dir() else path.parent
    parts = [[file.relative_to(base).as_posix(), path_digest(file)] for file in _weights(path)]
    return content_key(parts, 16)


def _weights(path: Path) -> Iterator[Path]:
    for file in _files(path):
        if (file == path or file.suffix in LISTED) and file.name != "provenance.json":
            yield file


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (f for f in sorted(path.rglob("*")) if f.is_file() and f.name != SUMS)
    elif path.is_file():
        yield path


def _nearest(file: Path) -> Path | None:
    """The list that decides about a file."""
    above = file.absolute().parents[:FOLDERS]
    return next((f / SUMS for f in above if (f / SUMS).is_file()), None)


def _read(sums: Path) -> dict[str, str]:
    """Relative path -> SHA-256; a broken line lists nothing."""
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = (re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines)
    return {match[2]: match[1] for match in matches if match}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time change a folder's list."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
