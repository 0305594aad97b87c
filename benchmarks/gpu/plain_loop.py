"""A training loop as it is usually written, for comparison: everything every time, on all tokens.

The LoRA is computed on all tokens and multiplied by 0 or 1, as OminiControl's is; one sample at a
time, every block recomputed, 512 text tokens, text encoders and autoencoder in the loop, one graph
through transformer, decoder, parser and CLIP, nothing compiled. The losses are those of EC²Face.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from networks import Networks, Size, place_lora
from random_trainer import Settings, configuration, reset
from torch import Tensor, nn

from ec2face_core.attributes import NUM_CLASSES
from ec2face_core.backbone import TextEmbedding, encode_images
from ec2face_core.consistency import PixelConsistency
from ec2face_core.flow import interpolate, reverse_estimate, target_velocity
from ec2face_core.losses import flow_matching_loss, latent_weights, total_loss
from ec2face_core.mask_branch import mask_latents_of, predict_velocity

TEXT = 512  # tokens, of FLUX.1-dev


def loop_text(size: Size) -> int:
    """Text tokens of the loop for networks of this size."""
    return TEXT if size.text >= 128 else size.text


@dataclass
class Encoders:
    """The text encoders of FLUX at random weights, or small ones."""

    t5: nn.Module
    clip: nn.Module
    vocabulary: int  # of both, at least

    def embed(self, tokens: Tensor) -> TextEmbedding:
        """Token ids `b n` -> embedding."""
        pooled = self.clip(tokens[:, : self.clip.config.max_position_embeddings]).pooler_output
        return TextEmbedding(self.t5(tokens)[0], pooled)


def build_encoders(size: Size, device: torch.device) -> Encoders:
    """T5's encoder and CLIP's text tower, of the widths that the transformer expects."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    dims = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | size.transformer
    wide = dims["joint_attention_dim"]
    pooled = dims["pooled_projection_dim"]
    full = wide == 4096
    t5 = T5Config(
        vocab_size=32128 if full else 512, d_model=wide, d_kv=64 if full else 16,
        d_ff=10240 if full else 64, num_layers=24 if full else 2, num_heads=64 if full else 4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=49408 if full else 512, hidden_size=pooled, intermediate_size=4 * pooled,
        num_hidden_layers=12 if full else 2, num_attention_heads=pooled // 64 or 1,
        projection_dim=pooled, eos_token_id=1,
    )  # fmt: skip
    with torch.device(device):
        nets = [T5EncoderModel(t5), CLIPTextModel(clip)]
    for net in nets:
        net.to(size.dtype).requires_grad_(False).eval()
    return Encoders(*nets, vocabulary=min(t5.vocab_size, clip.vocab_size))


class PlainLoop:
    """The loop on random data of its device.

    Args:
        networks: of the measurement; the transformer is brought into the loop's state.
        size: what they were built from.
    """

    def __init__(self, networks: Networks, size: Size) -> None:
        self.networks = networks
        self.size = size
        self.device = networks.parameters[0].device
        self.text = loop_text(size)
        self.config = configuration(size, Settings(text=self.text, batch=1))
        self.encoders = build_encoders(size, self.device)
        self.optimizer = torch.optim.AdamW(networks.parameters, lr=1e-4)
        loss = self.config.loss
        self.consistency = PixelConsistency(networks.vae, networks.clip, networks.parser, loss)
        self.generator = torch.Generator(self.device).manual_seed(0)
        reset(networks.transformer, self.config, size)
        placed = dataclasses.replace(size, text=self.text)
        place_lora(networks.transformer, placed, everywhere=True)
        networks.transformer.enable_gradient_checkpointing()

    def update(self) -> None:
        """One optimiser step on one sample."""
        image, labels, tokens, noise, t = self._sample()
        n = self.networks
        config = self.config
        with torch.no_grad():
            z = encode_images(n.vae, image)
            z_mask = mask_latents_of(n.vae, labels)
            text = self.encoders.embed(tokens)
        with torch.autocast(self.device.type, torch.bfloat16):
            z_t = interpolate(z, noise, t)
            v = predict_velocity(n.transformer, z_t, t, text, z_mask)
            counts = torch.bincount(labels.flatten(), minlength=NUM_CLASSES)
            w = latent_weights(labels, counts, z.shape[-1], config.loss)
            flow = flow_matching_loss(v.float(), target_velocity(z, noise), w)
            z_hat = reverse_estimate(z_t, v, t)
            text_loss, mask_loss = self.consistency.losses(z_hat, ["face"], labels)
            loss = total_loss(flow, text_loss, mask_loss, t, config.loss).total.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(n.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Image [-1, 1], label map, token ids, noise and time of one sample."""
        pixels = self.size.pixels
        side = self.size.latent_side
        options: dict[str, Any] = {"generator": self.generator, "device": self.device}
        image = torch.rand(1, 3, pixels, pixels, **options) * 2 - 1
        labels = torch.randint(NUM_CLASSES, (1, pixels, pixels), **options)
        tokens = torch.randint(2, self.encoders.vocabulary, (1, self.text), **options)
        noise = torch.randn(1, self.size.vae["latent_channels"], side, side, **options)
        return image, labels, tokens, noise, torch.rand(1, **options)
