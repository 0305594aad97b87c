"""What a caller gives to EC2FacePipeline, read or refused: texts, masks, noise, timesteps."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..backbone import TextEmbedding, pack, unpack
from ..guards.checks import check_floats, check_number, check_texts
from ..io.masks import mask_ids, split_masks
from ..io.texts import clean

T5_TOKENS = 512  # at most, as in FluxPipeline

MaskLike = Tensor | np.ndarray | Image.Image | str | Path
Texts = str | Sequence[str] | None


def check_request(size: tuple[int, int], multiple: int, steps: int, output_type: str) -> None:
    """Refuse height, width, steps or an output type that the pipeline does not have."""
    for name, side in zip(("height", "width"), size, strict=True):
        check_number(side, name, multiple, whole=True)
    if any(side % multiple for side in size):
        raise ValueError(f"height and width {size} must be multiples of {multiple}")
    check_number(steps, "num_inference_steps", 1, whole=True)
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type {output_type!r}: use pil, np, pt or latent")


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


def checked_sigmas(sigmas: Any) -> list[float]:
    """Times to pass through: falling, in (0, 1]; refused otherwise."""
    try:
        times = np.asarray(sigmas)
        numbers = times.ndim == 1 and len(times) and times.dtype.kind in "iuf"
    except (TypeError, ValueError):
        numbers = False
    if not numbers:
        raise TypeError(f"sigmas: expected a list of numbers, got {reprlib.repr(sigmas)}")
    values = times.astype(float)
    if not (np.isfinite(values).all() and 0 < values.min() <= values.max() <= 1):
        raise ValueError(f"sigmas {reprlib.repr(sigmas)} must be in (0, 1]")
    if (np.diff(values) >= 0).any():
        raise ValueError(f"sigmas {reprlib.repr(sigmas)} must fall, from noise (1) to data")
    return values.tolist()


def attention_options(given: Any) -> dict[str, Any]:
    """`joint_attention_kwargs` as a dictionary; refused where its scale is no number."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"joint_attention_kwargs: expected a dictionary, got {given!r}")
    options = dict(given or {})
    if options.get("scale") is not None:
        check_number(options["scale"], "joint_attention_kwargs: scale")
    return options


# --------------------------------------------------------------------------------------- callbacks


def callback_inputs(callback: Any, names: Any, known: Sequence[str]) -> list[str]:
    """Names of the tensors that a callback is given; refused where they are not known."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end: expected a function, got {callback!r}")
    wanted = list(getattr(callback, "tensor_inputs", names) or ())
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"callbacks are given {list(known)}, not {unknown}")
    return wanted


def after_callback(
    callback: Callable[[dict[str, Tensor]], Any],
    names: Sequence[str],
    z: Tensor,
    text: TextEmbedding,
) -> tuple[Tensor, TextEmbedding]:
    """Latents and texts after a callback, which may return others of the same shapes, or None."""
    tensors = {"latents": pack(z), "prompt_embeds": text.tokens}
    changed = callback({name: tensors[name] for name in names})
    if changed is None:
        return z, text
    if not isinstance(changed, Mapping):
        raise TypeError(
            f"callback_on_step_end returned {reprlib.repr(changed)}: expected a dictionary of "
            "tensors, or None"
        )
    for name, value in changed.items():
        if name in tensors and getattr(value, "shape", None) != tensors[name].shape:
            shape = tuple(tensors[name].shape)
            raise ValueError(f"callback_on_step_end: {name} must have the shape {shape}")
    if "latents" in changed:
        z = unpack(changed["latents"], *z.shape[-2:])
    return z, TextEmbedding(changed.get("prompt_embeds", text.tokens), text.pooled)


# ----------------------------------------------------------------------------- prompts and masks


def text_list(prompt: Texts, name: str = "prompt") -> list[str]:
    """One text or several, as captions are; None is no text."""
    return [clean(text) for text in check_texts("" if prompt is None else prompt, name)]


def t5_length(given: int | None, own: int) -> int:
    """How many tokens T5 reads: what was asked for, or the pipeline's own number."""
    if given is None:
        return own
    check_number(given, "max_sequence_length", 1, T5_TOKENS, whole=True)
    return given


def paired_texts(prompt: Texts, prompt_2: Texts) -> tuple[list[str], list[str]]:
    """What CLIP and what T5 read of b prompts; one second text serves all of them."""
    texts = text_list(prompt)
    if prompt_2 is None or prompt_2 == "":
        return texts, texts
    texts_2 = text_list(prompt_2, "prompt_2")
    if len(texts_2) == 1:
        texts_2 *= len(texts)
    if len(texts_2) != len(texts):
        raise ValueError(
            f"{len(texts)} prompts and {len(texts_2)} second prompts: give one or as many"
        )
    return texts, texts_2


def check_embeddings(tokens: Any, pooled: Any, transformer: Any) -> None:
    """Refuse embedded prompts that do not fit each other or the transformer's configuration."""
    check_floats(tokens, "prompt_embeds")
    check_floats(pooled, "pooled_prompt_embeds")
    shapes = f"{tuple(tokens.shape)} and {tuple(pooled.shape)}"
    width, pooled_width = transformer.joint_attention_dim, transformer.pooled_projection_dim
    if (
        tokens.ndim != 3 or pooled.ndim != 2 or len(tokens) != len(pooled) or not tokens.numel()
        or tokens.shape[-1] != width or pooled.shape[-1] != pooled_width
    ):  # fmt: skip
        raise ValueError(
            f"prompt_embeds and pooled_prompt_embeds {shapes}: expected `b T {width}` and "
            f"`b {pooled_width}`"
        )
    if not (tokens.isfinite().all() and pooled.isfinite().all()):
        raise ValueError("prompt_embeds and pooled_prompt_embeds must be finite")


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
    if null.tokens.shape[1] != text.tokens.shape[1]:
        raise ValueError(
            "prompt_embeds and negative_prompt_embeds must have the same shape when passed "
            f"directly, got {tuple(text.tokens.shape)} and {tuple(null.tokens.shape)}"
        )
    if len(text) % len(null):
        raise ValueError(f"{len(null)} negative prompts for {len(text)} pictures: give one or all")
    return null[torch.arange(len(text)) % len(null)]
