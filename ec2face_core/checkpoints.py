"""Training state on disk: each checkpoint is one folder that appears whole or not at all.

`checkpoints/step_000250/{state.safetensors, state.json}`. The JSON names the content's hash, so a
folder that was truncated later (a full disk, an interrupted copy) is recognised, named, and the one
before it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .config import Config, ConfigError

# What may change between the runs of one training; everything else decides the weights.
FREE = {
    "profile", "adapters", "data.validation", "sampling", "evaluation", "baselines",
    "perception.scoring_parser", "perception.scoring_clip",
    "trainer.steps", "trainer.batch_size", "trainer.accumulation", "trainer.num_processes",
    "trainer.gradient_checkpointing", "trainer.recompute_every", "trainer.compile",
    "trainer.shard", "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.log_every",
}  # fmt: skip
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


def training_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Parameters and their optimiser state by name: `<parameter>/value`, `<parameter>/exp_avg` ...

    parameters: in the order in which the optimiser got them.
    """
    tensors, state = {}, optimizer.state_dict()["state"]
    for i, (name, p) in enumerate(parameters.items()):
        tensors |= {f"{name}/value": p} | {f"{name}/{k}": v for k, v in state[i].items()}
    return tensors


def restore_training(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `training_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(parameters))}
    number = {name: i for i, name in enumerate(parameters)}
    for key, value in tensors.items():
        name, _, what = key.partition("/")
        if what == "value":
            parameters[name].data.copy_(value)
        else:
            state[number[name]][what] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def training_identity(config: Config) -> dict[str, Any]:
    """Every setting that decides the weights, flat: `{"loss.alpha_text": 0.5, ...}`."""

    def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if prefix + key not in FREE:
                nested = isinstance(value, dict)
                flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return flat

    flat = flatten(dataclasses.asdict(config))
    if config.trainer.schedule == "cosine":  # then the length decides every step's rate
        flat["trainer.steps"] = config.trainer.steps
    return flat


def compare_identities(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Refuse to go on with a training of other settings: ConfigError that names them.

    A setting that an older checkpoint does not know had the effect of its default.
    """
    before = training_identity(Config()) | before
    other = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if other:
        changes = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in other)
        raise ConfigError(
            f"{run_dir} holds a training with other settings ({changes}): take these, or another "
            "--run-dir, or delete it"
        )


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
