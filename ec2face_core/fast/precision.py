"""In which precision a training step computes.

A base in float32 runs under autocast, as `trainer.mixed_precision` says. A base that is stored in
bfloat16, as FLUX.1-dev is, computes in bfloat16 without it: under autocast its norms return
float32, which every following layer casts back, a fifth of the operations of a forward. The LoRA
stays in float32 in both. Decoder, parser and CLIP are always under autocast.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..config import Config, TrainerConfig


def computes_natively(config: Config) -> bool:
    """Whether the transformer runs in its own precision, without autocast."""
    return config.backbone.dtype == "bfloat16" and config.trainer.mixed_precision == "bf16"


def accelerated(config: Config) -> TrainerConfig:
    """The trainer's settings for accelerate, which wraps the transformer's forward in autocast."""
    if computes_natively(config):
        return dataclasses.replace(config.trainer, mixed_precision="no")
    return config.trainer


def guides_precision(config: Config, accelerator: Any) -> AbstractContextManager:
    """The autocast of decoder and guides."""
    if computes_natively(config):
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()
