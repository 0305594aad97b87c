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


def pipeline_with_lora(config):
    """The pipeline of a configuration with a new mask LoRA, silent."""
    from ec2face_core.mask_branch import add_mask_lora
    from ec2face_core.pipeline import EC2FacePipeline

    pipe = EC2FacePipeline.from_config(config, None)
    add_mask_lora(pipe.transformer, config.lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe
