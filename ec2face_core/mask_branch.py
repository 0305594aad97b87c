"""The mask branch (Eq. 4, Sec. 3.5): mask tokens, the LoRA on them, and guidance.

The transformer reads one sequence `[text, noise, mask]` (FluxKontextPipeline's layout). Text and
noise tokens use the base weights; mask tokens use base + LoRA:

    y = W x,    and on mask tokens    y = W x + (alpha / r) B A x

Mask tokens are the tail of the image stream (double blocks) and of the joint stream (single
blocks), so "the last n tokens" is right in every layer, and A and B are computed on those alone.
The LoRA's file records how it was trained, and loading restores it (`io/lora_file.py`):

    attention      joint (the paper): every token attends to every token, through the transformer's
                   *stock* forward. decoupled: mask tokens attend to mask tokens only, so that
                   `precompute_mask_kv` runs them once for all steps (`fast/decoupled.py`)
    tokens         mask: text and noise tokens keep the base weights (profile paper);
                   all: image and mask tokens have the LoRA, and in the single-stream blocks,
                   whose weights all tokens share, text tokens too (profile paper-all-tokens)
    mask_position  first position id of mask tokens: offset (1) or aligned (0, the noise tokens');
                   rows and columns are the noise tokens'

The LoRA is on the visual embedder, all attention projections and the feed-forward output of the
image stream, and all projections of the single blocks, without AdaLN: 0.091 % of FLUX.1-dev at
rank 4. On mask tokens alone, the last single block's `to_q`, `proj_mlp` and `proj_out` are left
out: the mask tokens' output ends there, and no gradient would reach them.

No token attends to a dropped mask (Eq. 13); it is a black image, as OminiControl's is, with
`trainer.null_mask=black` alone. With the LoRA on mask tokens alone, a sample without a mask does
not depend on the LoRA: its gradient is zero. So Eq. 13's dropout of masks changes no weight, the
trainer leaves these samples out, and "text alone" is the base's own picture. That the paper needs p
suggests the other reading of Sec. 3.5 ("the visual embedding layer and some linear layers"), in
which the LoRA is on image tokens as well: `lora.tokens=all`, profile paper-all-tokens. There
dropout acts, and text consistency reaches the tokens that are painted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attributes import palette_image
from .backbone import TextEmbedding, encode_images, pack, position_ids, unpack
from .config import LoraConfig
from .fast.transfer import send

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from peft.tuners.lora import LoraLayer

ADAPTER = "mask"  # peft's name of the mask branch's LoRA

# ------------------------------------------------------ velocity of one joint sequence (Eqs. 1, 4)


@dataclass(frozen=True)
class MaskKVCache:
    """Keys and values of m masks in decoupled attention; iterating yields a pair per block."""

    pairs: tuple[tuple[Tensor, Tensor], ...]  # keys (after rope) and values `m n heads d` per block
    rows: Tensor | None = None  # mask of each sample of a batch, `(b,)`; None: sample i has mask i

    def __getitem__(self, rows: Tensor) -> MaskKVCache:
        """These masks in another batch, by their numbers `(b,)`; nothing is copied yet."""
        keys = self.pairs[0][0]
        if self.rows is None and torch.equal(rows, torch.arange(len(keys), device=rows.device)):
            return self
        rows = send(rows, keys.device)
        return MaskKVCache(self.pairs, rows if self.rows is None else self.rows[rows])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k, v in self.pairs:
            yield (k, v) if self.rows is None else (k[self.rows], v[self.rows])

    @property
    def tokens(self) -> int:
        """Mask tokens of a sample, n."""
        return self.pairs[0][0].shape[1]


def mask_latents_of(vae: AutoencoderKL, label_map: Tensor) -> Tensor:
    """Label map `b h w` -> latents `b c h/f w/f` of its palette image."""
    return encode_images(vae, palette_image(label_map))


def predict_velocity(
    transformer: FluxTransformer2DModel,
    z_t: Tensor,
    t: Tensor,
    text: TextEmbedding,
    mask_latents: Tensor | MaskKVCache | None = None,
    keep_mask: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    mask_strength: float = 1.0,
    attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """The velocity `v_theta(z_t, t, text, mask)` of Eqs. 1 and 4, `b c h w` in `z_t`'s dtype.

    Args:
        transformer: FluxTransformer2DModel, also wrapped by DDP or compiled; with or without LoRA.
        z_t: noisy latents `b c h w`.
        t: times `(b,)`, 0 = data, 1 = noise.
        text: b captions; the null text is the embedded empty caption.
        mask_latents: `b c h w` of the masks' palette images; or their keys and values (decoupled
            attention only; same result); None: no mask tokens.
        keep_mask: `(b,)` bool; False: null mask, no token attends to that sample's mask tokens.
            All True costs nothing; a CPU tensor avoids a wait for the GPU.
        guidance: value of the guidance embedding, if the transformer has one; or one a sample.
        mask_strength: factor on each mask token in the softmax of text and noise tokens (its
            logarithm is added to the logit), >= 0. LoRAs are trained with 1, which costs nothing; 0
            is no mask; other values need an attention backend that takes a mask.
        attention_kwargs: diffusers' `joint_attention_kwargs`, e.g. the `scale` of all LoRAs.

    Raises:
        ValueError: a negative strength, or keys and values for a LoRA with joint attention.
    """
    if not 0 <= mask_strength < math.inf:
        raise ValueError(f"mask_strength must be a number >= 0, got {mask_strength}")
    module = _unwrap(transformer)
    decoupled = is_decoupled(transformer)
    branch: MaskBranch | None = getattr(module, "mask_branch", None)
    b, _, h, w = z_t.shape
    device = z_t.device

    tokens = pack(z_t)
    ids = position_ids(h, w, 0, device)
    noise_tokens = len(ids)
    text_tokens = text.tokens.shape[1]
    mask_tokens = 0
    options: dict[str, Any] = {}
    if mask_strength == 0:
        mask_latents = None
    if isinstance(mask_latents, MaskKVCache):
        if not decoupled:
            raise ValueError(
                "this LoRA has joint attention: give mask latents, not their keys and values"
            )
        mask_tokens = mask_latents.tokens
        options["mask_kv"] = mask_latents
    elif mask_latents is not None:
        mask_ids = _mask_ids(mask_latents, branch.config if branch else LoraConfig())
        mask_tokens = len(mask_ids)
        tokens = torch.cat([tokens, pack(mask_latents).to(tokens.dtype)], dim=1)  # [z_t; z_m]
        ids = torch.cat([ids, mask_ids])
    tokens = tokens.to(module.dtype)
    if branch:
        options["mask_tokens"] = len(ids) - noise_tokens
    if module.config.guidance_embeds:
        if not isinstance(guidance, Tensor):
            guidance = torch.full((b,), guidance, device=device)
        options["guidance"] = guidance
    attention = _attention_mask(
        keep_mask, mask_strength, text_tokens + noise_tokens, mask_tokens, decoupled, like=tokens
    )
    attention_kwargs = dict(attention_kwargs or {})
    if attention is not None:
        attention_kwargs["attention_mask"] = attention
    if attention_kwargs:
        options["joint_attention_kwargs"] = attention_kwargs
    v = transformer(
        hidden_states=tokens,
        encoder_hidden_states=text.tokens.to(device, module.dtype),
        pooled_projections=text.pooled.to(device, module.dtype),
        timestep=t.to(device),
        img_ids=ids,
        txt_ids=torch.zeros(text_tokens, 3, device=device),
        return_dict=False,
        **options,
    )[0]
    return unpack(v[:, :noise_tokens], h, w).to(z_t.dtype)


def guided_velocity(  # noqa: D417, PLR0913, PLR0917
    transformer: FluxTransformer2DModel,
    z: Tensor,
    t: Tensor,
    text: TextEmbedding,
    null: TextEmbedding,
    mask_latents: Tensor | MaskKVCache | None,
    keep_mask: Tensor | None,
    guidance: float,
    text_scale: float = 1.0,
    mask_scale: float = 1.0,
    mask_strength: float = 1.0,
    attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Classifier-free guidance for two conditions, `b c h w` (as in InstructPix2Pix, Eq. 3).

    v(0, 0) + s_t [v(text, 0) - v(0, 0)] + s_m [v(text, mask) - v(text, 0)], where 0 is the null
    text or no mask. Terms with factor 0 are not computed.

    The arguments not listed are those of `predict_velocity`.

    Args:
        z: noisy latents `b c h w`.
        null: the embedded empty caption, b times.
        text_scale: s_t; 1: no guidance towards the text.
        mask_scale: s_m; without masks it has no effect.
    """
    if mask_latents is None:
        mask_scale = 0.0
    terms = [
        ("mask", mask_scale, text, mask_latents, keep_mask),
        ("text", text_scale - mask_scale, text, None, None),
        ("null", 1 - text_scale, null, None, None),
    ]
    caching = getattr(transformer, "is_cache_enabled", False)
    v = torch.zeros_like(z)
    for name, factor, caption, mask, keep in terms:
        if factor:
            with transformer.cache_context(name) if caching else nullcontext():
                v = v + factor * predict_velocity(
                    transformer, z, t, caption, mask, keep, guidance,
                    mask_strength=mask_strength, attention_kwargs=attention_kwargs,
                )  # fmt: skip
    return v


def is_decoupled(transformer: FluxTransformer2DModel) -> bool:
    """Whether the transformer, wrapped or not, has a mask LoRA with decoupled attention."""
    branch = getattr(_unwrap(transformer), "mask_branch", None)
    return branch is not None and branch.config.attention == "decoupled"


def precompute_mask_kv(
    transformer: FluxTransformer2DModel,
    mask_latents: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> MaskKVCache:
    """Run the mask branch of decoupled attention once, for all later calls of `predict_velocity`.

    Args:
        transformer: FluxTransformer2DModel with a decoupled mask LoRA, also wrapped.
        mask_latents: `m c h w`, from `mask_latents_of`.
        attention_kwargs: diffusers' `joint_attention_kwargs`.

    Returns:
        Keys and values of these masks, differentiable; `cache[rows]` lays them out for another
        batch. They are valid only until the next optimiser step.

    Raises:
        ValueError: the attention is not decoupled.
    """
    if not is_decoupled(transformer):
        raise ValueError(
            "mask tokens can be run once only with lora.attention 'decoupled': in joint attention "
            "they depend on step, noise and text"
        )
    module = _unwrap(transformer)
    ids = _mask_ids(mask_latents, module.mask_branch.config)
    tokens = pack(mask_latents).to(module.dtype)
    pairs = transformer(
        hidden_states=tokens,
        img_ids=ids,
        mask_tokens=len(ids),
        joint_attention_kwargs=dict(attention_kwargs or {}),
    )
    return MaskKVCache(pairs)


def _unwrap(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
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
    """Which keys are attended to (bool), or what is added to their logits (float); None: all.

    The keys are `others` text and noise tokens, then the mask tokens. The queries are the same, but
    without the mask tokens in decoupled attention. None leaves flash attention available.
    """
    dropped = None if keep_mask is None or bool(keep_mask.all()) else ~keep_mask.cpu()
    if mask_tokens == 0 or (dropped is None and strength == 1):
        return None
    rows = 1 if dropped is None else len(dropped)
    keys = others + mask_tokens
    if strength == 1:
        mask = torch.ones(rows, 1, 1, keys, dtype=torch.bool)
        if dropped is not None:
            mask[dropped, ..., others:] = False
    else:
        mask = torch.zeros(rows, 1, 1 if decoupled else keys, keys, dtype=like.dtype)
        mask[:, :, :others, others:] = math.log(strength)
        if dropped is not None:
            mask[dropped, :, :, others:] = -math.inf
    return send(mask, like.device)


# ------------------------------------------------------------------- Sec. 3.5: LoRA on mask tokens


def add_mask_lora(transformer: FluxTransformer2DModel, config: LoraConfig) -> list[nn.Parameter]:
    """Freeze the transformer, give its mask branch a LoRA, and return the LoRA's parameters.

    A is drawn from N(0, 1/rank^2) with torch's global generator and B is zero, so the branch starts
    as the base model. The parameters are float32 whatever the base is.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig as PeftConfig

    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        init_lora_weights="gaussian",
        target_modules=lora_targets(transformer, config),
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(peft_config, adapter_name=ADAPTER)
    cast_training_params(transformer, dtype=torch.float32)
    install_mask_branch(transformer, config)
    return [p for p in transformer.parameters() if p.requires_grad]


def lora_targets(transformer: FluxTransformer2DModel, config: LoraConfig) -> str:
    """A regular expression for the names of the layers with a LoRA."""
    targets = (
        r"(x_embedder"
        r"|transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.2)"
        r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out))"
    )
    if config.tokens == "mask":  # nothing reads what mask tokens become in the last block
        last = transformer.config.num_single_layers - 1
        unread = rf"single_transformer_blocks\.{last}\.(attn\.to_q|proj_mlp|proj_out)"
        return rf"(?!{unread}$){targets}"
    return targets


def install_mask_branch(
    transformer: FluxTransformer2DModel, config: LoraConfig | None = None
) -> MaskBranch:
    """Restrict the transformer's `mask` LoRA to mask tokens, and set its attention pattern.

    Args:
        transformer: FluxTransformer2DModel with the peft adapter `mask` (`add_mask_lora`,
            `load_lora_weights(..., adapter_name="mask")`).
        config: what the LoRA was trained with (`read_mask_lora`); None: what is installed already.

    Raises:
        ValueError: the transformer has no adapter `mask`, or config is needed.
    """
    from peft.tuners.lora import LoraLayer

    layers = [m for m in transformer.modules() if isinstance(m, LoraLayer) and ADAPTER in m.lora_A]
    if not layers:
        raise ValueError("the transformer has no `mask` LoRA: call add_mask_lora or load_mask_lora")
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise ValueError("fused projections leave a LoRA out: unfuse_qkv_projections() first")
    branch = getattr(transformer, "mask_branch", None)
    if config is None and branch is None:
        raise ValueError(
            "the settings of the `mask` LoRA are unknown: give its LoraConfig, "
            "`install_mask_branch(transformer, read_mask_lora(folder)[0])`"
        )
    if branch is None:
        branch = MaskBranch()
        transformer.mask_branch = branch
        transformer.register_forward_pre_hook(branch.set_tokens, with_kwargs=True)
        transformer.fuse_qkv_projections = MethodType(_fuse_qkv_projections, transformer)
    if config is not None:
        if config.attention != branch.config.attention:
            from .fast.decoupled import set_attention

            set_attention(transformer, config.attention)
        branch.config = config
    for layer in layers:
        layer.lora_variant[ADAPTER] = branch
    _cast_inputs(transformer)
    return branch


@contextmanager
def keep_loras_active(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """What is loaded inside is active together with what was active before, at its own scale.

    peft, and with it diffusers, makes the LoRA that was loaded last the only active one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = transformer.active_adapters() if getattr(transformer, "peft_config", {}) else []
    yield
    loaded = transformer.active_adapters() if getattr(transformer, "peft_config", {}) else []
    active = list(dict.fromkeys(n for n in [*before, *loaded] if n in transformer.peft_config))
    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(active, inference_mode=True)
    _cast_inputs(transformer)


def _cast_inputs(transformer: FluxTransformer2DModel) -> None:
    """Let peft cast a layer's input only where a LoRA other than the mask's needs it.

    It casts all tokens, and the mask branch reads some.
    """
    from peft.tuners.lora import LoraLayer

    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = set(layer.lora_A) != {ADAPTER}


def _fuse_qkv_projections(self: FluxTransformer2DModel) -> None:
    """Fuse the projections as diffusers does; refused with a mask LoRA, which they would omit."""
    if ADAPTER in getattr(self, "peft_config", {}):
        raise RuntimeError(
            "fuse_qkv_projections() would leave the mask LoRA out of the attention: delete it first"
        )
    type(self).fuse_qkv_projections(self)


class MaskBranch:
    """State shared by the mask LoRA's layers of *one* transformer: the number of mask tokens.

    It is set as peft's variant of each LoRA layer, so saving, gradient checkpointing, DDP and stock
    pipelines are untouched. Merging the LoRA into the base weights, which would apply it to all
    tokens, is refused.

    Each call of the transformer sets the number, from the keyword `mask_tokens` or, for stock
    pipelines, from the position ids (first coordinate not 0). Gradient checkpointing recomputes
    with the number of the latest call: run backward before the next forward.
    """

    def __init__(self) -> None:
        self.config = LoraConfig()  # what the LoRA was trained with
        self.record: Any = None  # what its file says (`lora_file.LoraRecord`), if it has one
        self.tokens = 0

    def set_tokens(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Forward pre-hook of the transformer; removes the keyword `mask_tokens` again."""
        tokens = kwargs.pop("mask_tokens", None)
        if tokens is None:
            tokens = int((kwargs["img_ids"].reshape(-1, 3)[:, 0] != 0).sum())
        if getattr(module.get_submodule("transformer_blocks.0.attn.to_q"), "merged", False):
            raise RuntimeError(
                "a LoRA was fused into the base weights, which switches the mask LoRA off: "
                "unfuse_lora(), or fuse before the mask LoRA is loaded"
            )
        self.tokens = tokens
        return args, kwargs

    # The interface of peft's LoraVariant; not a subclass, to import peft lazily.
    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Eq. 4's w^m: add the LoRA to the rows of `result` `(b, tokens, d)` of mask tokens."""
        tokens = x.shape[1] if self.config.tokens == "all" else self.tokens
        if tokens == 0:
            return result
        A = module.lora_A[active_adapter]
        B = module.lora_B[active_adapter]
        scaling = module.scaling[active_adapter]
        delta = B(A(module.lora_dropout[active_adapter](x[:, -tokens:].to(A.weight.dtype))))
        delta = (delta if scaling == 1 else delta * scaling).to(result.dtype)
        if torch.compiler.is_compiling():  # the compiler fuses this, and rejects mark_dirty
            return result + nn.functional.pad(delta, (0, 0, result.shape[1] - tokens, 0))
        return _AddToTail.apply(result, delta)

    def merge_unsafe(self, *_: Any) -> None:
        """Refuse: a merged LoRA would act on all tokens."""
        raise RuntimeError("the mask LoRA acts on mask tokens only and cannot be fused or merged")

    merge_safe = unmerge = merge_unsafe

    def supports_lora_conversion(self) -> bool:
        """A plain LoRA acts on all tokens."""
        return False


class _AddToTail(torch.autograd.Function):
    """`result[:, -n:] += delta` in place, without the copies that slicing and padding would make.

    `result` has just been made by the base layer, whose backward needs only its input.
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
