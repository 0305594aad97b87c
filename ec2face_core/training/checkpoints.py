"""Checkpoints of a training, and what a resumed training must share with its beginning.

    checkpoints/step_000250/{state.safetensors, state.json}    and the LoRA as in `final`

state.json holds the counters that steer a resume, the SHA-256 of the tensors, and a digest of all
of this. A checkpoint that was damaged later is recognised by them, named, and the one before it is
used. Files and folders of other names do not matter.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import Config, ConfigError, digest_values
from ..io.paths import resolve
from ..io.sums import weights_digest
from ..runs import content_key, file_sha256, remove, whole_folder

TENSORS = "state.safetensors"
STATE = "state.json"

# Settings that may change when a training is resumed.
MAY_CHANGE = {
    "profile", "adapters", "data.validation", "data.test", "data.rare", "data.zero_shot",
    "data.zero_shot_root", "data.cache", "data.texts", "sampling", "evaluation", "baselines",
    "perception.scoring_parser", "perception.scoring_clip", "perception.scoring_facts",
    "trainer.steps", "trainer.batch_size", "trainer.accumulation", "trainer.num_processes",
    "trainer.gradient_checkpointing", "trainer.recompute_every", "trainer.compile",
    "trainer.shard", "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.log_every",
    "trainer.tracker", "trainer.validate_every", "trainer.validation_faces",
}  # fmt: skip


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    keep: int,
    write_more: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write `folder/step_<step>` and delete all but the newest `keep` checkpoints.

    A checkpoint of a later step is deleted, too: it belongs to a past that was given up.

    Args:
        folder: the checkpoints of one training.
        step: optimiser steps done.
        tensors: the training state, see `training_tensors`.
        about: further JSON-ready state.
        keep: checkpoints to keep, at least 1.
        write_more: writes further files into the checkpoint's folder.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full; the checkpoints that are there stay valid.
    """
    from safetensors.torch import save_file

    path = folder / f"step_{step:06d}"
    with whole_folder(path) as part:
        contiguous = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
        save_file(contiguous, part / TENSORS)
        state = {**about, "step": step, "sha256": file_sha256(part / TENSORS)}
        state["digest"] = _state_digest(state)
        (part / STATE).write_text(json.dumps(state, indent=2) + "\n")
        write_more(part)
    there = _newest_first(folder)
    older = [old for old in there if _step_of(old) <= step]
    later = [old for old in there if _step_of(old) > step]
    for old in (*older[max(1, keep) :], *later):
        remove(old)
    return path


def newest_checkpoint(
    folder: Path, needed: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and JSON of the newest valid checkpoint; None if there is none.

    Warns about every damaged one, by name.

    Args:
        folder: the checkpoints of one training.
        needed: names that the JSON has to hold besides step and sha256.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in _newest_first(folder):
        try:
            state = _read_state(path, needed)
            if file_sha256(path / TENSORS) != state["sha256"]:
                raise ValueError(f"the content of {TENSORS} does not have the recorded hash")
            return load_file(path / TENSORS), state
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            warnings.warn(
                f"checkpoint {path} is damaged and is not used: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return None


def _read_state(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """The JSON of a checkpoint; ValueError if it is not as `save_checkpoint` wrote it."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is no mapping")
    if missing := {"step", "sha256", *needed} - state.keys():
        raise ValueError(f"{STATE} lacks {', '.join(sorted(missing))}")
    # checkpoints of former versions have no digest
    if state.pop("digest", None) not in (None, _state_digest(state)):
        raise ValueError(f"the content of {STATE} does not have the recorded digest")
    for name in ("step", "samples"):
        value = state.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{STATE} has {name} {value!r}")
    if not isinstance(state.get("identity", {}), dict):
        raise ValueError(f"{STATE} has an identity that is no mapping")
    if state["step"] != _step_of(path):
        raise ValueError(f"{STATE} has step {state['step']}")
    return state


def _state_digest(state: Mapping[str, Any]) -> str:
    """A digest of everything in the JSON, as it reads after writing."""
    return content_key(json.loads(json.dumps(dict(state), sort_keys=True)), 64)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _newest_first(folder: Path) -> list[Path]:
    named = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,18}", path.name))
    return sorted(named, key=_step_of, reverse=True)


# ------------------------------------------------------------------------------------------ tensors


def training_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Parameters and their optimiser state by name: `<parameter>/value`, `<parameter>/exp_avg` ...

    parameters: in the order in which the optimiser received them.
    """
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()["state"]
    for i, (name, p) in enumerate(parameters.items()):
        tensors[f"{name}/value"] = p
        tensors |= {f"{name}/{key}": value for key, value in state[i].items()}
    return tensors


def restore_training(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `training_tensors` gave.

    Raises:
        ConfigError: the tensors are those of other parameters, or some are missing.
    """
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(parameters))}
    number = {name: i for i, name in enumerate(parameters)}
    for key, value in tensors.items():
        name, _, quantity = key.partition("/")
        if name not in number:
            raise ConfigError(f"the checkpoint holds {name}, which is not trained here")
        if quantity == "value":
            if value.shape != parameters[name].shape:
                raise ConfigError(f"the checkpoint holds {name} in the shape {tuple(value.shape)}")
            parameters[name].data.copy_(value)
        else:
            state[number[name]][quantity] = value
    held = {quantity for values in state.values() for quantity in values}
    if short := [name for name, i in number.items() if state[i].keys() != held]:
        raise ConfigError(f"the checkpoint lacks a part of the optimiser's state of {short[0]}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def final_steps(final: Path) -> int | None:
    """Steps of the finished LoRA in a folder; None if there is none."""
    from ..io.lora_file import LORA_FILE

    try:
        steps = json.loads((final / "provenance.json").read_text())["parameters"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if (final / LORA_FILE).is_file() else None


# ----------------------------------------------------------------------------------------- identity


def training_identity(config: Config) -> dict[str, Any]:
    """The settings that a resumed training must share, flat: `{"loss.alpha_text": 0.5, ...}`."""

    def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if prefix + key not in MAY_CHANGE:
                nested = isinstance(value, dict)
                flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return flat

    flat = flatten(digest_values(config))
    if config.trainer.schedule == "cosine":  # then the length decides every step's rate
        flat["trainer.steps"] = config.trainer.steps
    return flat


def training_content(config: Config) -> dict[str, str]:
    """Digests of what the paths of a training lead to, by setting; what is not here is left out."""
    from ..backbone import backbone_folder
    from ..data import FaceDataset
    from ..perception import LOCAL_DIR

    content: dict[str, str] = {}
    paths = {
        "backbone.path": config.backbone.path,
        "backbone.pixel_decoder": config.backbone.pixel_decoder,
        "perception.parser": config.perception.parser,
        "perception.clip": config.perception.clip.removeprefix(LOCAL_DIR),
    }
    for key, name in paths.items():
        if name and resolve(name).exists():
            content[key] = weights_digest(resolve(name))
    if "backbone.path" not in content:  # a repository of the hub
        content["backbone.path"] = weights_digest(backbone_folder(config.backbone))
    root = resolve(config.data.root)
    if root.exists():
        faces = FaceDataset(root, "train", config.data.size)
        content["data.root"] = faces.digest("image", "mask", "text")
    return content


def compare_identities(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Refuse to resume a training of other settings: ConfigError that names them.

    A setting that an older checkpoint does not record had the effect of its default. A path may
    change if it leads to the same content, which is recorded under `content`.
    """
    then = before.get("content", {})
    here = now.get("content", {})
    shared = then.keys() & here.keys()
    changes = [f"the content of {key}" for key in sorted(shared) if then[key] != here[key]]
    before = training_identity(Config()) | before
    keys = {*before, *now} - {"content", *shared} - MAY_CHANGE
    other = sorted(key for key in keys if before.get(key) != now.get(key))
    changes += [f"{key} {before.get(key)} -> {now.get(key)}" for key in other]
    if changes:
        raise ConfigError(
            f"{run_dir} holds a training with other settings ({', '.join(changes)}): use these, or "
            "another --run-dir, or delete it"
        )
