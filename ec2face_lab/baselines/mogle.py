"""Face-MoGLE: Mixture of Global and Local Experts with Diffusion Transformer for Controllable Face
Generation (Zou et al., 2025, arXiv:2509.00428), https://github.com/XavierJiezou/Face-MoGLE.

The mask is twenty pictures: its palette image for a *global expert* and a binary map of each class
for nineteen *local experts*, each encoded by the autoencoder. A *dynamic gate*, which takes the
global tokens, the noisy latent and the time, mixes the experts' outputs token by token into the
condition tokens of a FLUX with a LoRA on these. Newer than the paper, which does not compare with
it.

Simplified: experts are half as wide as tokens, as there (16 for 32 channels; 32 for 64); the gate
reads times in [0, 1000] (there in [0, 1], whose sines hardly differ); condition tokens have the
sample's own time (0 there), as they depend on it anyway; AdamW (Prodigy there). Local maps are
emptied with p = 0.1 each, the global one never, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ec2face_core.attributes import NUM_CLASSES, one_hot
from ec2face_core.backbone import encode_images, pack, unpack
from ec2face_core.mask_branch import mask_latents_of

from .flux import FluxSystem

DROP = 0.1  # of each local map


class FaceMoGLE(FluxSystem):
    """Condition tokens that are a gated mixture of the outputs of twenty experts."""

    name = "Face-MoGLE"

    def add_networks(self) -> None:
        """The mixture, and the latent of an empty map."""
        self.networks["mixture"] = Mixture(4 * self.shape[0])
        with torch.no_grad():
            black = -torch.ones(1, 3, self.size, self.size, device=self.device)
            self.blank = encode_images(self.vae, black)

    def encode_masks(self, maps: Tensor) -> Tensor:
        """Latents of the palette image and of each class's map, white on black: `b 20 c h w`."""
        classes = one_hot(maps)
        present = classes.flatten(2).any(2)  # about half of the classes of a mask
        white = classes[present][:, None].expand(-1, 3, -1, -1) * 2 - 1
        local = self.blank.repeat(len(maps), NUM_CLASSES, 1, 1, 1)
        local[present] = encode_images(self.vae, white)
        return torch.cat([mask_latents_of(self.vae, maps)[:, None], local], dim=1)

    def drop(self, encoded: Tensor, generator: torch.Generator) -> Tensor:
        """Empty some of the local maps."""
        dropped = torch.rand(encoded.shape[:2], generator=generator, device=encoded.device) < DROP
        dropped[:, 0] = False
        return torch.where(dropped[..., None, None, None], self.blank, encoded)

    def condition(self, encoded: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The mixture at this step, as latents `b c h w`."""
        tokens = pack(encoded.flatten(0, 1)).unflatten(0, encoded.shape[:2])
        return unpack(self.networks["mixture"](tokens, pack(z_t), t), *self.shape[1:])


class Mixture(nn.Module):
    """Twenty experts and the gate that mixes them: tokens `b 20 n d`, noisy tokens -> `b n d`."""

    def __init__(self, width: int, experts: int = NUM_CLASSES + 1) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, width))
            for _ in range(experts)
        )
        self.times = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(width, width)
        self.noise = nn.Linear(width, width)
        self.gate = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, experts), nn.Softmax(dim=-1)
        )

    def forward(self, tokens: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Condition tokens `b n d`; arguments as in `weights`, tokens of all twenty pictures."""
        outputs = torch.stack([f(x) for f, x in zip(self.experts, tokens.unbind(1), strict=True)])
        return torch.einsum("kbnd,bnk->bnd", outputs, self.weights(tokens[:, 0], noisy, t))

    def weights(self, whole: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Weight of each expert at each token, `b n 20`, sums 1.

        Args:
            whole: tokens of the palette image, `b n d`.
            noisy: tokens of the noisy latent, `b n d`.
            t: times `(b,)` in [0, 1].
        """
        time = self.time(self.times(t * 1000))
        return self.gate(whole + self.noise(noisy) + time[:, None])
