"""What a training stands on, kept beside its weights as `about.json`.

Nothing may be resumed, counted as trained, or drawn on anything else: another autoencoder, another
time, or another network that two systems share.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config, ConfigError, resolve
from ec2face_core.data import open_dataset
from ec2face_core.perception import LOCAL_DIR
from ec2face_core.runs import path_digest

from ..cache import ABOUT, data_digest

if TYPE_CHECKING:
    from .system import System


def origin(config: Config, system: type[System], out: Path, seconds: float, seed: int) -> dict:
    """What a system's own training in the folder `out` stands on; `seconds` is its time."""
    about = _common(config, seed) | {"seconds": seconds}
    if system.own_masks:
        about["published_masks"] = config.baselines.published_masks
    return about | {name: path_digest(path) for name, path in system.grounds(config, out).items()}


def shared_origin(config: Config) -> dict[str, Any]:
    """What the training of a network that two systems share stands on."""
    own = config.baselines
    return _common(config, config.seed) | {"seconds": own.foundation_seconds, "pool": own.pool}


def stands_on(folder: Path) -> dict[str, Any]:
    """What `claim` noted in a folder; empty if nothing."""
    path = folder / ABOUT
    return json.loads(path.read_text()) if path.is_file() else {}


def claim(folder: Path, about: dict[str, Any]) -> None:
    """Note what a training stands on, or see that it is what the folder's training stood on.

    Raises:
        ConfigError: the folder holds a training that stands on something else.
    """
    if found := stands_on(folder):
        other = [
            f"{key} {found.get(key)!r} instead of {about.get(key)!r}"
            for key in sorted(found | about)
            if found.get(key) != about.get(key)
        ]
        if other:
            raise ConfigError(
                f"{folder} holds a training with {', '.join(other)}: delete it, or name another "
                "--out"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{ABOUT}.{os.getpid()}"  # two processes may claim what they share at once
    part.write_text(json.dumps(about, indent=2) + "\n")
    part.replace(folder / ABOUT)


def _common(config: Config, seed: int) -> dict[str, Any]:
    clip = config.perception.clip.removeprefix(LOCAL_DIR)
    return {
        "seed": seed,
        "data": data_digest(open_dataset(config, "train")),
        "autoencoder": path_digest(resolve(config.backbone.path) / "vae"),
        "clip": path_digest(resolve(clip)),
    }
