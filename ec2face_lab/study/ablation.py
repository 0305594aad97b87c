"""The variants of EC²Face from a notebook: latent cache, short runs, full trainings, provenance.

Training happens in a child process (`launch.run`) on as many processes as the profile names.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ec2face_core.config import VARIANTS, Config, adapter_dir, adapter_name
from ec2face_core.data import open_dataset
from ec2face_core.flow import interpolate, target_velocity
from ec2face_core.io.lora_file import LORA_FILE
from ec2face_core.io.paths import resolve
from ec2face_core.latents import LatentCache, cache_folder, encode_dataset
from ec2face_core.losses import flow_matching_loss
from ec2face_core.mask_branch import predict_velocity
from ec2face_core.runs import read_metrics

from ..launch import run

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from ec2face_core.pipeline import EC2FacePipeline


def cache_latents(config: Config) -> LatentCache:
    """Encode the training faces and masks that are not cached yet; captions follow in training."""
    import torch

    from ec2face_core.backbone import load_backbone

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return encode_dataset(
        open_dataset(config, "train"),
        lambda: load_backbone(config.backbone, ("vae", "text")).to(device),
        config,
        cache_folder(config),
        captions=lambda cache: (),
    )


def short_config(config: Config, steps: int, processes: int = 1) -> Config:
    """The configuration of a short run that sees the profile's samples in each step.

    Args:
        config: the profile.
        steps: optimiser steps, at most those of the profile; a tenth of them are warm-up.
        processes: ranks, which divide the samples of a step.
    """
    c = config.trainer
    steps = min(steps, c.steps)
    samples = c.batch_size * c.accumulation * c.num_processes
    batch_size = max(1, samples // (processes * c.accumulation))
    short = {"steps": steps, "warmup": min(c.warmup, steps // 10)}
    return config.replace(trainer={**short, "batch_size": batch_size, "num_processes": processes})


def short_run(config: Config, steps: int, method: str = "both", processes: int = 1) -> Path:
    """Train a variant for a few steps in child processes; returns its run folder.

    The folder is named by the configuration, so another one starts a new run, and the same one
    resumes.

    Args:
        config: the profile.
        steps: as for `short_config`.
        method: one of `VARIANTS`.
        processes: as for `short_config`.
    """
    config = short_config(config, steps, processes)
    folder = config.run_dir / "training" / f"short-{method}-{config.digest()}"
    _train(config, method, folder)
    return folder


def flow_error(
    pipe: EC2FacePipeline,
    batch: Mapping[str, Any],
    masked: bool = True,
    weights: Tensor | None = None,
    seed: int = 0,
) -> float:
    """Flow matching (Eq. 3, with weights Eq. 11) of a batch, the mean over nine fixed times.

    Args:
        pipe: its transformer, with the LoRA that is loaded.
        batch: z, z_mask and text, as `reliability.Estimator.batch` gives them.
        masked: with the masks; otherwise from the text alone.
        weights: Eq. 10 on the latent grid, `b h w`; None: Eq. 3.
        seed: of the noise.
    """
    import torch

    z = batch["z"]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
    mask = batch["z_mask"] if masked else None
    errors = []
    for time in np.linspace(0.1, 0.9, 9):
        t = torch.full((len(z),), float(time), device=z.device)
        z_t = interpolate(z, noise, t)
        with torch.no_grad():
            v = predict_velocity(pipe.transformer, z_t, t, batch["text"], mask)
        errors.append(float(flow_matching_loss(v, target_velocity(z, noise), weights).mean()))
    return float(np.mean(errors))


def retrain(config: Config, methods: Sequence[str] = tuple(VARIANTS), seeds: int = 1) -> None:
    """Train variants completely and put their LoRAs where `adapter_dir` finds them first.

    The same call resumes a stopped training; a finished one is only checked.

    Args:
        config: the first seed's.
        methods: some of `VARIANTS`.
        seeds: trainings of each variant, with the seeds `config.seed`, + 1, + 2 ...
    """
    for k, method in itertools.product(range(seeds), methods):
        seeded = config.replace(seed=config.seed + k)
        name = adapter_name(seeded, method)
        _train(seeded, method, seeded.run_dir / "training" / name)  # which publishes it


def _train(config: Config, method: str, folder: Path) -> None:
    settings = folder.with_suffix(".yaml")
    config.save(settings)
    run(
        "ec2face_core.train", "--config", str(settings), "--variant", method,
        "--run-dir", str(folder), num_processes=config.trainer.num_processes, logs=folder / "logs",
    )  # fmt: skip


def lora_table(config: Config) -> DataFrame:
    """Where each variant's LoRA lies and how it was trained, one row for each variant."""
    import pandas as pd

    rows = []
    for method, differences in VARIANTS.items():
        folder = adapter_dir(config, method)
        path = folder / "provenance.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        parameters = record.get("parameters", {})
        rows.append(
            {
                "method": method,
                "differs in": ", ".join(f"{k} {v}" for k, v in differences.get("loss", {}).items()),
                "folder": folder.relative_to(resolve("")).as_posix(),
                "steps": parameters.get("steps"),
                "samples": parameters.get("samples"),
                "minutes": round((record.get("seconds") or 0) / 60, 1),
                "LoRA (MB)": round((folder / LORA_FILE).stat().st_size / 2**20, 2),
            }
        )
    return pd.DataFrame(rows)


def parameter_count(path: Path) -> int:
    """How many weights a safetensors file holds; its tensors are not read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118


def describe_training(run_dir: Path) -> str:
    """From a run's log: flow matching at its start and end."""
    flow = np.array([row["unweighted_flow"] for row in read_metrics(run_dir)])
    few = max(1, len(flow) // 4)
    return (
        f"Flow matching without weights: {flow[:few].mean():.3f} over the first {few} steps, "
        f"{flow[-few:].mean():.3f} over the last {few}."
    )
