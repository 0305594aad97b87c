"""Types of settings with their bounds, which pydantic checks whenever a configuration is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _number(value: Any) -> Any:
    """Refuse booleans and 1_000, which pydantic accepts (YAML 1.1 reads 1e-4 as text: accepted)."""
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    if isinstance(value, str) and not (value.isascii() and "_" not in value):
        raise ValueError("input should be a valid number")
    return value


def _inside(name: str) -> str:
    """Refuse a profile that would leave `runs/` by `..`; an absolute one is its own folder."""
    if ".." in Path(name).parts or "\0" in name:
        raise ValueError("must not lead out of the folder of runs")
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
Text = Annotated[str, Field(strict=True)]
Name = Annotated[str, Field(strict=True, min_length=1)]
FolderName = Annotated[Name, AfterValidator(_inside)]
