"""How the transformer's blocks are run: what is recomputed, what is compiled, on which kernel.

The base is frozen, so its activations are few: at 512 px FLUX.1-dev keeps 16-19 GB a sample without
recomputation, which costs 46 % more arithmetic. Hence nothing is recomputed unless the
configuration asks for it, and then as little as fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from ..config import ConfigError, TrainerConfig


def prepare_blocks(transformer: nn.Module, config: TrainerConfig) -> None:
    """Recompute and compile the blocks of a FluxTransformer2DModel as the configuration asks.

    Args:
        transformer: with its LoRA; changed in place, parameters keep their names.
        config: reads gradient_checkpointing, recompute_every, compile and shard.

    Raises:
        ConfigError: recompute_every is below 1.
    """
    every = config.recompute_every
    if every < 1:
        raise ConfigError(f"trainer.recompute_every must be at least 1, got {every}")
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


def attention_kernel(
    transformer: nn.Module, tokens: int, precision: str, device: torch.device, masked: bool = False
) -> str:
    """The kernel that `scaled_dot_product_attention` takes in training, e.g. `flash_attention`.

    Worth a look in every log: a fallback to `math` changes nothing but the speed, by far.

    Args:
        transformer: FluxTransformer2DModel.
        tokens: length of the joint sequence.
        precision: trainer.mixed_precision.
        device: where it runs.
        masked: for a batch in which some sample's mask was dropped, so that there is a key mask.
    """
    config = transformer.config
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, transformer.dtype)
    shape = 1, config.num_attention_heads, tokens, config.attention_head_dim
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device) if masked else None
    choice = torch._fused_sdp_choice(q, q, q, attn_mask=mask)  # what the dispatcher itself asks
    return SDPBackend(choice).name.lower()


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of a FluxTransformer2DModel in the order in which they run."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
