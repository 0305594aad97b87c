"""The frozen base in shards over several processes (`trainer.shard`).

By default every process holds the whole frozen base (24 GB for FLUX.1-dev in bfloat16). For GPUs
that cannot hold it, FSDP2 leaves each process 1/n and gathers one block at a time. The LoRA stays
whole on every process, so optimiser, checkpoints and files are the same in both.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from .blocks import blocks_of

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


def shard_base(transformer: FluxTransformer2DModel, accelerator: Any) -> FluxTransformer2DModel:
    """Leave this process 1/n of each block's frozen weights, on its device, instead of DDP.

    Args:
        transformer: FluxTransformer2DModel on the CPU, frozen except for its LoRA.
        accelerator: of several processes; its precision is the forward's.

    Returns:
        The transformer. Its LoRA is whole, and its gradients are this process's alone: see
        `average_gradients`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Single blocks return slices of one tensor; the transformer changes none of them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    device = accelerator.device
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    trainable = {p for p in transformer.parameters() if p.requires_grad}
    for module in (*blocks_of(transformer), transformer):  # block by block: to the device, sharded
        fully_shard(module, mesh=mesh, ignored_params=trainable)
    for p in trainable:
        p.data = p.data.to(device)
    transformer.forward = accelerator.autocast()(transformer.forward)  # as accelerate does for DDP
    return transformer


def ignore_frozen(transformer: FluxTransformer2DModel) -> None:
    """Spare DDP the broadcast of the frozen base, which every rank has read from the same files."""
    frozen = [name for name, p in transformer.named_parameters() if not p.requires_grad]
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(transformer, frozen)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes, in one all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))
