"""ControlNeXt: Powerful and Efficient Control for Image and Video Generation (Peng et al., 2024),
https://github.com/dvlab-research/ControlNeXt.

A frozen text-to-image U-Net is controlled without a copied branch and without zero convolutions: a
light encoder of the mask, and *cross-normalisation*, which gives its features the mean and standard
deviation of the U-Net's own before they are added. Beside the encoder only the output projections
of the attention layers are trained.

Simplified: U-Nets predict v; the base is the miniature's text U-Net, the same as CoDiffusion's text
diffuser; the encoder has two residual blocks, no attention, and reads the U-Net's own time
embedding; the first skip carries the controls, too, as they are added where it is taken. There is
no public recipe for faces: the mask's scale is 1, as there for dense maps, text is dropped in 20 %
of the samples, as in the SDXL recipe, and guidance is `TEXT_GUIDANCE` (7.5 there, for a base of
0.9 G parameters) over 28 steps of DDIM (20 of UniPC).
The original sees a mask in palette colours, as `baselines.published_masks` does here; one-hot maps
of all 19 classes are fair to the other systems.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..world.training import seeded
from .encoders import word_features
from .system import Faces, Generators, Masks, Run, Texts
from .unets import (
    BATCH,
    CHANNELS,
    LatentFaces,
    TextUnetSystem,
    denoising_loss,
    drop_texts,
    guided,
    optimise,
    text_unet,
)

TRAINED = ".to_out."  # what of the base is trained: increments of these weights

DROP = 0.2

TEXT_GUIDANCE = 2.0

WIDTH = 128  # channels of the encoder's residual blocks

INCREMENT_LR = 3e-4  # the encoder learns faster, by 10 in the SD1.5 recipe, by 5 here


class ControlNeXt(TextUnetSystem):
    """A frozen text-to-image U-Net, a light mask encoder, and a few trained weights."""

    name = "ControlNeXt"
    shares = ("text_unet", "unet")
    own_masks = True

    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""
        self.maps = 3 if self.config.baselines.published_masks else 19
        with seeded(seed):
            unet = text_unet(self.shape, self.words)
            time = unet.config.block_out_channels[0] * 4
            encoder = MaskEncoder(self.size // self.shape[1], time, self.maps)
        self.trained = [k for k, _ in unet.named_parameters() if TRAINED in k]
        increments = [torch.zeros_like(unet.get_parameter(k)) for k in self.trained]
        self.networks["unet"] = unet
        self.networks["encoder"] = encoder
        self.networks["increments"] = nn.ParameterList(increments)
        self.networks.to(self.device)

    def train(self, faces: Faces, run: Run) -> None:
        """Encoder and increments together."""
        latents = LatentFaces(faces, self.vae)

        def loss(generator: torch.Generator) -> Tensor:
            z, maps, texts = latents.batch(BATCH, generator)
            words = word_features(self.clip, drop_texts(texts, DROP, generator))
            return denoising_loss(self.predict, self.scheduler, z, generator, words, maps)

        trained = {k: self.networks[k] for k in ("encoder", "increments")}
        optimise(run, "control", loss, trained, lrs={"increments": INCREMENT_LR})

    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Text is guided; mask alone has an empty prompt; text alone is the untouched base."""
        empty = word_features(self.clip, [""] * len(generators))
        words = empty if prompts is None else word_features(self.clip, prompts)
        weight = 1.0 if prompts is None else TEXT_GUIDANCE

        def guide(x: Tensor, t: Tensor) -> Tensor:
            if masks is None:
                return guided(self.predict, weight, (x, x), (t, t), (words, empty))
            pairs = ((x, x), (t, t), (words, empty), (masks, masks))
            return guided(self.predict, weight, *pairs)

        return self.decode_samples(guide, generators)

    def predict(self, x_t: Tensor, t: Tensor, words: Tensor, masks: Tensor | None = None) -> Tensor:
        """Prediction `b c h w`, of the base alone where there are no masks `b h w`."""
        unet = self.networks["unet"]
        if masks is None:
            return unet(x_t, t, words).sample
        time = unet.time_embedding(unet.time_proj(t))
        controls = self.networks["encoder"](self.see(masks), time)
        pairs = zip(self.trained, self.networks["increments"], strict=True)
        weights = {name: unet.get_parameter(name) + increment for name, increment in pairs}

        def add(module: nn.Module, inputs: tuple, features: Tensor) -> Tensor:
            return features + cross_normalise(controls, features)

        handle = unet.conv_in.register_forward_hook(add)
        try:
            return functional_call(unet, weights, (x_t, t, words)).sample
        finally:
            handle.remove()


class MaskEncoder(nn.Module):
    """Maps of a mask `b k h w` and a time embedding -> controls for the U-Net's first features.

    Args:
        fold: how many times smaller than the mask the controls are: a power of two from 4 on.
        time: width of the time embedding.
        maps: k.
    """

    def __init__(self, fold: int, time: int, maps: int) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        half = WIDTH // 2
        layers: list[nn.Module] = [nn.Conv2d(maps, half, 4, stride=2, padding=1)]
        width = half
        for _ in range(fold.bit_length() - 2):
            layers += [nn.GroupNorm(4, width), nn.SiLU()]
            layers.append(nn.Conv2d(width, WIDTH, 4, stride=2, padding=1))
            width = WIDTH
        self.door = nn.Sequential(*layers)
        self.blocks = nn.ModuleList(
            ResnetBlock2D(in_channels=WIDTH, temb_channels=time, groups=8) for _ in range(2)
        )
        self.out = nn.Sequential(
            nn.GroupNorm(8, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, CHANNELS[0], 1)
        )

    def forward(self, mask: Tensor, time: Tensor) -> Tensor:
        """Controls `b c h w`."""
        x = self.door(mask)
        for block in self.blocks:
            x = block(x, time)
        return self.out(x)


def cross_normalise(controls: Tensor, features: Tensor) -> Tensor:
    """Controls with the mean and standard deviation of the features, sample by sample (Sec. 3.3).

    Both `b c h w`; moments are over channels and space together, as in the released code.
    """

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)

    mean, std = moments(controls.float())
    mean_f, std_f = moments(features.float())
    return ((controls.float() - mean) * (std_f / (std + 1e-12)) + mean_f).to(features.dtype)
