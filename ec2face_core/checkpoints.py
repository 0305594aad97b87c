"""Training state on disk: each checkpoint is one folder that appears whole or not at all.

`checkpoints/step_000250/{state.safetensors, state.json}`. The JSON names the content's hash, so a
folder that was truncated later (a full disk, an interrupted copy) is recognised, named, and the one
before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

TENSORS, ABOUT = "state.safetensors", "state.json"


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step_<step>` and delete all but the newest `keep` checkpoints.

    Raises:
        OSError: the disk is full; the checkpoints that are there stay valid.
    """

    def write(part: Path) -> None:
        from safetensors.torch import save_file

        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / TENSORS)
        content = about | {"step": step, "sha256": _hash(part / TENSORS)}
        (part / ABOUT).write_text(json.dumps(content, indent=2) + "\n")

    path = folder / f"step_{step:06d}"
    write_folder(path, write)
    for old in _checkpoints(folder)[max(1, keep) :]:
        shutil.rmtree(old)
    return path


def newest_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and JSON of the newest valid checkpoint; None if there is none.

    Warns about every damaged one, by name.
    """
    from safetensors.torch import load_file

    for path in _checkpoints(folder):
        try:
            about = json.loads((path / ABOUT).read_text())
            if _hash(path / TENSORS) != about["sha256"]:
                raise ValueError(f"the content of {TENSORS} does not have the recorded hash")
            return load_file(path / TENSORS), about
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(
                f"checkpoint {path} is damaged and is not used: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return None


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside `path` and move it there when it is complete, replacing what was."""
    from safetensors import SafetensorError

    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed here
        shutil.rmtree(left)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        write(part)
        if path.exists():
            shutil.rmtree(path)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        raise OSError(
            f"cannot write {path}: {error} ({free:.1f} GB free). Make room and run the same "
            "command again: it resumes from the newest checkpoint"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step_*"), key=lambda p: int(p.name.split("_")[1]), reverse=True)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
