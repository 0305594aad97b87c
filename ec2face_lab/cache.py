"""Keys of data and code, and the folders of results that such keys name."""

from __future__ import annotations

import ast
import importlib.util
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config, ConfigError
from ec2face_core.data import FaceDataset
from ec2face_core.io.paths import resolve
from ec2face_core.runs import content_key, file_sha256, remove_leftovers, whole_file, write_json

if TYPE_CHECKING:
    from pandas import DataFrame


ABOUT = "about.json"


def data_digest(dataset: FaceDataset) -> str:
    """Names what pictures and scores depend on: pictures, masks and the manifest's captions."""
    return dataset.digest("image", "mask", "manifest")


def code_digest(modules: Iterable[str]) -> str:
    """A hash of modules' syntax trees without docstrings; it changes when the code changes.

    Args:
        modules: full names, such as `ec2face_core.flow`. Comments, layout and docstrings do not
            count.
    """
    trees = []
    for name in modules:
        tree = ast.parse(Path(importlib.util.find_spec(name).origin).read_text())
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if documented and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        trees.append(ast.dump(tree))
    return content_key(trees, digits=16)


def claim(folder: Path, about: dict[str, str]) -> None:
    """Create a folder for pictures and note their key in it, or check that it is theirs.

    Raises:
        ConfigError: the folder holds other pictures.
    """
    note = folder / ABOUT
    remove_leftovers(folder)
    if note.is_file():
        if read_note(note).get("key") == about["key"]:
            return
        raise ConfigError(
            f"{folder} holds pictures of other weights or settings: remove it, or name another "
            "folder"
        )
    # another process may have claimed the folder since, and begun to write
    if any(folder.glob("*.png")) and not note.is_file():
        raise ConfigError(f"{folder} holds pictures of unknown origin: name another folder")
    write_json(note, about)


def read_note(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it or its folder") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged (no mapping): remove it or its folder")
    return content


def kept_file(config: Config, name: str) -> Path:
    """The CSV of a study that trains for hours: this profile's own, else the one beside its LoRAs.

    name: of the study, `sweeps` or `fairness`.
    """
    retrained = config.run_dir / name / f"{name}.csv"
    return retrained if retrained.is_file() else resolve(config.adapters).with_name(retrained.name)


def write_frame(path: Path, table: DataFrame) -> None:
    """Write a table as CSV in one move."""
    with whole_file(path) as part:
        table.to_csv(part, index=False)


def record_hash(path: Path) -> None:
    """Write the hash of a finished file beside it, as `sha256sum -c` reads it."""
    with whole_file(_hash_file(path)) as part:
        part.write_text(f"{file_sha256(path)}  {path.name}\n")


def is_whole(path: Path) -> bool:
    """Whether a kept file is there with its recorded content; a changed one is told by a warning.

    A file without a recorded hash is taken as it is: it is of a former version.
    """
    if not path.is_file():
        remove_leftovers(path.parent)
        return False
    recorded = _hash_file(path)
    if not recorded.is_file():
        return True
    whole = recorded.read_text(errors="replace").split()[:1] == [file_sha256(path)]
    if not whole:
        warnings.warn(f"{path} was changed or damaged and is made again", stacklevel=2)
    return whole


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
