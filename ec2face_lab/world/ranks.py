"""Ranks that share the steps of a training of the laboratory; without torchrun there is one.

Each rank draws its own samples, and gradients are averaged before the optimiser's step. Trainings
of the method have accelerate instead (`ec2face_core.guards.ranks`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

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


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every rank the mean of all ranks' gradients; they travel in one message."""
    ranks = rank_of()[1]
    if ranks == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.div_(ranks).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
