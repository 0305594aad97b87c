"""What several tests compute."""

from __future__ import annotations

import os
import signal
import time

import pytest


def step_gradients(trainer, samples, w=None):
    """The LoRA's gradients of `Trainer.step` on these samples, and its means for the log."""
    for p in trainer.parameters:
        p.grad = None
    means = trainer.step(samples, w)
    gradients = [p.grad.detach().clone() for p in trainer.parameters]
    for p in trainer.parameters:
        p.grad = None
    return gradients, means


def pipeline_with_lora(config):
    """The pipeline of a configuration with a new mask LoRA, silent."""
    from ec2face_core.mask_branch import add_mask_lora
    from ec2face_core.pipeline import EC2FacePipeline

    pipe = EC2FacePipeline.from_config(config, None)
    add_mask_lora(pipe.transformer, config.lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accuracy_row(accuracy):
    """Every value of a `MaskAccuracy` by the name that tables give it."""
    from ec2face_core.attributes import CLASSES
    from ec2face_core.metrics import OVERLAP, RECALL

    row = {name: getattr(accuracy, name) for name in RECALL}
    row |= dict(zip(CLASSES, accuracy.per_class.tolist(), strict=True))
    row |= {name: getattr(accuracy, name) for name in OVERLAP}
    for name in ("precision", "f1", "iou"):
        values = getattr(accuracy, name).tolist()
        row |= {f"{name}_{c}": value for c, value in zip(CLASSES, values, strict=True)}
    return row


def wait_for_end(pid: int) -> None:
    """Wait until a process is gone (or a zombie that nobody asks for)."""
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it lives on")
