"""The mask branch (Eq. 4): the mask as extra tokens, and a LoRA that only these tokens feel.

One sequence `[text, noise, mask]` (the layout of FluxKontextPipeline); text and noise tokens meet
the base weights, mask tokens base + LoRA (`lora.py`). Who attends to whom is the adapter's own
attention mode, and nobody else's choice:

    joint      everybody to everybody, through the transformer's *stock* forward
    decoupled  mask tokens to mask tokens only (`decoupled.py`): `precompute_mask_kv` runs them once,
               and its `MaskKVCache` stands for the mask in every step, guidance term, text and seed

Chosen here: the first position id of mask tokens is 1 (`mask_position: offset`) or 0 (`aligned`),
rows and columns are the noise tokens'; in joint attention so is the timestep. A dropped mask
(Eq. 13) is mask tokens that nobody attends to, not a black image.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import palette_image
from .backbone import TextEmbedding, encode_images, pack, position_ids, unpack
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
        from .fast import decoupled

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


@dataclass(frozen=True)
class MaskKVCache:
    """What the other tokens read of m masks in decoupled attention; `precompute_mask_kv` makes it.

    `pairs`: keys (after rope) and values `(m, n, heads, d)` of every block. `rows`: which mask each
    sample of a batch has, `(b,)`; None: each its own. Iterating gives the pairs of the batch.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    rows: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> MaskKVCache:
        """These masks in another batch, by their numbers `(b,)`; nothing is copied yet."""
        keys = self.pairs[0][0]
        if self.rows is None and torch.equal(rows, torch.arange(len(keys), device=rows.device)):
            return self
        rows = rows.to(keys.device)
        return MaskKVCache(self.pairs, rows if self.rows is None else self.rows[rows])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k, v in self.pairs:
            yield (k, v) if self.rows is None else (k[self.rows], v[self.rows])

    @property
    def tokens(self) -> int:
        """Mask tokens of a sample, n."""
        return self.pairs[0][0].shape[1]


def is_decoupled(transformer: nn.Module) -> bool:
    """Whether the transformer, wrapped or not, has an adapter of decoupled attention."""
    branch = getattr(_inside(transformer), "mask_branch", None)
    return branch is not None and branch.config.attention == "decoupled"


def precompute_mask_kv(transformer: nn.Module, mask_latents: Tensor) -> MaskKVCache:
    """Run the mask branch of decoupled attention once, for all later calls of `predict_velocity`.

    Args:
        transformer: FluxTransformer2DModel with a decoupled adapter, also wrapped.
        mask_latents: `m c h w`, as `mask_latents_of` makes them.

    Returns:
        The memory of these masks, differentiable. `memory[rows]` lays it out for another batch. It
        holds for the weights that made it: after a step of training it is a memory of the past.

    Raises:
        ValueError: the adapter is not decoupled.
    """
    if not is_decoupled(transformer):
        raise ValueError(
            "the mask branch can be run once only for an adapter with lora.attention 'decoupled': "
            "in joint attention mask tokens depend on step, noise and text"
        )
    module = _inside(transformer)
    ids = _mask_ids(mask_latents, module.mask_branch.config)
    tokens = pack(mask_latents).to(module.dtype)
    return MaskKVCache(transformer(hidden_states=tokens, img_ids=ids, mask_tokens=len(ids)))


def predict_velocity(
    transformer: nn.Module,
    z_t: Tensor,
    t: Tensor,
    text: TextEmbedding,
    mask_latents: Tensor | MaskKVCache | None = None,
    keep_mask: Tensor | None = None,
    guidance: float = 1.0,
    lora: LoraConfig | None = None,
    mask_strength: float = 1.0,
) -> Tensor:
    """Velocity `v_theta(z_t, t, text, mask)` of Eq. 4, `b c h w`, in the dtype of `z_t`.

    Args:
        transformer: FluxTransformer2DModel, also wrapped by DDP or compiled; with or without LoRA.
        z_t: noisy latents `b c h w`.
        t: times `(b,)`, 0 = data, 1 = noise.
        text: b captions; the null text is the embedded empty caption.
        mask_latents: `b c h w` of the masks' palette images, or b masks' memory (same result,
            decoupled attention only), or None: no mask tokens.
        keep_mask: `(b,)` bool, False = null mask: nobody attends to that sample's mask tokens. All
            True costs nothing. Give it on the CPU: deciding that costs a wait on a GPU.
        guidance: value of the guidance embedding, if the transformer has one.
        lora: for `mask_position`; default: the one of the installed mask branch.
        mask_strength: the softmax of text and noise tokens counts each mask token this many times
            (its log is added to the logit), >= 0. 1 is how adapters are trained and costs nothing;
            0 is no mask; others rule out attention backends that take no mask.

    Raises:
        ValueError: a negative strength, or a memory for an adapter of joint attention.
    """
    if not 0 <= mask_strength < math.inf:
        raise ValueError(f"mask_strength must be a number from 0 on, got {mask_strength}")
    module, decoupled = _inside(transformer), is_decoupled(transformer)
    branch: MaskBranch | None = getattr(module, "mask_branch", None)
    (b, _, h, w), device, dtype = z_t.shape, z_t.device, module.dtype
    tokens, ids = pack(z_t), position_ids(h, w, 0, device)
    image_tokens, text_tokens, mask_tokens, memory = len(ids), text.tokens.shape[1], 0, {}
    if mask_strength == 0 or mask_latents is None:
        pass
    elif isinstance(mask_latents, MaskKVCache):
        if not decoupled:
            raise ValueError("this adapter's attention is joint: give it mask latents, no memory")
        mask_tokens, memory = mask_latents.tokens, {"memory": mask_latents}
    else:
        mask_ids = _mask_ids(mask_latents, lora or (branch.config if branch else LoraConfig()))
        tokens = torch.cat([tokens, pack(mask_latents).to(tokens.dtype)], dim=1)
        ids, mask_tokens = torch.cat([ids, mask_ids]), len(mask_ids)
    tokens, others = tokens.to(dtype), image_tokens + text_tokens
    attention = _attention_mask(
        keep_mask, mask_strength, others, mask_tokens, decoupled, like=tokens
    )
    v = transformer(
        hidden_states=tokens,
        encoder_hidden_states=text.tokens.to(device, dtype),
        pooled_projections=text.pooled.to(device, dtype),
        timestep=t.to(device),
        img_ids=ids,
        txt_ids=torch.zeros(text_tokens, 3, device=device),
        guidance=torch.full((b,), guidance, device=device)
        if module.config.guidance_embeds
        else None,
        joint_attention_kwargs=None if attention is None else {"attention_mask": attention},
        return_dict=False,
        **({"mask_tokens": len(ids) - image_tokens} if branch else {}),
        **memory,
    )[0]
    return unpack(v[:, :image_tokens], h, w).to(z_t.dtype)


def guided_velocity(
    transformer: nn.Module,
    z: Tensor,
    t: Tensor,
    text: TextEmbedding,
    null: TextEmbedding,
    mask_latents: Tensor | MaskKVCache | None,
    keep_mask: Tensor | None,
    guidance: float,
    s_t: float = 1.0,
    s_m: float = 1.0,
    mask_strength: float = 1.0,
) -> Tensor:
    """Classifier-free guidance for two conditions, `b c h w` (Ho & Salimans 2022).

    v(0, 0) + s_t [v(text, 0) - v(0, 0)] + s_m [v(text, mask) - v(text, 0)], where 0 is the null
    text or no mask. Terms whose factor vanishes are not computed. Without masks `s_m` has no say.
    """
    if mask_latents is None:
        s_m = 0.0
    terms = [
        (s_m, text, mask_latents, keep_mask),
        (s_t - s_m, text, None, None),
        (1 - s_t, null, None, None),
    ]
    return sum(
        factor
        * predict_velocity(
            transformer, z, t, words, mask, keep, guidance, mask_strength=mask_strength
        )
        for factor, words, mask, keep in terms
        if factor
    )


def mask_latents_of(vae: nn.Module, label_map: Tensor) -> Tensor:
    """Label map `b h w` -> latents `b c h/f w/f` of its palette image."""
    return encode_images(vae, palette_image(label_map))


def _inside(transformer: nn.Module) -> nn.Module:
    return getattr(transformer, "module", transformer)  # DDP


def _mask_ids(mask_latents: Tensor, lora: LoraConfig) -> Tensor:
    """Position ids `(n, 3)` of mask tokens."""
    h, w = mask_latents.shape[-2:]
    return position_ids(h, w, int(lora.mask_position == "offset"), mask_latents.device)


def _attention_mask(
    keep_mask: Tensor | None,
    strength: float,
    others: int,
    mask_tokens: int,
    decoupled: bool,
    like: Tensor,
) -> Tensor | None:
    """Who may read the mask tokens (bool), or what their logits get (float); None: all, nothing.

    The keys are `others` text and noise tokens, then the mask tokens; the queries are the same, but
    in decoupled attention without the mask tokens. None keeps fast attention usable.
    """
    dropped = None if keep_mask is None or bool(keep_mask.all()) else ~keep_mask.cpu()
    if mask_tokens == 0 or (dropped is None and strength == 1):
        return None
    rows, keys = 1 if dropped is None else len(dropped), others + mask_tokens
    if strength == 1:
        mask = torch.ones(rows, 1, 1, keys, dtype=torch.bool)
        mask[..., others:] = ~dropped[:, None, None, None]
    else:
        mask = torch.zeros(rows, 1, 1 if decoupled else keys, keys, dtype=like.dtype)
        mask[:, :, :others, others:] = math.log(strength)
        if dropped is not None:
            mask[dropped, :, :, others:] = -math.inf
    return mask.to(like.device)
