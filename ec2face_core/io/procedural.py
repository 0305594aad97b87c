"""Folders of procedural faces: made once, whole, with the recipe beside them.

    root/faces.json   maker, seed, numbers of faces, size and look

A folder of another recipe than the configured one is refused, since its pictures would stand under
the name of a configuration that did not make them.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError, DataConfig
from ..runs import part_name, remove, remove_leftovers, write_json

RECIPE = "faces.json"


def recipe(data: DataConfig, seed: int, counts: Mapping[str, int], look: str) -> dict[str, Any]:
    """What decides the faces of a folder, JSON-ready.

    Args:
        data: maker and size are used.
        seed: of the faces.
        counts: split -> number of faces.
        look: `first`, `second`, or `rare`: the first, with frequent accessories.
    """
    values = {"maker": data.maker, "seed": seed, "splits": dict(counts)}
    return values | {"size": data.size, "look": look}


def make_faces(root: Path, wanted: Mapping[str, Any]) -> None:
    """Make the faces of a recipe in `root`; if another process has made them first, keep those.

    Raises:
        ConfigError: the recipe's maker is no function `module:name`.
        OSError: the disk is full; nothing half-made stays.
    """
    module, _, name = wanted["maker"].partition(":")
    try:
        maker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"data.maker {wanted['maker']!r} is no `module:name`: {error}") from error
    root.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root.parent)
    part = part_name(root)
    try:
        maker(part, wanted["seed"], wanted["splits"], wanted["size"], wanted["look"])
        write_json(part / RECIPE, wanted)
        os.rename(part, root)
    except OSError as error:
        if not root.exists():
            raise OSError(f"cannot make the faces of {root}: {error}") from error
    finally:
        remove(part)


def check_recipe(root: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse a folder of another recipe; one without a recipe is of a former version, and passes.

    Raises:
        ConfigError: the folder's faces are others than configured, or the recipe is damaged.
    """
    path = root / RECIPE
    if not path.is_file():
        return
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove the folder {root}") from error
    if made != dict(wanted):
        made = made if isinstance(made, dict) else {}
        changed = [key for key in wanted if made.get(key) != wanted[key]]
        values = ", ".join(f"{key} {made.get(key)} instead of {wanted[key]}" for key in changed)
        raise ConfigError(
            f"{root} holds procedural faces of another recipe ({values}): remove the folder, or "
            "name another one in data.root or data.zero_shot_root"
        )
