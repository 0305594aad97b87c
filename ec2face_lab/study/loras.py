"""The LoRAs behind one table: of one place and one training budget; and those of a clone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ec2face_core.config import (
    VARIANTS,
    Config,
    ConfigError,
    UserError,
    adapter_dir,
    trained_dir,
)
from ec2face_core.io.lora_file import LORA_FILE
from ec2face_core.io.paths import resolve
from ec2face_core.io.sums import list_sums
from ec2face_core.runs import whole_folder, write_tensors


def check_one_training(config: Config, methods: Iterable[str], seeds: int = 1) -> None:
    """Refuse to compare LoRAs that were trained in different ways besides their variant.

    That happens after a training of all variants was stopped: some are new, the others are those
    that came with the clone. References and comparison systems are not looked at.

    Args:
        config: the first seed's.
        methods: of the table.
        seeds: trainings of each variant.

    Raises:
        ConfigError: the LoRAs lie in different places, or differ in steps, samples or base.
    """
    found: dict[tuple[Path, Any], list[str]] = {}
    for method in methods:
        for k in range(seeds if method in VARIANTS else 0):
            folder = adapter_dir(config.replace(seed=config.seed + k), method)
            if folder.is_dir():
                found.setdefault((folder.parent, _budget(folder)), []).append(folder.name)
    if len(found) > 1:
        groups = [
            f"{', '.join(names)} of {place} ({budget or 'unknown training'})"
            for (place, budget), names in found.items()
        ]
        raise ConfigError(
            f"one table cannot mix LoRAs of different trainings: {'; '.join(groups)}. Train all of "
            "them (`make reproduce TRAIN=1`, which resumes), or remove "
            f"{config.run_dir / 'adapters'} to use the kept ones"
        )


def _budget(folder: Path) -> str:
    """Steps, samples and base that a LoRA's provenance names; "" without one."""
    try:
        record = json.loads((folder / "provenance.json").read_text())
        trained = record["parameters"]
        inputs = ", ".join(f"{name} {digest}" for name, digest in sorted(record["inputs"].items()))
        return f"{trained['steps']} steps, {trained['samples']} samples, {inputs}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def keep_loras(config: Config, seeds: int = 1) -> list[Path]:
    """Put the LoRAs that a profile has trained in place of its kept ones, in half precision.

    Args:
        config: the first seed's.
        seeds: trainings of each variant.

    Returns:
        The folders, in `config.adapters`: weights and provenance.

    Raises:
        UserError: a LoRA is not trained yet; nothing is kept then.
    """
    folders = [
        trained_dir(config.replace(seed=config.seed + k), variant)
        for k in range(seeds)
        for variant in VARIANTS
    ]
    if lacking := [folder.name for folder in folders if not (folder / LORA_FILE).is_file()]:
        raise UserError(
            f"{config.run_dir / 'adapters'} lacks {', '.join(lacking)}: train them with `make "
            f"reproduce PROFILE={config.profile} TRAIN=1 SEEDS={seeds}`"
        )
    kept = []
    for folder in folders:
        target = resolve(config.adapters) / folder.name
        with whole_folder(target) as part:
            shutil.copy(folder / "provenance.json", part)
            _write_half(folder / LORA_FILE, part / LORA_FILE)
        list_sums(target / LORA_FILE)
        kept.append(target)
    return kept


def _write_half(file: Path, copy: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        tensors = {name: weights.get_tensor(name).half() for name in weights.keys()}  # noqa: SIM118
        write_tensors(copy, tensors, weights.metadata())
