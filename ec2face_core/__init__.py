"""EC²Face: explicit conditional consistency diffusion for faces from a mask and a text.

Where the paper's equations are:

    1, 4      attention over [text, noise, mask] tokens   mask_branch.predict_velocity, MaskBranch
    2         sampling by Euler steps                     pipeline.EC2FacePipeline
    3, 11     flow matching, with weights                 losses.flow_matching_loss; flow
    5         reverse estimate                            flow.reverse_estimate
    6, 7, 8   text and mask consistency, beta(t)          losses
    9, 12     the total; its gradient in pixel space      losses.total_loss; consistency
    10        long-tail weights                           losses.class_weights, latent_weights
    13        condition dropout                           losses.drop_conditions
    all       the training step                           trainer.Trainer.step

The names below are those that a new experiment imports. Those that need diffusers, facer or
open_clip (5-20 s to import) are imported on first use.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .attributes import CLASSES, GROUPS, PALETTE
from .config import load_profile
from .data import FaceDataset, FaceSample, open_dataset
from .flow import interpolate, reverse_estimate
from .losses import (
    beta,
    class_weights,
    flow_matching_loss,
    long_tail_weights,
    mask_consistency_loss,
    text_consistency_loss,
    total_loss,
)
from .metrics import mask_accuracy

if TYPE_CHECKING:
    from .mask_branch import predict_velocity
    from .perception import ClipScorer, FaceParser
    from .pipeline import EC2FacePipeline
    from .trainer import Trainer

# It reports missing CPU kernels when diffusers or transformers import it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_LAZY = {
    "ClipScorer": "perception",
    "EC2FacePipeline": "pipeline",
    "FaceParser": "perception",
    "Trainer": "trainer",
    "predict_velocity": "mask_branch",
}

__all__ = [
    "CLASSES",
    "GROUPS",
    "PALETTE",
    "ClipScorer",
    "EC2FacePipeline",
    "FaceDataset",
    "FaceParser",
    "FaceSample",
    "Trainer",
    "beta",
    "class_weights",
    "flow_matching_loss",
    "interpolate",
    "load_profile",
    "long_tail_weights",
    "mask_accuracy",
    "mask_consistency_loss",
    "open_dataset",
    "predict_velocity",
    "reverse_estimate",
    "text_consistency_loss",
    "total_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
