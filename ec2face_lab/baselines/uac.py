"""UaC: Unite and Conquer: Plug & Play Multi-Modal Synthesis using Diffusion Models (Nair et al.,
CVPR 2023), https://github.com/Nithin-GK/UniteandConquer.

Conditions meet only at sampling. A mask-to-face and a text-to-face diffuser are trained apart, each
also without its condition, and their scores are multiplied as experts:

    e = sum_i w_i e_i(x_t, c_i) - (sum_i w_i - 1) e_0,    e_0 = sum_i b_i e_i(x_t, none),  sum b = 1

with b the *reliability* of each model. The text diffuser never sees a text: it is trained on CLIP's
features of the pictures and sampled with those of the caption.

Simplified: pixels are folded (4 x 4) into the channels of a small U-Net, which predicts x_0: a few
channels cannot carry the noise of 48 (with v, or with the noise, pictures stay noisy), and the
composition is the same for x_0, being affine with weights of sum 1. Features come from the
miniature's CLIP (FaRL there). Two networks, as in the paper's plug-and-play setting, both on all
faces; the released face model is one network that is trained on maps, features or nothing. The
variational bound term, the exponential average (the rate falls to 0 instead) and the low learning
rate are left out; 28 steps of DDIM (100 there). Added: `Centre`, for which training sees the
captions' mean feature.
The original sees two maps of a mask, face skin and hair, as `baselines.published_masks` does here;
maps of all 19 classes are fair to the other systems. Here one expert sees all maps at once; there
each map is an expert of its own, and their scores are added, each with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import CLASS_ID, one_hot
from ec2face_core.config import Config

from ..world.training import seeded
from .encoders import Centre
from .system import Faces, Generators, Masks, Run, System, Texts
from .unets import BATCH, ddim_sample, denoising_loss, encode_all, optimise

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


FOLD = 4  # pixels folded into channels, each way

CHANNELS = {64: (48, 72), 128: (48, 72, 72)}  # by side of the pictures

MAP_WIDTH = 32  # channels that the maps of a 4 x 4 patch become

NONE = 0.2  # samples without condition: 12.5 of 62.5 % there for a map, 12.5 of 50 % for a feature

# w of each condition, the original's of a map and a text: larger ones gain mask accuracy and
# saturate (looked at on validation faces)
WEIGHTS = {"mask": 1.0, "text": 1.25}

RELIABILITY = {"mask": 0.6, "text": 0.4}  # b of each model where both take part


class UaC(System):
    """Composition of separately trained diffusers at sampling."""

    name = "UaC"
    own_masks = True

    def __init__(self, config: Config, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.maps = 2 if config.baselines.published_masks else 19
        self.shape = (3 * FOLD**2, config.data.size // FOLD, config.data.size // FOLD)
        self.scheduler = pixel_scheduler()
        self.build(config.seed)

    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""
        width = self.clip.text_features([""]).shape[1]
        with seeded(seed):
            channels = CHANNELS[self.size]
            self.networks["mask"] = PixelDiffuser(self.shape, channels, maps=self.maps)
            self.networks["text"] = PixelDiffuser(self.shape, channels, features=width)
        self.networks["centre"] = Centre(width)
        self.networks.to(self.device)

    def train(self, faces: Faces, run: Run) -> None:
        """The two diffusers one after the other, each in half of the time."""
        features = encode_all(self.clip.image_features, faces)
        texts = self.clip.text_features([captions[0] for captions in faces.captions])
        centre = self.networks["centre"]
        centre.picture.copy_(features.mean(0))
        centre.sentence.copy_(texts.mean(0))
        features = centre(features, "picture")

        def loss_of(kind: str) -> Callable[[torch.Generator], Tensor]:
            def loss(generator: torch.Generator) -> Tensor:
                rows, _ = faces.sample(BATCH, generator)
                x0 = F.pixel_unshuffle(faces.images[rows].float() / 127.5 - 1, FOLD)
                label_maps = faces.label_maps[rows].long()
                condition = features[rows] if kind == "text" else self.see(label_maps)
                keep = torch.rand(BATCH, generator=generator, device=self.device) >= NONE
                condition = condition * keep.view(-1, *[1] * (condition.ndim - 1))
                return denoising_loss(self.networks[kind], self.scheduler, x0, generator, condition)

            return loss

        for kind in ("mask", "text"):
            trained = {kind: self.networks[kind]}
            optimise(run, kind, loss_of(kind), trained, share=0.5)

    def see(self, masks: Tensor) -> Tensor:
        """Label maps `b h w` -> the maps that the mask diffuser sees, `b maps h w` in {0, 1}."""
        maps = one_hot(masks)
        return maps if self.maps == 19 else maps[:, [CLASS_ID["skin"], CLASS_ID["hair"]]]

    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Images [0, 1]: DDIM of the composed prediction. Text alone is guided, too (w > 1)."""
        conditions = {} if masks is None else {"mask": self.see(masks)}
        if prompts is not None:
            features = self.clip.text_features(prompts)
            conditions["text"] = self.networks["centre"](features, "sentence")

        def predict(x: Tensor, t: Tensor) -> Tensor:
            scores = {}
            for kind, condition in conditions.items():
                both = torch.cat([condition, torch.zeros_like(condition)])
                net = self.networks[kind]
                scores[kind] = net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            return compose(scores, WEIGHTS, RELIABILITY)

        steps = self.config.sampling.steps
        x = ddim_sample(predict, self.scheduler, self.shape, generators, steps, device=self.device)
        return (F.pixel_shuffle(x, FOLD) / 2 + 0.5).clamp(0, 1)


class PixelDiffuser(nn.Module):
    """(x_t `b 48 h/4 w/4`, t `b`, maps `b k h w` or features `b d`; zeros: none) -> x_0, like x_t.

    Args:
        shape: of a folded picture.
        channels: of the U-Net, from its full side on.
        maps: number of maps, for a mask diffuser.
        features: width of a feature, for a text diffuser.
    """

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int], maps: int = 0, features: int = 0
    ) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.maps = maps
        finer = len(channels) - 1
        time = 4 * channels[0]
        self.unet = UNet2DModel(
            sample_size=shape[1],
            in_channels=shape[0] + (MAP_WIDTH if maps else 0),
            out_channels=shape[0],
            down_block_types=(*["DownBlock2D"] * finer, "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * finer),
            block_out_channels=tuple(channels),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=channels[-1] // 2,
            resnet_time_scale_shift="scale_shift",
            class_embed_type=None if maps else "identity",
        )
        if maps:
            self.door = nn.Conv2d(maps, MAP_WIDTH, FOLD, FOLD, bias=False)
        else:
            self.door = nn.Linear(features, time, bias=False)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predicted x_0."""
        if self.maps:
            return self.unet(torch.cat([x_t, self.door(condition)], 1), t).sample
        unit = condition * condition.shape[1] ** 0.5  # variance 1 for a feature of length 1
        return self.unet(x_t, t, self.door(unit)).sample


def compose(
    scores: Mapping[str, tuple[Tensor, Tensor]],
    weights: Mapping[str, float],
    reliability: Mapping[str, float],
) -> Tensor:
    """The composed prediction of this module's equation.

    Args:
        scores: prediction (with condition, without) of each model, by name.
        weights: w by name.
        reliability: b by name; brought to sum 1 over the models that take part.
    """
    total = sum(reliability[k] for k in scores)
    e0 = sum(reliability[k] / total * without for k, (_, without) in scores.items())
    together = sum(weights[k] * with_ for k, (with_, _) in scores.items())
    return together - (sum(weights[k] for k in scores) - 1) * e0


def pixel_scheduler() -> DDIMScheduler:
    """guided-diffusion's `linear` schedule, which diffusers calls by the same name."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="sample",
        clip_sample=True,
    )
