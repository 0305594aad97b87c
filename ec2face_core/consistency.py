"""Explicit conditional consistency (Sec. 3.3): losses on the pixels of the decoded estimate.

    z_hat = z_t - t v    L_mcc = beta(t) (alpha_text L_text(D(z_hat)) + alpha_mask L_mask(D(z_hat)))

The gradient is taken in two stages. First g = dL_mcc/dz_hat at a *detached* z_hat; then L_mcc is a
function of z_hat whose value and gradient g are known, which is the same by the chain rule. So the
graph through decoder, parser and CLIP is freed before the transformer's backward begins, pictures
are decoded a few at a time, and DDP has nothing to synchronise. Two savings follow, both off by
default: the pixel losses of some samples of the batch only (`fast/importance.py`), and a small
decoder (TAEF1, `backbone.load_tiny_decoder`) in place of the VAE's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backbone import decode_latents
from .config import LossConfig
from .fast.transfer import send
from .losses import LossBreakdown, mask_consistency_loss, text_consistency_loss, total_loss
from .perception import ClipScorer, FaceParser

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PIXELS_AT_ONCE = 2 * 512 * 512  # decoded together: two pictures at paper scale


def pictures_at_once(area: int) -> int:
    """How many pictures of so many pixels are decoded together."""
    return max(1, PIXELS_AT_ONCE // area)


class _KnownGradient(torch.autograd.Function):
    """A per-sample function of x whose values and gradient have been computed before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype)[:, None, None, None], None, None


class PixelConsistency:
    """The consistency losses of Eqs. 6 and 7 and their modulated gradient at z_hat.

    Args:
        vae: decoder, an AutoencoderKL or an AutoencoderTiny.
        clip: guide for the text; None: no text consistency.
        parser: guide for the mask; None: no mask consistency.
        config: alpha_text, alpha_mask, balance, smoothing, steepness and center are used.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        clip: ClipScorer | None,
        parser: FaceParser | None,
        config: LossConfig,
    ) -> None:
        self.vae = vae
        self.clip = clip
        self.parser = parser
        self.config = config

    def losses(
        self, z_hat: Tensor, captions: Sequence[str], label_map: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Eqs. 6 and 7: L_text and L_mask `(b,)` of the decoded latents; differentiable.

        Args:
            z_hat: latents `b c h w`.
            captions: b texts.
            label_map: `b H W` int64, of the size of the decoded pictures.

        Returns:
            L_text and L_mask; None without the guide.
        """
        images = decode_latents(self.vae, z_hat)
        text_loss = None
        if self.clip is not None:
            image_features = self.clip.image_features(images)
            text_loss = text_consistency_loss(image_features, self.clip.text_features(captions))
        mask_loss = None
        if self.parser is not None:
            probabilities = self.parser.probabilities(images)
            mask_loss = mask_consistency_loss(
                probabilities, label_map, self.config.balance, self.config.smoothing
            )
        return text_loss, mask_loss

    def loss(
        self,
        z_hat: Tensor,
        captions: Sequence[str],
        label_map: Tensor,
        t: Tensor,
        keep_text: Tensor | None = None,
        keep_mask: Tensor | None = None,
        pixel_weight: Tensor | None = None,
    ) -> LossBreakdown:
        """Eq. 9: L_mcc as the total, differentiable once with respect to z_hat, and its parts.

        Arguments are those of `gradient`; flow is 0, text and mask are detached.
        """
        g, text, mask = self.gradient(
            z_hat, captions, label_map, t, keep_text, keep_mask, pixel_weight
        )
        no_flow = torch.zeros_like(t)
        parts = total_loss(no_flow, text, mask, t, self.config, keep_text, keep_mask)
        L_mcc = _KnownGradient.apply(z_hat, parts.total, g)
        return dataclasses.replace(parts, total=L_mcc)

    def gradient(
        self,
        z_hat: Tensor,
        captions: Sequence[str],
        label_map: Tensor,
        t: Tensor,
        keep_text: Tensor | None = None,
        keep_mask: Tensor | None = None,
        pixel_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Eq. 9: g, the gradient of the modulated losses at z_hat (the first stage).

        Args:
            z_hat: estimates, `b c h w`; not differentiated through.
            captions: b texts.
            label_map: `b H W` int64, of the size of the decoded pictures.
            t: times `(b,)`; every sample counts, however small beta(t) is.
            keep_text: `(b,)` bool; a dropped text has no consistency loss. None: all are kept.
            keep_mask: `(b,)` bool, likewise for the mask.
            pixel_weight: `(b,)` on the CPU; samples of weight 0 are not even decoded. None: 1.

        Returns:
            g `b c h w`, of the *sum* of Eq. 9 over samples, and L_text and L_mask `(b,)`, detached
            (None without the guide); all times pixel_weight.
        """
        weight = torch.ones(len(t)) if pixel_weight is None else pixel_weight
        at_once = pictures_at_once(label_map.shape[-1] ** 2)
        g = torch.zeros_like(z_hat)
        text_loss = None if self.clip is None else torch.zeros_like(t)
        mask_loss = None if self.parser is None else torch.zeros_like(t)
        for chunk in weight.nonzero()[:, 0].split(at_once):
            if len(chunk) == 0:
                continue
            rows = send(chunk, z_hat.device)
            importance = send(weight[chunk], z_hat.device).to(z_hat.dtype)
            z = z_hat[rows].detach().requires_grad_()
            text, mask = self.losses(z, [captions[i] for i in chunk.tolist()], label_map[rows])
            keep = [None if k is None else k[rows] for k in (keep_text, keep_mask)]
            no_flow = torch.zeros_like(t[rows])
            L_mcc = total_loss(no_flow, text, mask, t[rows], self.config, *keep).total
            (dL_dz,) = torch.autograd.grad(L_mcc.sum(), z)
            g[rows] = dL_dz * importance[:, None, None, None]
            if text_loss is not None and text is not None:
                text_loss[rows] = (text.detach() * importance).to(t.dtype)
            if mask_loss is not None and mask is not None:
                mask_loss[rows] = (mask.detach() * importance).to(t.dtype)
        return g, text_loss, mask_loss
