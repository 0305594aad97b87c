"""Types of settings with their bounds, which pydantic checks whenever a configuration is built."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _number(value: Any) -> Any:
    """Refuse booleans and 1_000, which pydantic accepts; the text "1e-4" is a number."""
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    if isinstance(value, str) and not (value.isascii() and "_" not in value):
        raise ValueError("input should be a valid number")
    return value


def _printable(text: str) -> str:
    """Refuse characters that no path and no name has on purpose: NUL, line breaks, broken UTF-8."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError("must have no line break and no other control character")
    return text


def _visible(text: str) -> str:
    """Refuse a name that begins or ends with a space, or has nothing else."""
    if text != text.strip():
        raise ValueError("must not begin or end with a space")
    return text


def _folder(name: str) -> str:
    """Refuse a profile that is no folder of its own inside `runs/`, or an absolute one."""
    path = Path(name)
    if not path.name or ".." in path.parts:
        raise ValueError("must name a folder of its own and not lead out of the folder of runs")
    if name.startswith("~"):
        raise ValueError(
            "is a folder inside that of runs, so that `~` is not your home there; "
            "give an absolute path"
        )
    return name


Count = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Size = Annotated[int, Field(strict=True, ge=1, le=65_536)]  # of what is in memory at once
Seed = Annotated[int, Field(strict=True, ge=0, le=2**40)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True), AfterValidator(_printable)]
Name = Annotated[
    str, Field(strict=True, min_length=1), AfterValidator(_printable), AfterValidator(_visible)
]
FolderName = Annotated[Name, AfterValidator(_folder)]
