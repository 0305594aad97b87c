"""Keys of data and code, and the folders of results that such keys name."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config, ConfigError, resolve
from ec2face_core.data import FaceDataset
from ec2face_core.runs import content_key, path_digest, whole_file, write_json

if TYPE_CHECKING:
    from pandas import DataFrame


ABOUT = "about.json"


def data_digest(dataset: FaceDataset) -> str:
    """Names a dataset's content: ids, captions, and names and sizes of its pictures and masks."""
    ids = set(dataset.ids)
    root = Path(dataset.root)
    content: list[Any] = [dataset.size, dataset.ids, path_digest(root / "manifest.csv")]
    for kind in ("image", "mask"):
        files = (f for f in os.scandir(root / kind) if Path(f.name).stem in ids)
        content.append(sorted((f.name, f.stat().st_size) for f in files))
    return content_key(content, digits=16)


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
    if note.is_file():
        if json.loads(note.read_text())["key"] == about["key"]:
            return
        raise ConfigError(
            f"{folder} holds pictures of other weights or settings: remove it, or name another "
            "folder"
        )
    # another process may have claimed the folder since, and begun to write
    if any(folder.glob("*.png")) and not note.is_file():
        raise ConfigError(f"{folder} holds pictures of unknown origin: name another folder")
    write_json(note, about)


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
