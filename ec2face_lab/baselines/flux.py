"""Systems on the base of EC²Face itself: a frozen FLUX that sees a mask as extra tokens.

They differ from EC²Face in how mask tokens are made and who attends to them, and in nothing else:
base, autoencoder, text encoders, rank of the LoRA, sampling and guidance are the same, and training
is plain flow matching (Eq. 3). The two that stand on this are newer than the paper, which does not
compare with them.

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
from ec2face_core.config import Config, resolve
from ec2face_core.data import FaceDataset
from ec2face_core.flow import interpolate, sample_timesteps, velocity
from ec2face_core.losses import flow_matching_loss
from ec2face_core.mask_branch import (
    MaskKVCache,
    add_mask_lora,
    guided_velocity,
    is_decoupled,
    precompute_mask_kv,
    predict_velocity,
)
from ec2face_core.pipeline import flux_timesteps

from .system import Faces, System, seeded
from .unets import LatentFaces, drop_texts, optimise

BATCH = 16  # as in EC²Face's training in the miniature, which has the rate of `optimise`, too

TEXT_DROP = 0.1


class FluxSystem(System):
    """A system that steers EC²Face's own base through mask tokens and a LoRA on these.

    Attributes:
        attention: of the mask tokens, `joint` or `decoupled`.
        shape: of a latent, `(c, h, w)`.
    """

    attention: str = "joint"
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.base = load_backbone(config.backbone)
        self.vae, self.transformer = self.base.vae, self.base.transformer
        side = config.data.size >> (len(self.vae.config.block_out_channels) - 1)
        self.shape = (self.vae.config.latent_channels, side, side)
        with seeded(config.seed):
            lora = dataclasses.replace(config.lora, attention=self.attention)
            self.networks["lora"] = nn.ParameterList(add_mask_lora(self.transformer, lora))
            self.build()

    def build(self) -> None:
        """Add networks beside the LoRA, under the seed."""

    @abstractmethod
    def remember(self, maps: Tensor) -> Tensor:
        """Label maps `b h w` -> what is encoded once of them, for `condition`, `(b, ...)`."""

    @abstractmethod
    def condition(self, known: Any, z_t: Tensor, t: Tensor) -> Tensor | MaskKVCache:
        """The mask at one step, as `predict_velocity` takes it.

        Args:
            known: what `remember` made of b masks; in decoupled sampling their memory.
            z_t: noisy latents `b c h w`.
            t: times `(b,)`, 0 = data, 1 = noise.
        """

    @classmethod
    def budget(cls, config: Config) -> float:
        """What EC²Face stands on is there, so only the time for the task may be spent."""
        return config.baselines.seconds

    @classmethod
    def grounds(cls, config: Config, folder: Path) -> dict[str, Path]:
        return {"base": resolve(config.backbone.path) / "transformer"}

    def parameters(self) -> int:
        beside = [net for name, net in self.networks.items() if name != "lora"]
        return sum(p.numel() for net in (self.transformer, *beside) for p in net.parameters())

    def fit(
        self,
        dataset: FaceDataset,
        run_dir: Path,
        seconds: float,
        seed: int = 42,
        max_steps: int = 0,
    ) -> None:
        """Flow matching with both conditions (Eqs. 3 and 13); one stage."""
        faces = LatentFaces(Faces.read(dataset), self.vae)
        known = self.encode(faces.faces.label_maps)

        def loss(generator: torch.Generator) -> Tensor:
            rows, texts = faces.faces.draw(BATCH, generator)
            t, z = sample_timesteps(BATCH, generator), faces.z[rows]
            noise = torch.randn(z.shape, generator=generator)
            text = self.read(drop_texts(texts, TEXT_DROP, generator))
            z_t, seen = interpolate(z, noise, t), self.drop(known[rows].float(), generator)
            v = predict_velocity(self.transformer, z_t, t, text, self.condition(seen, z_t, t))
            return flow_matching_loss(v, velocity(z, noise)).mean()

        optimise("control", loss, dict(self.networks), run_dir, seconds, seed, None, max_steps)

    def sample(
        self,
        prompts: Sequence[str] | None,
        masks: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Euler steps with EC²Face's guidance towards both; one condition alone as there, too."""
        b, s = len(generators), self.config.sampling
        null = self.read([""] * b)
        text = null if prompts is None else self.read(prompts)
        z = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
        scheduler, tokens = self.base.scheduler, self.shape[1] * self.shape[2] // 4
        with torch.autocast("cpu", torch.bfloat16, enabled=s.mixed_precision == "bf16"):
            known = None if masks is None else self.remember(masks)
            if masks is not None and is_decoupled(self.transformer):  # once for all steps
                known = precompute_mask_kv(self.transformer, known)
            for time in flux_timesteps(scheduler, s.steps, tokens, "cpu"):
                t = (time / 1000).expand(b)
                mask = None if known is None else self.condition(known, z, t)
                guides = (s.guidance, s.text_guidance, s.mask_guidance)
                v = guided_velocity(self.transformer, z, t, text, null, mask, None, *guides)
                z = scheduler.step(v, time, z, return_dict=False)[0]
            return (decode_latents(self.vae, z) / 2 + 0.5).clamp(0, 1)

    def read(self, texts: Sequence[str]) -> TextEmbedding:
        """Captions through the base's own text encoders."""
        return encode_text(self.base, texts, self.config.backbone.text_length)

    @torch.no_grad()
    def encode(self, maps: Tensor) -> Tensor:
        """`remember` of every training mask, in half precision."""
        return torch.cat([self.remember(some.long()).half() for some in maps.split(64)])

    def drop(self, known: Tensor, generator: torch.Generator) -> Tensor:
        """What of the masks is left out in training: here, nothing."""
        return known
