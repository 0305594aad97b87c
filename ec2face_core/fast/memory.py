"""Does a training fit the GPU? Asked before anything is encoded."""

from __future__ import annotations

import json

import torch

from ..backbone import backbone_folder
from ..config import Config, ConfigError
from ..consistency import pictures_at_once

# Counted for FLUX.1-dev at 512 px under CUDA's autocast, which keeps 14.33 GB a sample for the
# backward pass (57 blocks, 3,072 wide, 2,176 tokens) and 6.7 GB for a picture's losses.
KEPT = 37.6  # bytes of each token, channel and block
PICTURE = 6.7e9 / 512**2  # bytes of each pixel that is decoded at a time
GUIDES = 2.5e9  # FaRL, CLIP ViT-L/14 and the autoencoder
REST = 2e9  # CUDA's context, the optimiser, fragments


def needed_memory(config: Config) -> float:
    """Bytes that a training of a FLUX backbone needs on each GPU, within some 10 %."""
    from diffusers import FluxTransformer2DModel

    folder = backbone_folder(config.backbone)
    about = json.loads((folder / "transformer" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(about)
    dtype = getattr(torch, config.backbone.dtype)
    base = sum(p.numel() for p in transformer.parameters()) * dtype.itemsize
    c = config.trainer
    if c.shard:
        base /= c.num_processes
    blocks = about["num_layers"] + about["num_single_layers"]
    width = about["num_attention_heads"] * about["attention_head_dim"]
    side = config.data.size // 2 ** len(vae["block_out_channels"])
    tokens = config.backbone.text_length + 2 * side**2
    block = c.batch_size * KEPT * tokens * width
    kept = blocks * block
    if c.gradient_checkpointing:  # one block at a time, and what is not recomputed
        kept = block + kept * (1 - 1 / c.recompute_every)
    pixels = 0.0
    if config.loss.alpha_text or config.loss.alpha_mask:
        area = config.data.size**2
        pixels = PICTURE * area * min(c.batch_size, pictures_at_once(area)) + GUIDES
    return base + kept + pixels + REST


def check_memory(config: Config, device: torch.device) -> None:
    """Refuse a training that its GPU cannot hold.

    Raises:
        ConfigError: the message names the settings that help.
    """
    if device.type != "cuda":
        return
    needed = needed_memory(config)
    there = torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise ConfigError(
            f"this training needs about {needed / 1e9:.0f} GB on each GPU, which has "
            f"{there / 1e9:.0f}: lower trainer.batch_size ({config.trainer.batch_size}) and raise "
            "trainer.accumulation by the same factor, which changes no result, set "
            "trainer.gradient_checkpointing to true, or trainer.shard on several GPUs"
        )
