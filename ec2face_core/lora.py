"""The mask branch's LoRA (Sec. 3.5): where it sits, that only mask tokens feel it, and its file.

Text and noise tokens meet the base weights, mask tokens base + LoRA:

    y = W x,    and on mask tokens    y = W x + (alpha / r) B A x

Mask tokens are the tail both of the image stream (double blocks) and of the joint stream (single
blocks), so "the last n tokens" is right in every layer, and A and B are computed on those alone.
`MaskBranch` is set as peft's own variant of each LoRA layer: saving, gradient checkpointing, DDP
and stock pipelines are untouched; merging the LoRA into the base weights, which would put it on
all tokens, is refused.

What mask tokens attend to is part of the adapter and of its file: `joint` is the transformer's
stock forward; `decoupled` brings its own (`decoupled.py`), in every pipeline and trainer that
calls the transformer. So is `lora.tokens`: with `all`, an ablation, the LoRA acts on every token at
the same places, with a mask or without.

Chosen here: LoRA on the visual embedder, attention and feed-forward output projections of the image
stream and all projections of the single blocks, no AdaLN: 0.091 % of FLUX.1-dev at rank 4. The last
single block's `to_q`, `proj_mlp` and `proj_out` are left out: the mask tokens' output ends there,
so no gradient would reach them (and DDP would wait for it forever).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError, LoraConfig

ADAPTER = "mask"  # peft's name of the mask branch's LoRA
LORA_FILE = "pytorch_lora_weights.safetensors"


class _AddToTail(torch.autograd.Function):
    """`result[:, -n:] += delta` in place: slicing, padding and adding would each copy `result`.

    Allowed because `result` is what the base layer has just made, and its backward needs only its
    input.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, delta: Tensor) -> Tensor:
        ctx.tokens = delta.shape[1]
        result[:, -ctx.tokens :].add_(delta)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient[:, -ctx.tokens :]


class MaskBranch:
    """What the mask LoRA's layers of *one* transformer share: how many tail tokens are mask tokens.

    The count is set at each call of the transformer, from the keyword `mask_tokens` or, for stock
    pipelines, from the position ids (first coordinate not 0). Gradient checkpointing recomputes
    with the count of the latest call: run backward before the next forward, as training does.
    """

    def __init__(self) -> None:
        self.config = LoraConfig()  # what the adapter was trained with
        self.tokens = 0

    def set_tokens(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Forward pre-hook of the transformer; takes the keyword `mask_tokens` away again."""
        tokens = kwargs.pop("mask_tokens", None)
        if tokens is None:
            tokens = int((kwargs["img_ids"].reshape(-1, 3)[:, 0] != 0).sum())
        self.tokens = tokens
        return args, kwargs

    # The interface of peft.tuners.lora.layer.LoraVariant; not a subclass, to import peft lazily.

    def forward(
        self, module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Add the LoRA to the rows of `result` `(b, tokens, d)` that feel it."""
        tokens = x.shape[1] if self.config.tokens == "all" else self.tokens
        if tokens == 0:
            return result
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x[:, -tokens:].to(A.weight.dtype))
        delta, scaling = B(A(x)), module.scaling[active_adapter]
        delta = (delta if scaling == 1 else delta * scaling).to(result.dtype)
        if torch.compiler.is_compiling():  # which fuses this, and does not know mark_dirty
            return result + nn.functional.pad(delta, (0, 0, result.shape[1] - tokens, 0))
        return _AddToTail.apply(result, delta)

    def merge_unsafe(self, *_: Any) -> None:
        """Refuse: a merged LoRA would act on text and noise tokens, too."""
        raise RuntimeError("the mask LoRA acts on mask tokens only and cannot be fused or merged")

    merge_safe = unmerge = merge_unsafe

    def supports_lora_conversion(self) -> bool:
        """No: a plain LoRA acts on all tokens."""
        return False


def _check(config: LoraConfig) -> None:
    if config.tokens not in ("mask", "all"):
        raise ConfigError(f"lora.tokens {config.tokens!r}: use mask or all")
    if config.attention not in ("joint", "decoupled"):
        raise ConfigError(f"lora.attention {config.attention!r}: use joint or decoupled")
    if config.mask_position not in ("offset", "aligned"):
        raise ConfigError(f"lora.mask_position {config.mask_position!r}: use offset or aligned")


def install_mask_branch(transformer: nn.Module, config: LoraConfig | None = None) -> MaskBranch:
    """Restrict the transformer's `mask` LoRA to mask tokens, and let these attend as in training.

    Idempotent; a second call updates.

    Args:
        transformer: FluxTransformer2DModel with the adapter `mask` (`add_mask_lora`,
            `load_lora_weights(..., adapter_name="mask")`).
        config: what the adapter was trained with (`read_mask_lora`): its attention mode, and where
            `predict_velocity` puts the mask. None: the one that is installed already.

    Raises:
        ConfigError: an attention mode that does not exist.
        ValueError: the transformer has no adapter `mask`, or nothing says how it was trained.
    """
    from peft.tuners.lora import LoraLayer

    layers = [m for m in transformer.modules() if isinstance(m, LoraLayer) and ADAPTER in m.lora_A]
    if not layers:
        raise ValueError("the transformer has no `mask` adapter: call add_mask_lora or load it")
    branch = getattr(transformer, "mask_branch", None)
    if config is None and branch is None:
        raise ValueError(
            "how was the `mask` adapter trained? Give its LoraConfig: "
            "`install_mask_branch(transformer, read_mask_lora(folder)[0])`"
        )
    if branch is None:
        branch = transformer.mask_branch = MaskBranch()
        transformer.register_forward_pre_hook(branch.set_tokens, with_kwargs=True)
    if config is not None:
        _check(config)
        _set_attention(transformer, branch.config.attention, config.attention)
        branch.config = config
    for layer in layers:
        layer.lora_variant[ADAPTER] = branch
        layer.cast_input_dtype_enabled = False  # peft would cast all tokens for the sake of some
    return branch


def _set_attention(transformer: nn.Module, before: str, after: str) -> None:
    if before != after:
        from . import decoupled

        (decoupled.install if after == "decoupled" else decoupled.uninstall)(transformer)


def add_mask_lora(transformer: nn.Module, config: LoraConfig) -> list[nn.Parameter]:
    """Freeze the transformer, give its mask branch a LoRA, and return the LoRA's parameters.

    A is drawn from N(0, 1/rank^2) with torch's global generator, B is zero: the branch begins as
    the base model. The parameters are float32 whatever the base is.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig as PeftConfig

    _check(config)
    last = transformer.config.num_single_layers - 1
    targets = (
        rf"(?!single_transformer_blocks\.{last}\.(attn\.to_q|proj_mlp|proj_out)$)("
        r"x_embedder"
        r"|transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.2)"
        r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out))"
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            init_lora_weights="gaussian",
            target_modules=targets,
        ),
        adapter_name=ADAPTER,
    )
    cast_training_params(transformer, dtype=torch.float32)
    install_mask_branch(transformer, config)
    return [p for p in transformer.parameters() if p.requires_grad]


def save_mask_lora(
    transformer: nn.Module, folder: Path | str, config: LoraConfig, text_length: int
) -> None:
    """Write the LoRA as a diffusers file, `folder/pytorch_lora_weights.safetensors`.

    Any pipeline's `load_lora_weights` reads it, but applies it to *all* tokens in joint attention:
    a plain call gives wrong pictures without a complaint, and lets the LoRA be fused. Load with
    `load_mask_lora(pipeline.transformer, folder)`, also into stock pipelines. The metadata carry
    what the weights were trained for: attention, mask_position, text_length, rank, alpha.
    """
    from diffusers import FluxPipeline
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    peft = transformer.peft_config[ADAPTER].to_dict()
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(
            {f"transformer.{k}": list(v) if isinstance(v, set) else v for k, v in peft.items()}
        ),
        "ec2face": json.dumps({**dataclasses.asdict(config), "text_length": text_length}),
    }

    def save(weights: dict[str, Tensor], path: str) -> None:
        temporary = Path(f"{path}.tmp")  # so that a killed process leaves no half-written file
        save_file({k: v.contiguous().cpu() for k, v in weights.items()}, temporary, metadata)
        temporary.replace(path)

    FluxPipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
        save_function=save,
    )


def read_mask_lora(folder: Path | str) -> tuple[LoraConfig, int]:
    """The LoraConfig and the text length that an adapter folder was trained for."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no mask LoRA at {path}: train it with `python -m ec2face_core.train`, or give the "
            "folder of another adapter"
        )
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {}).get("ec2face", "null"))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({error}): copy or train it again"
        ) from (error)
    if values is None:
        raise ValueError(f"{path} is no mask LoRA of this project: its metadata do not say so")
    text_length = values.pop("text_length")
    return LoraConfig(**values), text_length


def load_mask_lora(transformer: nn.Module, folder: Path | str) -> LoraConfig:
    """Load an adapter into the mask branch, in place of the one that is there.

    The one loading helper: plain `load_lora_weights` would leave the LoRA active on all tokens and
    forget the attention mode. Returns the LoraConfig that the file was trained with.
    """
    config, _ = read_mask_lora(folder)
    _check(config)
    if ADAPTER in getattr(transformer, "peft_config", {}):
        transformer.delete_adapters(ADAPTER)
    transformer.load_lora_adapter(
        str(folder), prefix="transformer", weight_name=LORA_FILE, adapter_name=ADAPTER
    )
    install_mask_branch(transformer, config)
    return config
