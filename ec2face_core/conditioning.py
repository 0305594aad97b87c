"""The mask branch (Eq. 4): the mask as extra tokens, and a LoRA that only these tokens feel.

One sequence `[text, noise, mask]` goes through the transformer's *stock* forward (the layout of
FluxKontextPipeline); text and noise tokens meet the base weights, mask tokens base + LoRA
(`lora.py`).

Chosen here: mask tokens share the noise tokens' timestep and rows and columns; the first position
id is 1 (`mask_position: offset`) or 0 (`aligned`). A dropped mask (Eq. 13) is mask tokens that
nobody attends to, not a black image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attributes import palette_image
from .backbone import TextEmbedding, encode_images, pack, position_ids, unpack
from .config import LoraConfig
from .lora import MaskBranch, install_mask_branch

__all__ = [
    "MaskBranch",
    "guided_velocity",
    "install_mask_branch",
    "mask_latents_of",
    "predict_velocity",
]


def predict_velocity(
    transformer: nn.Module,
    z_t: Tensor,
    t: Tensor,
    text: TextEmbedding,
    mask_latents: Tensor | None = None,
    keep_mask: Tensor | None = None,
    guidance: float = 1.0,
    lora: LoraConfig | None = None,
) -> Tensor:
    """Velocity `v_theta(z_t, t, text, mask)` of Eq. 4, `b c h w`, in the dtype of `z_t`.

    Args:
        transformer: FluxTransformer2DModel, also wrapped by DDP or compiled; with or without LoRA.
        z_t: noisy latents `b c h w`.
        t: times `(b,)`, 0 = data, 1 = noise.
        text: b captions; the null text is the embedded empty caption.
        mask_latents: `b c h w` of the masks' palette images, or None: no mask tokens.
        keep_mask: `(b,)` bool, False = null mask: nobody attends to that sample's mask tokens. All
            True costs nothing. Give it on the CPU: deciding that costs a wait on a GPU.
        guidance: value of the guidance embedding, if the transformer has one.
        lora: for `mask_position`; default: the one of the installed mask branch.
    """
    module = getattr(transformer, "module", transformer)  # inside DDP
    branch: MaskBranch | None = getattr(module, "mask_branch", None)
    (b, _, h, w), device, dtype = z_t.shape, z_t.device, module.dtype
    tokens, ids = pack(z_t), position_ids(h, w, 0, device)
    image_tokens, mask_tokens, attention = tokens.shape[1], 0, None
    if mask_latents is not None:
        position = (lora or (branch.config if branch else LoraConfig())).mask_position
        mask_h, mask_w = mask_latents.shape[-2:]
        mask_ids = position_ids(mask_h, mask_w, int(position == "offset"), device)
        tokens = torch.cat([tokens, pack(mask_latents).to(tokens.dtype)], dim=1)
        ids = torch.cat([ids, mask_ids])
        mask_tokens = len(mask_ids)
        if keep_mask is not None and not bool(keep_mask.all()):
            # key mask `b 1 1 tokens`; no mask at all otherwise, so that fast attention stays usable
            visible = torch.ones(b, 1, 1, text.tokens.shape[1] + len(ids), dtype=torch.bool)
            visible[..., -mask_tokens:] = keep_mask.cpu()[:, None, None, None]
            attention = {"attention_mask": visible.to(device)}
    v = transformer(
        hidden_states=tokens.to(dtype),
        encoder_hidden_states=text.tokens.to(device, dtype),
        pooled_projections=text.pooled.to(device, dtype),
        timestep=t.to(device),
        img_ids=ids,
        txt_ids=torch.zeros(text.tokens.shape[1], 3, device=device),
        guidance=torch.full((b,), guidance, device=device)
        if module.config.guidance_embeds
        else None,
        joint_attention_kwargs=attention,
        return_dict=False,
        **({"mask_tokens": mask_tokens} if branch else {}),
    )[0]
    return unpack(v[:, :image_tokens], h, w).to(z_t.dtype)


def guided_velocity(
    transformer: nn.Module,
    z: Tensor,
    t: Tensor,
    text: TextEmbedding,
    null: TextEmbedding,
    mask_latents: Tensor | None,
    keep_mask: Tensor | None,
    guidance: float,
    s_t: float = 1.0,
    s_m: float = 1.0,
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
        factor * predict_velocity(transformer, z, t, words, mask, keep, guidance)
        for factor, words, mask, keep in terms
        if factor
    )


def mask_latents_of(vae: nn.Module, label_map: Tensor) -> Tensor:
    """Label map `b h w` -> latents `b c h/f w/f` of its palette image."""
    return encode_images(vae, palette_image(label_map))
