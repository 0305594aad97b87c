"""Decoupled attention: mask tokens attend to mask tokens only, so their keys and values are fixed.

    mask tokens           attend to the mask tokens, at t = 0, guidance 1 and without a text
    text and noise tokens attend to every token, at the sample's own t, guidance and text

The forward makes two passes over diffusers' own blocks and weights. The first runs the mask tokens
and keeps each block's keys and values (after rope); the second runs text and noise tokens and reads
them. The first depends on the mask alone, so one pass serves all steps, guidance terms, captions
and seeds. "Without a text" means no text tokens and a pooled vector of zeros.

The forward is explicit rather than made of hooks: each block receives the keys and values that it
reads as an argument. Whatever wraps the transformer's `forward` (DDP, autocast, offloading)
or its blocks (FSDP, gradient checkpointing, regional compilation) works as with the stock forward.
The last block runs to its end although its output is not needed: 1 % of FLUX's first pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, _get_qkv_projections
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .blocks import blocks_of

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxAttention

Pair = tuple[Tensor, Tensor]  # keys (after rope) and values of one block, `b tokens heads d`


class Collector:
    """Where a block leaves its keys and values; hooks of offloading would copy a list."""

    pair: Pair


TIME = 0.0  # mask tokens are modulated with this time, this guidance and a pooled zero
GUIDANCE = 1.0


class KVProcessor(FluxAttnProcessor):
    """Flux attention that can hand out its keys and values, and attend to further ones.

    Without `collected` and `mask_kv` it computes what FluxAttnProcessor does.
    """

    def __call__(  # noqa: D417
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        collected: Collector | None = None,
        mask_kv: Pair | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of a block; the arguments not listed are FluxAttnProcessor's.

        Args:
            collected: this block's keys and values are left there.
            mask_kv: keys and values to attend to besides the block's own, after these.
        """
        parts = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        heads = [p.unflatten(-1, (-1, attn.head_dim)) for p in parts if p is not None]
        q, k, v = heads[:3]
        q = attn.norm_q(q)
        k = attn.norm_k(k)
        if encoder_hidden_states is not None:
            text_q, text_k, text_v = heads[3:]
            q = torch.cat([attn.norm_added_q(text_q), q], dim=1)
            k = torch.cat([attn.norm_added_k(text_k), k], dim=1)
            v = torch.cat([text_v, v], dim=1)
        q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
        k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
        if collected is not None:
            collected.pair = (k, v)
        if mask_kv is not None:
            pairs = zip((k, v), mask_kv, strict=True)
            k, v = (torch.cat([x, more.to(x.dtype)], dim=1) for x, more in pairs)
        out = dispatch_attention_fn(  # Eq. 1
            q, k, v,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2, 3).to(q.dtype)  # fmt: skip
        if encoder_hidden_states is None:
            return out
        text_out, out = out.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        out = attn.to_out[1](attn.to_out[0](out.contiguous()))
        return out, attn.to_add_out(text_out.contiguous())


def set_attention(transformer: FluxTransformer2DModel, attention: str) -> None:
    """Set the attention pattern of a FluxTransformer2DModel: "joint" (stock) or "decoupled"."""
    decoupled = attention == "decoupled"
    kind = KVProcessor if decoupled else FluxAttnProcessor
    for attn in (block.attn for block in blocks_of(transformer)):
        old = attn.processor
        if type(old) is not kind:
            new = kind()
            new._attention_backend = old._attention_backend
            new._parallel_config = old._parallel_config
            attn.set_processor(new)
    function = forward if decoupled else type(transformer).forward
    # accelerate's offloading hook wraps `forward` and calls `_old_forward`
    name = "_old_forward" if hasattr(transformer, "_hf_hook") else "forward"
    setattr(transformer, name, MethodType(function, transformer))


@apply_lora_scale("joint_attention_kwargs")
def forward(  # noqa: D417, PLR0913, PLR0917 (the stock signature)
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    pooled_projections: Any = None,
    timestep: Any = None,
    img_ids: Any = None,
    txt_ids: Any = None,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    mask_kv: Iterable[Pair] | None = None,
) -> Any:
    """FluxTransformer2DModel's forward where mask tokens attend to mask tokens only.

    The arguments are the stock ones; the last `mask_branch.tokens` of `hidden_states` are mask
    tokens. If all of them are, their keys and values of every block are returned, a tuple of pairs,
    and no other argument is needed. Otherwise the output is `(b, noise tokens, c)`, as from the
    stock forward.

    Args:
        mask_kv: such pairs of an earlier call, `b` rows each, instead of mask tokens.
        joint_attention_kwargs: an `attention_mask` `(b or 1, 1, 1, text + noise + mask tokens)`
            says which keys text and noise attend to, or what is added to their logits.
    """
    if self.is_cache_enabled:
        raise RuntimeError(
            "enable_cache() does not know decoupled attention's pass over the mask, which is "
            "computed once anyway: disable_cache(), or take a LoRA with joint attention"
        )
    tokens = self.mask_branch.tokens
    if tokens == hidden_states.shape[1]:
        return _mask_pass(self, hidden_states, img_ids)
    if tokens:
        mask_kv = _mask_pass(self, hidden_states[:, -tokens:], img_ids[-tokens:])
        hidden_states = hidden_states[:, :-tokens]
        img_ids = img_ids[:-tokens]
    if mask_kv is None:
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids,
            txt_ids, guidance, joint_attention_kwargs, return_dict=return_dict,
        )  # fmt: skip

    self.mask_branch.tokens = 0
    image = self.x_embedder(hidden_states)
    text = self.context_embedder(encoder_hidden_states)
    modulation = _modulation(self, timestep, guidance, pooled_projections, image.dtype)
    rope = self.pos_embed(torch.cat([txt_ids, img_ids]))
    for block, pair in zip(blocks_of(self), mask_kv, strict=True):
        attention = {**(joint_attention_kwargs or {}), "mask_kv": pair}
        text, image = _run(self, block, 0, image, text, modulation, rope, attention)
    output = self.proj_out(self.norm_out(image, modulation))
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _mask_pass(self: Any, tokens: Tensor, ids: Tensor) -> tuple[Pair, ...]:
    """Every block's keys and values of the mask tokens `(b, n, c)` at the places `(n, 3)`."""
    n = tokens.shape[1]
    self.mask_branch.tokens = n
    mask = self.x_embedder(tokens)
    pooled = tokens.new_zeros(1, self.config.pooled_projection_dim)
    guidance = pooled.new_full((1,), GUIDANCE) if self.config.guidance_embeds else None
    modulation = _modulation(self, pooled.new_full((1,), TIME), guidance, pooled, mask.dtype)
    rope = self.pos_embed(ids)
    no_text = mask[:, :0]
    pairs: list[Pair] = []
    for block in blocks_of(self):
        _, mask, k, v = _run(self, block, n, mask, no_text, modulation, rope, {})
        pairs.append((k, v))
    return tuple(pairs)


def _run(
    self: Any,
    block: nn.Module,
    tokens: int,
    image: Tensor,
    text: Tensor,
    modulation: Tensor,
    rope: tuple[Tensor, Tensor],
    attention: dict[str, Any],
) -> tuple[Tensor, ...]:
    """A block's text and image tokens; of mask tokens (`tokens` > 0) its keys and values, too."""

    def call(image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        self.mask_branch.tokens = tokens  # set here, for recomputation in backward as well
        if not tokens:
            return block(image, text, modulation, rope, attention)
        collected = Collector()
        outputs = block(image, text, modulation, rope, attention | {"collected": collected})
        return *outputs, *collected.pair

    if torch.is_grad_enabled() and self.gradient_checkpointing:
        return self._gradient_checkpointing_func(call, image, text)
    return call(image, text)


def _modulation(
    self: Any, time: Tensor, guidance: Tensor | None, pooled: Tensor, dtype: torch.dtype
) -> Tensor:
    """What modulates all tokens of a pass, `(b, d)`, as in the stock forward."""
    times = [time] if guidance is None else [time, guidance]
    return self.time_text_embed(*(t.to(dtype) * 1000 for t in times), pooled)
