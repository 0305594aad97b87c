"""What a caller gives to EC2FacePipeline, read or refused: texts, masks, noise, timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..backbone import TextEmbedding, unpack
from ..guards.checks import check_floats, check_texts
from ..io.masks import mask_ids, split_masks
from ..io.texts import clean

MaskLike = Tensor | np.ndarray | Image.Image | str | Path
Texts = str | Sequence[str] | None


def draw_noise(shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
    """Noise, one picture after another, so that batches do not change it."""
    b = shape[0]
    streams = list(generator) if isinstance(generator, Sequence) else [generator] * b
    if len(streams) != b:
        raise ValueError(f"{len(streams)} generators for {b} pictures: give one or {b}")
    if wrong := [g for g in streams if not isinstance(g, torch.Generator | None)]:
        raise TypeError(f"generator: expected a torch.Generator, got {wrong[0]!r}")
    single = (1, *shape[1:])
    noise = [randn_tensor(single, g, device, torch.float32) for g in streams]
    return torch.cat(noise)


def given_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The caller's noise as float32 of this shape; refused where it is not finite."""
    check_floats(latents, "latents")
    if not latents.isfinite().all():
        raise ValueError("latents must be finite")
    b, c, h, w = shape
    if latents.shape == (b, h * w // 4, 4 * c):
        latents = unpack(latents, h, w)
    if latents.shape != shape:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, expected {shape} or their tokens "
            f"{(b, h * w // 4, 4 * c)}"
        )
    return latents.float()


def flux_timesteps(
    scheduler: Any,
    steps: int,
    tokens: int,
    device: torch.device | str,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """FluxPipeline's timesteps: linear in t, shifted towards noise for long sequences.

    Args:
        scheduler: it is set to begin with the first of them.
        steps: Euler steps.
        tokens: noise tokens of a picture.
        device: where they are needed.
        sigmas: t before the shift; default: equal steps.

    Returns:
        1000 t, `(steps,)` in (0, 1000].
    """
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    times = np.linspace(1.0, 1 / steps, steps) if sigmas is None else np.array(sigmas)
    timesteps, _ = retrieve_timesteps(scheduler, device=device, sigmas=times, mu=mu)
    scheduler.set_begin_index(0)
    return timesteps


# ----------------------------------------------------------------------------- prompts and masks


def text_list(prompt: Texts) -> list[str]:
    """One text or several, as captions are; None is no text."""
    return [clean(text) for text in check_texts("" if prompt is None else prompt)]


def mask_list(mask: Any) -> list[Tensor | None]:
    """The user's masks -> one label map `h w`, or None, per mask."""
    if isinstance(mask, (Tensor, np.ndarray)):
        mask = split_masks(mask)
    masks = mask if isinstance(mask, Sequence) and not isinstance(mask, str) else [mask]
    if not masks:
        raise ValueError("mask is an empty list: give None for no mask")
    return [None if m is None else torch.from_numpy(mask_ids(m)) for m in masks]


def resize_mask(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by nearest neighbour, aligned at pixel centres; another shape is refused."""
    if labels.shape == size:
        return labels
    h, w = labels.shape
    if abs(h * size[1] - w * size[0]) > max(size):  # a pixel of rounding is none
        raise ValueError(
            f"a mask of {w}x{h} would be stretched to a picture of {size[1]}x{size[0]}: crop or "
            "pad it to the same shape"
        )
    resized = torch.nn.functional.interpolate(
        labels[None, None].double(), size, mode="nearest-exact"
    )
    return resized[0, 0].long()


def laid_out(null: TextEmbedding, text: TextEmbedding) -> TextEmbedding:
    """The negative texts for b pictures."""
    if null.tokens.shape[1] != text.tokens.shape[1] or len(text) % len(null):
        raise ValueError(
            "prompt_embeds and negative_prompt_embeds must have the same shape when passed "
            f"directly, got {tuple(text.tokens.shape)} and {tuple(null.tokens.shape)}"
        )
    return null[torch.arange(len(text)) % len(null)]
