"""What several tests compute."""

from __future__ import annotations


def step_gradients(trainer, samples, w=None):
    """The LoRA's gradients of `Trainer.step` on these samples, and its means for the log."""
    for p in trainer.parameters:
        p.grad = None
    means = trainer.step(samples, w)
    gradients = [p.grad.detach().clone() for p in trainer.parameters]
    for p in trainer.parameters:
        p.grad = None
    return gradients, means
