"""What a training builds on, kept beside its weights as `about.json`.

A training is neither resumed nor counted as done with other inputs: other data, another
autoencoder or CLIP, another time, or another network that two systems share.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config, ConfigError
from ec2face_core.data import open_dataset
from ec2face_core.io.paths import resolve
from ec2face_core.perception import LOCAL_DIR
from ec2face_core.runs import path_digest, write_json

from ..cache import ABOUT, data_digest, read_note

if TYPE_CHECKING:
    from .system import System


def training_inputs(
    config: Config, system: type[System], out: Path, seconds: float, seed: int
) -> dict[str, Any]:
    """Inputs of a system's own training, as JSON values.

    Args:
        config: the profile.
        system: the class of the system.
        out: folder of the training.
        seconds: time of the training.
        seed: of the training.
    """
    inputs = _common(config, seed) | {"seconds": seconds}
    if system.own_masks:
        inputs["published_masks"] = config.baselines.published_masks
    frozen = system.frozen_files(config, out)
    return inputs | {name: path_digest(path) for name, path in frozen.items()}


def shared_inputs(config: Config) -> dict[str, Any]:
    """Inputs of the training of a network that two systems share, as JSON values."""
    own = config.baselines
    return _common(config, config.seed) | {"seconds": own.foundation_seconds, "pool": own.pool}


def recorded_inputs(folder: Path) -> dict[str, Any]:
    """What `record_inputs` wrote in a folder; empty if nothing."""
    path = folder / ABOUT
    return read_note(path) if path.is_file() else {}


def record_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Record the inputs of a training, or check that the folder's training has the same.

    Raises:
        ConfigError: the folder holds a training with other inputs.
    """
    recorded = recorded_inputs(folder)
    changes = [
        f"{key} {recorded.get(key)!r} instead of {inputs.get(key)!r}"
        for key in sorted(recorded | inputs)
        if recorded.get(key) != inputs.get(key)
    ]
    if not recorded:
        write_json(folder / ABOUT, inputs)
    elif changes:
        raise ConfigError(
            f"{folder} holds a training with {', '.join(changes)}: delete it, or name another --out"
        )


def _common(config: Config, seed: int) -> dict[str, Any]:
    clip = config.perception.clip.removeprefix(LOCAL_DIR)
    return {
        "seed": seed,
        "data": data_digest(open_dataset(config, "train")),
        "autoencoder": path_digest(resolve(config.backbone.path) / "vae"),
        "clip": path_digest(resolve(clip)),
    }
