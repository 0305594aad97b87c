"""Content keys and the folders they name: what lies there is never stale."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config, ConfigError, resolve
from ec2face_core.data import FaceDataset
from ec2face_core.runs import path_digest

if TYPE_CHECKING:
    from pandas import DataFrame


ABOUT = "about.json"


def data_digest(dataset: FaceDataset) -> str:
    """Names a dataset's content: ids, captions, and names and sizes of its pictures and masks."""
    ids, root = set(dataset.ids), Path(dataset.root)
    about: list[Any] = [dataset.size, dataset.ids, path_digest(root / "manifest.csv")]
    for kind in ("image", "mask"):
        found = (f for f in os.scandir(root / kind) if Path(f.name).stem in ids)
        about.append(sorted((f.name, f.stat().st_size) for f in found))
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def code_digest(modules: Sequence[str]) -> str:
    """A hash of these modules' syntax trees without docstrings: changed code makes results anew.

    Args:
        modules: full names, such as `ec2face_core.flow`. Neither comments, layout nor docstrings
            count.
    """
    digests = []
    for name in modules:
        spec = importlib.util.find_spec(name)
        tree = ast.parse(Path(spec.origin).read_text())
        for node in ast.walk(tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if documented and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        digests.append(hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16])
    return " ".join(digests)


def claim(folder: Path, about: dict[str, str]) -> None:
    """Make the folder ours, or see that it is; refuse one that holds other pictures."""
    kept = folder / ABOUT
    if kept.is_file():
        if json.loads(kept.read_text())["key"] == about["key"]:
            return
        raise ConfigError(
            f"{folder} holds pictures of other weights or settings: remove it or name another"
        )
    if any(folder.glob("*.png")) and not kept.is_file():  # another rank may just have begun
        raise ConfigError(f"{folder} holds pictures of unknown origin: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f".{ABOUT}.{os.getpid()}")
    part.write_text(json.dumps(about, indent=2) + "\n")
    part.replace(kept)


def kept_file(config: Config, name: str) -> Path:
    """Where rows of hours of training are: this profile's own, else those beside its adapters."""
    own = config.run_dir / name / f"{name}.csv"
    return own if own.is_file() else resolve(config.adapters).with_name(own.name)


def write_frame(path: Path, table: DataFrame) -> None:
    """Write a table as CSV in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    table.to_csv(part, index=False)
    part.replace(path)
