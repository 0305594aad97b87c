"""MDiTFace: Multivariate Diffusion Transformer with Decoupled Attention for High-Fidelity Mask-Text
Collaborative Facial Generation (Cao et al., 2025, arXiv:2511.12631).

Mask and text are tokens of one transformer (*unified tokenization*), and attention is *decoupled*:
the mask's stream depends on neither time nor noise, so it is computed once and its keys and values
serve every step. Newer than the paper, which does not compare with it; there is no official code,
so this follows the abstract.

Simplified: the mask's stream is the base's image stream with the LoRA of the mask branch
(`ec2face_core.fast.decoupled`), where the original gives each block a third stream.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ec2face_core.mask_branch import MaskKVCache, mask_latents_of

from .flux import FluxSystem


class MDiTFace(FluxSystem):
    """Mask tokens that attend to mask tokens only, computed once for all steps."""

    name = "MDiTFace"
    attention = "decoupled"

    def encode_masks(self, maps: Tensor) -> Tensor:
        """Latents of the masks' palette images, `b c h w`."""
        return mask_latents_of(self.vae, maps)

    def condition(self, encoded: Any, z_t: Tensor, t: Tensor) -> Tensor | MaskKVCache:
        """The masks as they are, at every step."""
        return encoded
