"""Ranks that share the steps of a training of the laboratory; without torchrun there is one.

Each rank draws its own samples, and gradients are averaged before the optimiser's step. Trainings
of the method have accelerate instead (`ec2face_core.guards.ranks`).
"""

from __future__ import annotations

import os

import torch.distributed as dist

from ec2face_core.config import ConfigError


def join_ranks() -> None:
    """Join the other ranks that torchrun has started; without it, do nothing."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")


def rank_of() -> tuple[int, int]:
    """Number of this rank, from 0, and of all ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_of(batch: int) -> int:
    """A rank's samples of a step of `batch` samples.

    Raises:
        ConfigError: the ranks cannot share them equally.
    """
    ranks = rank_of()[1]
    if batch % ranks:
        raise ConfigError(f"{ranks} ranks cannot share a step of {batch} samples equally")
    return batch // ranks
