"""The processes of one training: they are as many as configured, alone in their folder, and agree.

A training holds a lock on its folder, since two of them would write each other's files. Ranks
compare what they have read before the first collective operation: gradients of different steps
would be averaged silently.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError, TrainerConfig

LOCK = ".lock"
FOREIGN = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DYNAMO_BACKEND")


def make_accelerator(
    config: TrainerConfig, device: str | None = None, folder: Path | None = None
) -> Any:
    """Accelerate with DDP over the LoRA only, checked against the configuration.

    Every process holds the whole frozen base (or 1/n of it, `trainer.shard`), and DDP averages the
    LoRA's gradients: 43 MB at paper scale.

    Args:
        config: mixed_precision, num_processes and tracker are used.
        device: "cpu" keeps it off a GPU; None: accelerate chooses.
        folder: of the tracker's files.

    Raises:
        ConfigError: it was started on another number of processes, or cannot work on this machine.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    for name in FOREIGN:
        if os.environ.get(name, "no").lower() not in ("", "no", "false", "0"):
            raise ConfigError(
                f"{name} is set, as by an `accelerate launch` with a configuration of its own, "
                "which would change this training. Start it by torchrun (`python -m "
                "ec2face_core.train --help`); trainer.shard and trainer.compile are its settings"
            )
    cpu = device == "cpu" or not torch.cuda.is_available()
    if cpu and config.mixed_precision == "fp16":
        raise ConfigError("trainer.mixed_precision: fp16 needs a GPU; use bf16 or no")
    if cpu and device != "cpu" and torch.backends.mps.is_available():
        warnings.warn("training does not use this Mac's GPU (mps), but its CPU", stacklevel=2)
    AcceleratorState._reset_state()  # else a notebook's second trainer has the first's precision
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=cpu,  # without it each rank of a machine without a GPU runs alone
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=folder,
        kwargs_handlers=[ddp],
    )
    if accelerator.num_processes != config.num_processes:
        raise ConfigError(
            f"started on {accelerator.num_processes} processes, but trainer.num_processes is "
            f"{config.num_processes}: set it to the number that you start"
        )
    return accelerator


@contextmanager
def locked(folder: Path, work: str = "training") -> Iterator[None]:
    """Keep others out of a folder; the system lifts the lock when this process ends.

    Args:
        folder: where the work is done.
        work: what it is called.

    Raises:
        ConfigError: another such work is under way in the folder.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                f"another {work} ({holder}) is at work in {folder}: wait for it or stop it, or "
                "name another folder"
            ) from error
        except OSError as error:  # a file system without locks
            warnings.warn(f"{folder} cannot be locked ({error})", RuntimeWarning, stacklevel=3)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def agree(accelerator: Any, view: Mapping[str, Any], what: str) -> None:
    """Compare what every rank has read; all ranks have to call it.

    Args:
        accelerator: of the ranks.
        view: JSON-ready values of this rank, by name.
        what: names the view, for the message.

    Raises:
        ConfigError: the views differ.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    views = gather_object([dict(view)])
    for rank, other in enumerate(views):
        if other != views[0]:
            raise ConfigError(
                f"the ranks see different {what}: rank 0 {views[0]}, rank {rank} {other}. All of "
                "them must see one disk, and no other training may write to it: end every process "
                "of the former training and start again"
            )
