"""Explicit conditional consistency guidance (Sec. 3.3): losses on the decoded estimate's pixels.

    z_hat = z_t - t v        L = beta(t) (alpha_text L_text(D(z_hat)) + alpha_mask L_mask(D(z_hat)))

Chosen here: two stages. The gradient g = dL/dz_hat is taken at a *detached* z_hat, and the training
loss gets `(z_hat * g).sum()`, whose gradient is the same by the chain rule. So the graph through
decoder, parser and CLIP is freed before the transformer's backward begins, pictures are decoded a
few at a time, and no parameter that ranks share is involved. The same makes two savings possible
(off by default): the gate decodes only some samples of a batch, and a small decoder (TAEF1) stands
in for the VAE's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .backbone import decode_latents
from .config import LossConfig
from .losses import mask_consistency_loss, text_consistency_loss, total_loss
from .perception import ClipScorer, FaceParser

PIXELS_AT_ONCE = 512 * 512  # one picture at paper scale, 64 in the miniature


class PixelConsistency:
    """The consistency losses of Eqs. 6 and 7 and their modulated gradient at z_hat.

    Args:
        vae: decodes; AutoencoderKL, or AutoencoderTiny (`load_tiny_decoder`).
        clip: reads the text; None = no text consistency.
        parser: reads the mask; None = no mask consistency.
        config: reads alpha_*, balance, smoothing, steepness, center.
    """

    def __init__(
        self,
        vae: nn.Module,
        clip: ClipScorer | None,
        parser: FaceParser | None,
        config: LossConfig,
    ) -> None:
        self.vae, self.clip, self.parser, self.config = vae, clip, parser, config

    def losses(
        self, z_hat: Tensor, captions: Sequence[str], label_map: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """L_text and L_mask `(b,)` of the decoded latents `b c h w`; differentiable."""
        images, c = decode_latents(self.vae, z_hat), self.config
        text = mask = None
        if self.clip is not None:
            features = self.clip.image_features(images), self.clip.text_features(captions)
            text = text_consistency_loss(*features)
        if self.parser is not None:
            probabilities = self.parser.probabilities(images)
            mask = mask_consistency_loss(probabilities, label_map, c.balance, c.smoothing)
        return text, mask

    def gradient(
        self,
        z_hat: Tensor,
        captions: Sequence[str],
        label_map: Tensor,
        t: Tensor,
        keep_text: Tensor | None = None,
        keep_mask: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The first stage.

        Args:
            z_hat: estimates, `b c h w`; not differentiated through.
            captions: b texts.
            label_map: `b H W` int64, of the size of the decoded pictures.
            t: times `(b,)`; every sample counts, however small beta(t) is.
            keep_text, keep_mask: `(b,)` bool; a dropped condition asks for nothing. None = all.
            gate: `(b,)` weights on the CPU; samples of weight 0 are not even decoded. None = 1.

        Returns:
            g `b c h w`, of the *sum* over samples of Eq. 9, and the losses `(b,)`, detached; all
            times the gate's weights.
        """
        if gate is None:
            return self._gradient(z_hat, captions, label_map, t, keep_text, keep_mask)
        chosen = gate.nonzero()[:, 0]
        rows, weights = chosen.to(z_hat.device), gate[chosen].to(z_hat.device)
        g, text, mask = torch.zeros_like(z_hat), None, None
        if len(chosen):
            keep = [None if k is None else k[rows] for k in (keep_text, keep_mask)]
            some = [captions[i] for i in chosen.tolist()]
            part, text, mask = self._gradient(z_hat[rows], some, label_map[rows], t[rows], *keep)
            g[rows] = part * weights[:, None, None, None]
        zero, losses = torch.zeros_like(t), []
        for critic, loss in ((self.clip, text), (self.parser, mask)):
            full = zero if loss is None else zero.index_copy(0, rows, (loss * weights).to(t.dtype))
            losses.append(None if critic is None else full)
        return g, *losses

    def _gradient(
        self,
        z_hat: Tensor,
        captions: Sequence[str],
        label_map: Tensor,
        t: Tensor,
        keep_text: Tensor | None,
        keep_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        side = label_map.shape[-1]
        at_once = max(1, PIXELS_AT_ONCE // side**2)
        gradients, losses = [], []
        for start in range(0, len(z_hat), at_once):
            rows = slice(start, start + at_once)
            z = z_hat[rows].detach().requires_grad_()
            text, mask = self.losses(z, captions[rows], label_map[rows])
            keep = [None if k is None else k[rows] for k in (keep_text, keep_mask)]
            modulated = total_loss(
                torch.zeros_like(t[rows]), text, mask, t[rows], self.config, *keep
            )
            gradients += torch.autograd.grad(modulated.total.sum(), z)
            losses.append([None if part is None else part.detach() for part in (text, mask)])
        text, mask = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*losses, strict=True)
        )
        return torch.cat(gradients), text, mask
