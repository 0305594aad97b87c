"""What is wrong with files of faces: `DataError` for one of them, `Report` for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..config import UserError

SHOWN = 20  # lines of a report; the others are counted


def printable(text: str) -> str:
    """A text in one line that any terminal and file takes, with what is invisible escaped.

    Names of files may hold line ends, and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass
class Report:
    """What is wrong with a folder of faces.

    `problems` are (file or row, reason) and make the folder unusable; `notes` are worth knowing.
    """

    root: Path
    faces: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, where: Path | str, reason: object) -> None:
        """Note a problem with a file (named relative to the root) or a row."""
        where = Path(where)
        inside = where.is_relative_to(self.root)
        self.problems.append((str(where.relative_to(self.root) if inside else where), str(reason)))

    def raise_if_bad(self) -> None:
        """Raise `DataError` carrying this report if anything is wrong."""
        if self.problems:
            raise DataError(str(self), self)

    def __str__(self) -> str:
        notes = [f"  note: {printable(note)}" for note in self.notes]
        if not self.problems:
            return "\n".join([f"{self.root}: {self.faces} faces, nothing wrong", *notes])
        count = len(self.problems)
        first = sorted(self.problems)[:SHOWN]
        lines = [f"  {printable(where)}: {printable(reason)}" for where, reason in first]
        if count > SHOWN:
            lines.append(f"  ... and {count - SHOWN:,} more")
        title = f"{self.root}: {count:,} problem(s), {self.faces:,} faces"
        return "\n".join([title, *lines, *notes])


class DataError(UserError, ValueError):
    """Data that cannot be used. `report` lists every bad file."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report
