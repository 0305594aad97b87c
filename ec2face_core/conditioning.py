"""The mask branch (Eq. 4): the mask as extra tokens, and a LoRA that only these tokens feel.

One sequence `[text, noise, mask]` (the layout of FluxKontextPipeline); text and noise tokens meet
the base weights, mask tokens base + LoRA (`lora.py`). Who attends to whom is the adapter's own
attention mode, and nobody else's choice:

    joint      everybody to everybody, through the transformer's *stock* forward
    decoupled  mask tokens to mask tokens only (`decoupled.py`): `remember_mask` runs them once,
               and its `MaskMemory` stands for the mask in every step, guidance term, text and seed

Chosen here: the first position id of mask tokens is 1 (`mask_position: offset`) or 0 (`aligned`),
rows and columns are the noise tokens'; in joint attention so is the timestep. A dropped mask
(Eq. 13) is mask tokens that nobody attends to, not a black image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attributes import palette_image
from .backbone import TextEmbedding, encode_images, pack, position_ids, unpack
from .config import LoraConfig
from .lora import MaskBranch, install_mask_branch

__all__ = [
    "MaskBranch",
    "MaskMemory",
    "guided_velocity",
    "install_mask_branch",
    "is_decoupled",
    "mask_latents_of",
    "predict_velocity",
    "remember_mask",
]


@dataclass(frozen=True)
class MaskMemory:
    """What the other tokens read of m masks in decoupled attention; `remember_mask` makes it.

    `pairs`: keys (after rope) and values `(m, n, heads, d)` of every block. `rows`: which mask each
    sample of a batch has, `(b,)`; None: each its own. Iterating gives the pairs of the batch.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    rows: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> MaskMemory:
        """These masks in another batch, by their numbers `(b,)`; nothing is copied yet."""
        keys = self.pairs[0][0]
        if self.rows is None and torch.equal(rows, torch.arange(len(keys), device=rows.device)):
            return self
        rows = rows.to(keys.device)
        return MaskMemory(self.pairs, rows if self.rows is None else self.rows[rows])

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


def remember_mask(transformer: nn.Module, mask_latents: Tensor) -> MaskMemory:
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
    return MaskMemory(transformer(hidden_states=tokens, img_ids=ids, mask_tokens=len(ids)))


def predict_velocity(
    transformer: nn.Module,
    z_t: Tensor,
    t: Tensor,
    text: TextEmbedding,
    mask_latents: Tensor | MaskMemory | None = None,
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
    elif isinstance(mask_latents, MaskMemory):
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
    mask_latents: Tensor | MaskMemory | None,
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
