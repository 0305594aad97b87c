"""The LoRAs behind one table: of one place and one training budget."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ec2face_core.config import VARIANTS, Config, ConfigError, adapter_dir


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
