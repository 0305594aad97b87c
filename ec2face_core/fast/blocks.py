"""Recomputation, compilation and attention kernels of the transformer's blocks.

The base is frozen, so it keeps few activations: 16-19 GB per sample for FLUX.1-dev at 512 px.
Recomputing them costs 46 % more arithmetic, so it is off unless the configuration asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from ..config import TrainerConfig

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


def prepare_blocks(transformer: FluxTransformer2DModel, config: TrainerConfig) -> None:
    """Recompute and compile the blocks of a FluxTransformer2DModel as the configuration asks.

    Args:
        transformer: with its LoRA; changed in place, parameters keep their names.
        config: gradient_checkpointing, recompute_every, compile and shard are used.
    """
    every = config.recompute_every
    if config.gradient_checkpointing and every == 1:
        transformer.enable_gradient_checkpointing()
    elif config.gradient_checkpointing:
        recomputed = set(blocks_of(transformer)[every - 1 :: every])

        def run(block: nn.Module, *args: Any) -> Any:
            if block in recomputed:
                return checkpoint(block, *args, use_reentrant=False)
            return block(*args)

        transformer.enable_gradient_checkpointing(run)
    if config.compile:
        # Regional: one block of each kind is compiled, in seconds. FSDP's hooks run uncompiled.
        transformer.compile_repeated_blocks(fullgraph=not config.shard)


def avoid_cudnn_attention() -> None:
    """Keep `scaled_dot_product_attention` of this process away from cuDNN.

    torch 2.11 prefers it on an H100, where its backward pass ended with an illegal memory access,
    in the miniature (heads of 32) and in FLUX.1-dev's configuration (heads of 128). Its gradient
    of the queries can be NaN where there is a key mask (PyTorch issue 196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernel(
    transformer: FluxTransformer2DModel,
    tokens: int,
    precision: str,
    device: torch.device,
    masked: bool = False,
) -> str:
    """The kernel that `scaled_dot_product_attention` takes in training, e.g. `flash_attention`.

    A fallback to `math` gives the same results far more slowly, so every log names the kernel.

    Args:
        transformer: FluxTransformer2DModel.
        tokens: length of the joint sequence.
        precision: trainer.mixed_precision.
        device: where it runs.
        masked: for a batch in which some sample's mask was dropped, so that there is a key mask.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, transformer.dtype)
    heads = transformer.config.num_attention_heads
    shape = (1, heads, tokens, transformer.config.attention_head_dim)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device) if masked else None
    choice = torch._fused_sdp_choice(q, q, q, attn_mask=mask)  # the dispatcher's own choice
    return SDPBackend(choice).name.lower()


def blocks_of(transformer: FluxTransformer2DModel) -> list[Any]:
    """The blocks of a FluxTransformer2DModel in the order in which they run."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
