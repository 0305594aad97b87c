"""CoDiffusion: Collaborative Diffusion for Multi-Modal Face Generation and Editing (Huang et al.,
CVPR 2023), https://github.com/ziqihuangg/Collaborative-Diffusion.

Two uni-modal latent diffusers, text-to-face and mask-to-face, are trained apart and frozen. A
dynamic diffuser for each then predicts, from (x_t, t, its own condition), the influence of its
modality at each pixel and step: e = sum_m I_m e_m with I = softmax over m.

Simplified: U-Nets of 1.3 M parameters that predict v, which mixes as the noise e does; captions
enter as CLIP's word features (the original trains a BERT-like encoder of its own); the text
diffuser is the U-Net shared with ControlNeXt, trained with 10 % of the captions dropped; label maps
are taken at the latent's side (a quarter or an eighth of the picture's, 1/16 there), by nearest
pixel as there, so small parts are lost in part; 28 steps of DDIM (50 there).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import one_hot

from ..world.training import seeded
from .encoders import word_features
from .system import Faces, Generators, Masks, Run, Texts
from .unets import (
    BATCH,
    LatentFaces,
    TextUnetSystem,
    denoising_loss,
    optimise,
    prediction_of,
    text_unet,
)

MASK_WIDTH = 128  # of a class token, out of 256 cells: 640 out of 1024 there

DYNAMIC = (8, 16)  # channels of a dynamic diffuser: 32 against 192 there

MASK_SHARE = 0.6  # of the time for the mask diffuser, the rest for the dynamic ones


class CoDiffusion(TextUnetSystem):
    """Frozen uni-modal diffusers that collaborate through influence maps."""

    name = "CoDiffusion"
    shares = ("text_unet", "text")

    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""
        cells = self.shape[1] * self.shape[2]
        with seeded(seed):
            self.networks["text"] = text_unet(self.shape, self.words)
            self.networks["tokens"] = nn.Linear(cells, MASK_WIDTH)
            self.networks["mask"] = text_unet(self.shape, MASK_WIDTH)
            for kind, width in (("text", self.words), ("mask", MASK_WIDTH)):
                self.networks[f"{kind}_influence"] = text_unet(self.shape, width, DYNAMIC, 1)
        self.networks.to(self.device)

    def train(self, faces: Faces, run: Run) -> None:
        """Stage 1: the mask diffuser (the text diffuser is shared); stage 2: influence alone."""
        latents = LatentFaces(faces, self.vae)
        nets = self.networks

        def mask_loss(generator: torch.Generator) -> Tensor:
            z, maps, _ = latents.batch(BATCH, generator)
            tokens = self.mask_tokens(maps)
            return denoising_loss(prediction_of(nets["mask"]), self.scheduler, z, generator, tokens)

        def influence_loss(generator: torch.Generator) -> Tensor:
            z, maps, texts = latents.batch(BATCH, generator)
            with torch.no_grad():
                contexts = {"text": word_features(self.clip, texts), "mask": self.mask_tokens(maps)}
            return denoising_loss(
                lambda x, t: self.collaborate(x, t, contexts)[0], self.scheduler, z, generator
            )

        diffuser = {k: nets[k] for k in ("mask", "tokens")}
        dynamic = {k: nets[k] for k in ("text_influence", "mask_influence")}
        optimise(run, "mask", mask_loss, diffuser, share=MASK_SHARE)
        optimise(run, "influence", influence_loss, dynamic, share=1 - MASK_SHARE)

    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """DDIM with eta 1 and no guidance, as there; one modality alone is its own diffuser's."""
        contexts = self.contexts(prompts, masks)
        return self.decode_samples(
            lambda x, t: self.collaborate(x, t, contexts)[0], generators, eta=1.0
        )

    @torch.no_grad()
    def contexts(self, prompts: Texts, masks: Masks) -> dict[str, Tensor]:
        """Tokens of each modality that is given, by its name."""
        text = {} if prompts is None else {"text": word_features(self.clip, prompts)}
        return text if masks is None else text | {"mask": self.mask_tokens(masks)}

    def mask_tokens(self, masks: Tensor) -> Tensor:
        """Label maps `b h w` -> a token for each class, `b 19 d`: its flattened coarse map."""
        coarse = F.interpolate(masks[:, None].float(), self.shape[1:], mode="nearest-exact")
        return self.networks["tokens"](one_hot(coarse[:, 0].long()).flatten(2))

    def collaborate(
        self, x_t: Tensor, t: Tensor, contexts: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Collaborative prediction `b c h w` and the influence map `b 1 h w` of each modality."""
        with torch.no_grad():  # the uni-modal diffusers are frozen
            each = {m: self.networks[m](x_t, t, c).sample for m, c in contexts.items()}
        if len(contexts) == 1:
            return next(iter(each.values())), {m: torch.ones_like(x_t[:, :1]) for m in each}
        raw = {m: self.networks[f"{m}_influence"](x_t, t, c).sample for m, c in contexts.items()}
        influence = dict(zip(raw, torch.stack(list(raw.values())).softmax(0), strict=True))
        return sum(influence[m] * each[m] for m in each), influence
