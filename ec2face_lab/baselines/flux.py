"""Systems on the base of EC²Face itself: a frozen FLUX with the mask as extra tokens.

They differ from EC²Face only in the mask tokens and in the attention to them: base, autoencoder,
text encoders, rank of the LoRA, sampling and guidance are the same, and training is plain flow
matching (Eq. 3). Both systems are newer than the paper, which does not compare with them.

Chosen here: texts are dropped in 10 % of the samples, as in Face-MoGLE. A dropped mask is the base
without mask tokens, on which the LoRA has no effect, so there is nothing to train.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ec2face_core.backbone import TextEmbedding, decode_latents, encode_text, load_backbone
from ec2face_core.config import Config
from ec2face_core.flow import interpolate, sample_timesteps, target_velocity
from ec2face_core.inference.inputs import flux_timesteps
from ec2face_core.io.paths import resolve
from ec2face_core.losses import flow_matching_loss
from ec2face_core.mask_branch import (
    MaskKVCache,
    add_mask_lora,
    guided_velocity,
    is_decoupled,
    precompute_mask_kv,
    predict_velocity,
)

from ..world.training import seeded
from .system import Faces, Generators, Masks, Run, System, Texts
from .unets import LatentFaces, drop_texts, optimise

BATCH = 16  # of EC²Face's training in the miniature, which has the learning rate of `optimise`, too

TEXT_DROP = 0.1


class FluxSystem(System):
    """A system that steers EC²Face's own base through mask tokens and a LoRA on these.

    Attributes:
        attention: of the mask tokens, `joint` or `decoupled`.
        shape: of a latent, `(c, h, w)`.
    """

    attention: str = "joint"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")

    def __init__(self, config: Config, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.base = load_backbone(config.backbone).to(self.device)
        self.vae = self.base.vae
        self.transformer = self.base.transformer
        side = config.data.size >> (len(self.vae.config.block_out_channels) - 1)
        self.shape = (self.vae.config.latent_channels, side, side)
        lora = dataclasses.replace(config.lora, attention=self.attention)
        with seeded(config.seed):
            self.networks["lora"] = nn.ParameterList(add_mask_lora(self.transformer, lora))
            self.add_networks()
        self.networks.to(self.device)

    def build(self, seed: int) -> None:
        """Nothing: a transformer takes its LoRA once, under the profile's seed."""

    def add_networks(self) -> None:
        """Add networks beside the LoRA, with torch's global generator."""

    @abstractmethod
    def encode_masks(self, maps: Tensor) -> Tensor:
        """Label maps `b h w` -> what `condition` needs of them at every step, `(b, ...)`."""

    @abstractmethod
    def condition(self, encoded: Any, z_t: Tensor, t: Tensor) -> Tensor | MaskKVCache:
        """The mask at one step, as `predict_velocity` takes it.

        Args:
            encoded: what `encode_masks` gave; in decoupled sampling a cache of keys and values.
            z_t: noisy latents `b c h w`.
            t: times `(b,)`, 0 = data, 1 = noise.
        """

    @classmethod
    def budget(cls, config: Config) -> float:
        """The time for the task only, as the foundation is EC²Face's."""
        return config.baselines.seconds

    @classmethod
    def frozen_files(cls, config: Config, folder: Path) -> dict[str, Path]:
        """The transformer of EC²Face's base."""
        return {"base": resolve(config.backbone.path) / "transformer"}

    def parameters(self) -> int:
        """Weights of the transformer, its LoRA included, and of the networks beside it."""
        others = [net for name, net in self.networks.items() if name != "lora"]
        return sum(p.numel() for net in (self.transformer, *others) for p in net.parameters())

    def train(self, faces: Faces, run: Run) -> None:
        """Flow matching with both conditions (Eqs. 3 and 13); one stage."""
        z_all = LatentFaces(faces, self.vae).z
        encoded = self.encode_all_masks(faces.label_maps)

        def loss(generator: torch.Generator) -> Tensor:
            rows, texts = faces.sample(BATCH, generator)
            t = sample_timesteps(BATCH, generator)
            z = z_all[rows]
            noise = torch.randn(z.shape, generator=generator, device=z.device)
            text = self.encode_texts(drop_texts(texts, TEXT_DROP, generator))
            z_t = interpolate(z, noise, t)
            mask = self.condition(self.drop(encoded[rows].float(), generator), z_t, t)
            guidance = self.config.backbone.guidance
            v = predict_velocity(self.transformer, z_t, t, text, mask, guidance=guidance)
            return flow_matching_loss(v, target_velocity(z, noise)).mean()

        optimise(run, "control", loss, dict(self.networks))

    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Euler steps with EC²Face's classifier-free guidance of both conditions, or of one."""
        b = len(generators)
        s = self.config.sampling
        null = self.encode_texts([""] * b)
        text = null if prompts is None else self.encode_texts(prompts)
        z = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
        z = z.to(self.device)
        scheduler = self.base.scheduler
        tokens = self.shape[1] * self.shape[2] // 4
        half = s.mixed_precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            encoded = None if masks is None else self.encode_masks(masks)
            if masks is not None and is_decoupled(self.transformer):  # once for all steps
                encoded = precompute_mask_kv(self.transformer, encoded)
            for time in flux_timesteps(scheduler, s.steps, tokens, self.device):
                t = (time / 1000).expand(b)
                mask = None if encoded is None else self.condition(encoded, z, t)
                scales = (s.guidance, s.text_guidance, s.mask_guidance)
                v = guided_velocity(self.transformer, z, t, text, null, mask, None, *scales)
                z = scheduler.step(v, time, z, return_dict=False)[0]
            return (decode_latents(self.vae, z) / 2 + 0.5).clamp(0, 1)

    def encode_texts(self, texts: Sequence[str]) -> TextEmbedding:
        """Captions through the base's own text encoders."""
        return encode_text(self.base, texts, self.config.backbone.text_length)

    @torch.no_grad()
    def encode_all_masks(self, maps: Tensor) -> Tensor:
        """`encode_masks` of every training mask, in half precision."""
        return torch.cat([self.encode_masks(some.long()).half() for some in maps.split(64)])

    def drop(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Drop parts of the masks in training: here, none."""
        return encoded
