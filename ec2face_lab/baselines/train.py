"""Train one comparison system; the same call again resumes it."""

from __future__ import annotations

from pathlib import Path

import torch

from ec2face_core.config import Config, ConfigError
from ec2face_core.data import open_dataset
from ec2face_core.runs import provenance, read_metrics, write_json

from . import build
from .int8_weights import shared_file
from .system import Run
from .training_inputs import record_inputs, shared_inputs, training_inputs


def spent(run_dir: Path) -> dict[str, dict[str, float]]:
    """Steps and seconds of optimisation of every stage that was trained in a folder, by name."""
    logs = {p.parent.name: read_metrics(p.parent) for p in sorted(run_dir.glob("*/metrics.jsonl"))}
    return {
        name: {key: rows[-1][key] for key in ("step", "seconds")}
        for name, rows in logs.items()
        if rows
    }


def train_system(
    config: Config,
    name: str,
    out: Path,
    seconds: float = 0.0,
    seed: int = 42,
    shared_only: bool = False,
    device: str | None = None,
) -> None:
    """Train one comparison system for a given time, or resume it; writes weights and provenance.

    What two systems share is trained once, in `shared` beside the output folder: by the first of
    them, or before with `shared_only`, which is necessary before both are trained at the same time.

    Args:
        config: names the training faces and what the systems are built on.
        name: row of Table 1.
        out: folder of weights and state.
        seconds: training time, on one core or on a GPU; 0: what the profile gives every system.
        seed: of weights and noise.
        shared_only: train only what the system shares.
        device: where it is trained; None: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: the system shares nothing, or `out` holds a training with other settings.
    """
    system = build(name, config, device)
    shared = out.parent / "shared"
    if system.shares:
        if not shared_file(out, system.shares[0]).is_file():
            record_inputs(shared, shared_inputs(config))
        system.prepare(shared)
    if shared_only:
        if not system.shares:
            raise ConfigError(f"{system.name} shares nothing: leave out --shared")
        print(f"shared by {system.name} and others: {shared}")
        return
    seconds = seconds or system.budget(config)
    inputs = training_inputs(config, type(system), out, seconds, seed)
    record_inputs(out, inputs)
    system.fit(open_dataset(config, "train"), Run(out, seconds, seed))
    system.save(out)
    before = {stage: last for stage, last in spent(shared).items() if stage in system.shares}
    record = provenance(
        config, system=system.name, seed=seed, budget=seconds, stands_on=inputs,
        stages=spent(out), shared=before,
        parameters=system.parameters(), threads=torch.get_num_threads(),
        trained_on=system.device.type,
    )  # fmt: skip
    write_json(out / "provenance.json", record)
    print(f"{system.name}: {system.parameters():,} parameters, {out}")
