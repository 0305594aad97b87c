"""Consistency guidance: the losses of Sec. 3.3 lead the sampler, without any training.

At each step below a time, the clean estimate of Eq. 5 is moved against the gradient of the
consistency losses (universal guidance, Bansal et al. 2023, but the gradient is that at the
estimate alone):

    z_hat = z_t - t v      v' = v + s g / (rms(g) t)      so that z_t - t v' = z_hat - s g / rms(g)

Not part of the paper. What guides must not evaluate: score such pictures with other models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import Config, UserError
from ..consistency import PixelConsistency
from ..flow import reverse_estimate
from ..guards.checks import check_number
from ..losses import NEVER_FADES
from ..perception import ClipScorer, FaceParser
from .inputs import Texts, resize_mask, text_list

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class ConsistencyGuidance:
    """Moves velocities against the gradient of the consistency losses.

    Args:
        losses: decoder and guides.
        scale: how far the estimate is moved at a step, in units of a latent's standard deviation.
        below: only at times t <= this, in (0, 1]; earlier estimates are blurred.
    """

    def __init__(self, losses: PixelConsistency, scale: float = 0.1, below: float = 0.6) -> None:
        check_number(scale, "scale", 0)
        check_number(below, "below", 0, 1)
        config = dataclasses.replace(losses.config, center=NEVER_FADES)
        self.losses = PixelConsistency(losses.vae, losses.clip, losses.parser, config)
        self.scale = scale
        self.below = below

    @classmethod
    def from_config(
        cls,
        config: Config,
        vae: AutoencoderKL,
        scale: float = 0.1,
        below: float = 0.6,
        text: bool = False,
        mask: bool = True,
    ) -> ConsistencyGuidance:
        """With the guides of training, on the autoencoder's device.

        Args:
            config: perception and loss (alpha_text, alpha_mask, balance, smoothing).
            vae: the pipeline's.
            scale: see the class.
            below: likewise.
            text: whether CLIP guides; the miniature's overfits.
            mask: whether the parser guides.

        Raises:
            UserError: neither text nor mask.
        """
        if not (text or mask):
            raise UserError("consistency guidance needs text=True, mask=True or both")
        guides = {"config": config.perception, "device": vae.device}
        losses = PixelConsistency(
            vae,
            ClipScorer.from_config(**guides) if text else None,
            FaceParser.from_config(**guides) if mask else None,
            config.loss,
        )
        return cls(losses, scale, below)

    def conditions(
        self, prompt: Texts, masks: Sequence[Tensor | None], size: tuple[int, int], rows: Tensor
    ) -> Conditions:
        """What b pictures are to agree with.

        Args:
            prompt: of the call.
            masks: label maps `h w`, or None for no mask.
            size: of the pictures, (height, width).
            rows: which mask each picture has, `(b,)`.
        """
        texts = text_list(prompt)
        repeats = max(1, len(rows) // max(len(texts), len(masks)))
        captions = [text for text in texts for _ in range(repeats)]
        captions = [captions[i % len(captions)] for i in range(len(rows))]
        maps = [torch.zeros(size).long() if m is None else resize_mask(m, size) for m in masks]
        return Conditions(
            captions,
            torch.stack(maps)[rows].to(self.losses.vae.device),
            torch.tensor([bool(caption) for caption in captions]),
            torch.tensor([m is not None for m in masks])[rows],
        )

    @torch.no_grad()
    def __call__(self, v: Tensor, z_t: Tensor, t: Tensor, about: Conditions) -> Tensor:
        """The velocity `b c h w` that leads to the moved estimate; `v` itself above `below`."""
        if self.scale == 0 or float(t.max()) > self.below:
            return v
        device = about.label_maps.device
        with torch.enable_grad():
            g, _, _ = self.losses.gradient(
                reverse_estimate(z_t, v, t).detach().to(device), about.captions, about.label_maps,
                t.to(device), about.keep_text.to(device), about.keep_mask.to(device),
            )  # fmt: skip
        rms = g.square().mean((1, 2, 3), keepdim=True).sqrt()
        direction = torch.where(rms > 0, g / rms, 0.0).to(v)
        return v + self.scale * direction / t.view(-1, 1, 1, 1).to(v)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Texts and masks of b pictures."""

    captions: list[str]
    label_maps: Tensor  # `b h w` int64
    keep_text: Tensor  # `(b,)` bool
    keep_mask: Tensor  # `(b,)` bool
