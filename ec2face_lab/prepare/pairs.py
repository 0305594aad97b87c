"""Files of one face whose names differ by zero padding only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from ec2face_core.data import without_padding

T = TypeVar("T")


def paired(names: Iterable[str], files: Mapping[str, T]) -> dict[str, T]:
    """The same files under the names that theirs differ from by zero padding only.

    A file that more than one name, or that with other files one name would suit, keeps its own.
    """
    names = list(names)
    wanted: dict[str, list[str]] = {}
    spare: dict[str, list[str]] = {}
    for name in set(names) - files.keys():
        wanted.setdefault(without_padding(name), []).append(name)
    for name in files.keys() - set(names):
        spare.setdefault(without_padding(name), []).append(name)
    other = {
        spare[plain][0]: found[0]
        for plain, found in wanted.items()
        if len(found) == 1 and len(spare.get(plain, ())) == 1
    }
    return {other.get(name, name): file for name, file in files.items()}
