"""PixelFace+ (Du et al., ACM Multimedia 2023): mask features gate words, pixel by pixel, in a GAN.

At every resolution each pixel attends to the words of the caption, with the features of its mask as
query (GCMF). A gate computed from mask features and answer scales the answer, and a modulated
convolution takes it beside mask features and Fourier features of the coordinates. A discriminator
of picture and mask, a matched or mismatched sentence, R1 and a CLIP loss on the picture.

Simplified: resolutions in steps of 2 instead of 4 (from 8 to half the side, then unfolded), at each
of which the mask is folded, not reduced; words and sentences from the guiding CLIP; no path-length
regularisation; R1 of weight 1 (10 there, at 256 px); the discriminator is smaller, and its head for
sentences is a projection. Features are interpolated between resolutions, where the original folds
pixels. The gate is the paper's: the released layer has its gates off unless asked.
The original sees a mask in palette colours, as `baselines.published_masks` does here; one-hot maps
are what the other systems see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.config import Config

from ..world.training import descend, moving_average, seeded, set_learning_rates
from .encoders import word_features
from .style import (
    WIDTH,
    Conv,
    Discriminator,
    Linear,
    ModulatedConv,
    adam,
    add_rgb,
    adversarial_loss,
    average_decay,
    leaky,
    r1_penalty,
    rgb_layers,
    upsample,
)
from .system import Faces, Generators, Masks, Run, System, Texts

CHANNELS = {8: 224, 16: 128, 32: 64, 64: 48}  # by side of the feature map

FEATURES = 32  # of the mask, and of the words' answer, at each pixel

FREQUENCIES = 4  # of the coordinates

BATCH = 8

LR = 2e-3

R1 = 1.0  # weight of the gradient penalty

R1_EVERY = 16  # steps


class GatedWords(nn.Module):
    """GCMF: cross-attention from mask features to words, and a gate on the answer."""

    def __init__(self, fold: int, words: int, maps: int) -> None:
        super().__init__()
        self.fold = fold
        self.mask = nn.ModuleList(
            [Conv(maps * self.fold**2, FEATURES, 1), Conv(FEATURES, FEATURES)]
        )
        self.query = nn.Conv2d(FEATURES, FEATURES, 1)
        self.key = nn.Linear(words, FEATURES)
        self.value = nn.Linear(words, FEATURES)
        self.gate = nn.Conv2d(2 * FEATURES, FEATURES, 1)

    def forward(self, maps: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Maps `b k h w`, words `b n d`, which words are real `b n` -> `b 2f h/fold w/fold`."""
        m = F.pixel_unshuffle(maps, self.fold)
        for conv in self.mask:
            m = conv(m)
        answer = cross_attention(self.query(m), self.key(words), self.value(words), real)
        gate = torch.sigmoid(self.gate(torch.cat([m, answer], 1)))
        return torch.cat([gate * answer, m], 1)


class PixelGenerator(nn.Module):
    """Noise, maps of a mask and words -> faces of `size` px."""

    def __init__(self, size: int, words: int, maps: int) -> None:
        super().__init__()
        channels = {side: c for side, c in CHANNELS.items() if side < size}
        self.mapping = nn.ModuleList(Linear(WIDTH, WIDTH, gain=0.01) for _ in range(3))
        self.const = nn.Parameter(torch.randn(1, CHANNELS[8], 8, 8))
        self.words = nn.ModuleDict()
        self.convs = nn.ModuleDict()
        self.rgb = rgb_layers(channels)
        before = CHANNELS[8]
        for side, c in channels.items():
            self.words[str(side)] = GatedWords(size // side, words, maps)
            inputs = min(before, c) + 2 * FEATURES + 4 * FREQUENCIES
            layers = [ModulatedConv(inputs, c), ModulatedConv(c, c)]
            if before != c:  # fewer channels before the side doubles
                layers.append(ModulatedConv(before, c, kernel=1))
            self.convs[str(side)] = nn.ModuleList(layers)
            before = c
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, maps: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Z `(b, WIDTH)`, maps `b k h w`, words `b n d`, `b n` -> images `b 3 h w`."""
        w = F.normalize(z, dim=-1) * math.sqrt(WIDTH)
        for linear in self.mapping:
            w = leaky(linear(w))
        x = self.const.expand(len(z), -1, -1, -1)
        image = None
        for side, layers in self.convs.items():
            coordinates = fourier(int(side)).to(x).expand(len(z), -1, -1, -1)
            if image is not None:
                x = upsample(layers[2](x, w))
            answer = self.words[side](maps, words, real).to(x.dtype)
            x = torch.cat([x, answer, coordinates], 1)
            x = layers[1](layers[0](x.contiguous(memory_format=torch.channels_last), w), w)
            image = add_rgb(image, self.rgb[side](x, w))
        return image


class PixelFace(System):
    """Pixel-wise gating of words by mask features; it needs text and mask, as the original does."""

    name = "PixelFace+"
    takes = frozenset()  # neither alone
    own_masks = True

    def __init__(self, config: Config, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.maps = 3 if config.baselines.published_masks else 19
        self.build(config.seed)

    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""
        width = self.clip.model.token_embedding.weight.shape[1]
        with seeded(seed):
            self.networks["generator"] = PixelGenerator(self.size, width, self.maps)
        self.networks.to(self.device)

    def train(self, faces: Faces, run: Run) -> None:
        """One adversarial stage; the generator becomes the moving average of the weights."""
        net = self.networks["generator"]
        with seeded(run.seed + 1):
            discriminator = Discriminator(self.size, 3 + self.maps)
            head = Linear(self.clip.text_features([""]).shape[1], WIDTH)
        judges = nn.ModuleDict({"discriminator": discriminator, "head": head}).to(self.device)
        average = moving_average(net, partial(average_decay, batch=BATCH))
        adam_g = adam(net, LR, momentum=0.0)
        adam_d = adam(judges, LR, momentum=0.0)
        scale = self.clip.model.logit_scale.exp().detach()

        def judge(x: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
            return discriminator(torch.cat([x, maps], 1))

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            for optimizer in (adam_g, adam_d):
                set_learning_rates(optimizer, progress, hold=0.5)
            x, label_maps, captions = faces.batch(BATCH, generator)
            maps = self.see(label_maps)
            sentence = self.clip.text_features(captions)
            penalties = {}
            with torch.autocast(self.device.type, torch.bfloat16):
                judges.requires_grad_(True)
                z = torch.randn(BATCH, WIDTH, generator=generator, device=self.device)
                fake = net(z, maps, word_features(self.clip, captions), self.real(captions))
                real_logit, real = judge(x, maps)
                fake_logit, features = judge(fake.detach(), maps)
                loss_d = adversarial_loss(real_logit, fake_logit)
                loss_d = loss_d + matching_loss(real, features, head(sentence))
                if number % R1_EVERY == 0:
                    penalties["r1"] = r1_penalty(lambda x: judge(x, maps), x)
                descend(adam_d, loss_d + 0.5 * R1 * R1_EVERY * penalties.get("r1", 0.0))
                judges.requires_grad_(False)
                fake_logit, features = judge(fake, maps)
                loss_g = F.softplus(-fake_logit) + F.softplus(-match(features, head(sentence)))
                logits = scale * self.clip.image_features(fake) @ sentence.T
                loss_clip = F.cross_entropy(logits, torch.arange(BATCH, device=self.device))
                descend(adam_g, loss_g.mean() + loss_clip)
            average.update_parameters(net)
            losses = {"generator": loss_g.mean(), "discriminator": loss_d, "clip": loss_clip}
            return penalties | losses

        state = {"net": net, "average": average, "judges": judges}
        run.stage("adversarial", step, state | {"adam_g": adam_g, "adam_d": adam_d})
        net.load_state_dict(average.module.state_dict())

    def real(self, texts: Sequence[str]) -> Tensor:
        """Which tokens of a caption belong to it, `b n`: CLIP pools at the last of them."""
        tokens = self.clip.tokenizer(list(texts))
        real = torch.arange(tokens.shape[1]) <= tokens.argmax(1, keepdim=True)
        return real.to(self.device)

    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Images `b 3 h w` in [0, 1]."""
        z = torch.stack([torch.randn(WIDTH, generator=g) for g in generators]).to(self.device)
        words = word_features(self.clip, prompts)
        real = self.real(prompts)
        return (self.networks["generator"](z, self.see(masks), words, real) / 2 + 0.5).clamp(0, 1)


def cross_attention(query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
    """Cross-attention from pixels to words: query `b f s s`, key and value `b n f`, real `b n`."""
    q = query.flatten(2).transpose(1, 2)
    scores = q @ key.transpose(1, 2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~real[:, None], -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).unflatten(2, query.shape[2:]).to(query.dtype)


def match(features: Tensor, sentence: Tensor) -> Tensor:
    """Logits `b` that a picture's features `(b, d)` and a sentence's `(b, d)` belong together."""
    return (features * sentence).sum(1).float() / math.sqrt(features.shape[1])


def matching_loss(real: Tensor, fake: Tensor, sentence: Tensor) -> Tensor:
    """Real pictures belong to their sentence, not to the next one's; generated ones do not."""
    wrong = F.softplus(match(real, sentence.roll(1, 0))) + F.softplus(match(fake, sentence))
    return (F.softplus(-match(real, sentence)) + wrong / 2).mean()


def fourier(side: int) -> Tensor:
    """Sines and cosines of the coordinates of a square, `1 4*FREQUENCIES side side`."""
    at = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(at, at, indexing="ij")
    waves = (
        torch.stack([x, y])[None] * math.pi * 2.0 ** torch.arange(FREQUENCIES)[:, None, None, None]
    )
    return torch.cat([waves.sin(), waves.cos()]).flatten(0, 1)[None]
