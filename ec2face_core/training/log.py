"""What a training tells: on the terminal, in metrics.jsonl, and to a tracker."""

from __future__ import annotations

import importlib.util
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ConfigError
from ..guards.checks import NotFiniteError
from ..runs import add_metrics, progress_line
from .checkpoints import training_identity

METRICS = ("t", "total", "flow", "text", "mask", "beta", "unweighted_flow", "grad_norm")


class TrainingLog:
    """The log of one run; values stay on the GPU until they are written.

    Args:
        run_dir: metrics.jsonl and the tracker's files lie there.
        config: of the training.
        accelerator: its ranks' values are averaged, its first process writes.
    """

    def __init__(self, run_dir: Path, config: Config, accelerator: Any) -> None:
        self.run_dir = run_dir
        self.config = config
        self.accelerator = accelerator
        self._unlogged: list[tuple[dict[str, float], Tensor]] = []

    def begin(self, variant: str) -> None:
        """Start the tracker."""
        if self.config.trainer.tracker == "none":
            return
        kinds = (int, float, str, bool)
        settings = training_identity(self.config)
        flat = {k: v if isinstance(v, kinds) else str(v) for k, v in settings.items()}
        wandb = {"name": variant, "dir": str(self.run_dir)}
        self.accelerator.init_trackers("tracking", flat, {"wandb": wandb})

    def add(self, row: dict[str, float], values: Tensor) -> None:
        """A step: what the host knows, and the device's values of `METRICS`."""
        self._unlogged.append((row, values))

    def write(self) -> None:
        """Write the steps since the last call, and print their mean above the progress bar.

        Raises:
            NotFiniteError: the loss diverged.
        """
        from tqdm.auto import tqdm

        means = torch.stack([values for _, values in self._unlogged])
        means = self.accelerator.reduce(means, "mean").tolist()
        memory = peak_memory(self.accelerator.device)
        rows = [
            row | dict(zip(METRICS, values, strict=True)) | {"peak_memory_gb": memory}
            for (row, _), values in zip(self._unlogged, means, strict=True)
        ]
        self._unlogged = []
        if self.accelerator.is_main_process:
            add_metrics(self.run_dir, rows)
            tqdm.write(progress_line(rows, self.config.trainer.steps))
            sys.stdout.flush()
        for row in rows:
            self.track(row, int(row["step"]))
        bad = [r["step"] for r in rows if not math.isfinite(r["total"] + r["grad_norm"])]
        if bad and self.config.trainer.mixed_precision != "fp16":  # whose scaler skips such steps
            raise NotFiniteError(
                f"the loss or gradient of step {bad[0]} is not finite; the newest checkpoint is "
                "from before. Lower trainer.learning_rate, or set loss.clip"
            )

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Give values to the tracker, if there is one."""
        if self.config.trainer.tracker != "none":
            self.accelerator.log(dict(values), step=step)

    def end(self) -> None:
        """Close the tracker."""
        if self.config.trainer.tracker != "none":
            self.accelerator.end_training()


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed, before anything is computed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"trainer.tracker {name}: `pip install {name}` first, or set it to none")


def peak_memory(device: torch.device) -> float:
    """Largest memory in GB so far: of this process's tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
