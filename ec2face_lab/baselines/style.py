"""A tiny style-based generator: shared by TediGAN and MM2Latent; layers for PixelFace+ as well.

After StyleGAN2 (Karras et al., CVPR 2020): mapping network z -> w, one w per layer (W+), modulated
and demodulated convolutions, RGB skips, residual discriminator with minibatch deviation, the
non-saturating loss, lazy R1, style mixing, a moving average of the weights.

Simplified: no noise inputs (a code decides its picture, which inversion needs), no path-length
regularisation, demodulation on the output side. Both networks end at half the side and fold 2 x 2
pixels into channels: the same picture at a third of the time. Convolutions before upsampling are
the transposed convolutions of the original under a bilinear filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..world.training import descend, moving_average, seeded, set_learning_rates
from .system import Faces, Run, System

if TYPE_CHECKING:
    from ec2face_core.perception import ClipScorer


WIDTH = 128  # of z and w

CHANNELS = {4: 128, 8: 128, 16: 96, 32: 64, 64: 48}  # by side of the feature map

CONVS = {4: 2, 8: 2, 16: 3, 32: 3, 64: 3}  # of the generator, by side

BATCH = 16

LR = 2e-3

R1 = 1.0  # weight of the gradient penalty

R1_EVERY = 16  # steps

HALF_LIFE = 2500  # samples, of the moving average


class Linear(nn.Module):
    """Linear layer with an equalised learning rate, `gain` times slower (StyleGAN's `lrmul`)."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / gain)
        self.bias = nn.Parameter(torch.full((outputs,), bias / gain))
        self.scale = gain / math.sqrt(inputs)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs)` -> `(..., outputs)`."""
        return F.linear(x, self.weight * self.scale, self.bias * self.gain)


class Conv(nn.Module):
    """Convolution with an equalised learning rate, bias and leaky ReLU that keeps the variance."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, act: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if act else None
        self.scale = 1 / math.sqrt(inputs * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        """`b inputs h w` -> `b outputs h w`."""
        w = self.weight * self.scale
        y = F.conv2d(x, w, self.bias, padding=w.shape[-1] // 2)
        return y if self.bias is None else leaky(y)


class ModulatedConv(nn.Module):
    """Convolution whose input channels are scaled by a style (Eq. 1-3 of StyleGAN2).

    Scaling the input by s and the output by 1 / sqrt(sum (s w)^2) is the same as scaling the
    weights of every sample, and one ordinary convolution serves the whole batch.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int = WIDTH, kernel: int = 3, rgb: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style = Linear(width, inputs, bias=1.0)
        self.rgb = rgb  # the last layer to pixels: neither demodulated nor rectified
        self.scale = 1 / math.sqrt(inputs * kernel**2)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Feature maps `b inputs h w`, w `(b, width)` -> `b outputs h w`."""
        s = self.style(w)
        weight = self.weight * self.scale
        y = F.conv2d(x * s[:, :, None, None].to(x.dtype), weight, padding=weight.shape[-1] // 2)
        if self.rgb:
            return y + self.bias[:, None, None].to(y.dtype)
        norm = torch.rsqrt(s.square() @ weight.square().sum((2, 3)).T + 1e-8)
        return leaky(y * norm[:, :, None, None].to(y.dtype) + self.bias[:, None, None].to(y.dtype))


class StyleGenerator(nn.Module):
    """Codes in W+ -> faces.

    Args:
        size: side of the faces in pixels.

    Attributes:
        layers: modulated convolutions, each with its own slot of W+.
        average: running mean of w, `(WIDTH,)`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        sides = sides_below(size)
        self.sides = [side for side in sides for _ in range(CONVS[side])]
        self.layers = len(self.sides)
        self.mapping = nn.Sequential(
            *(m for _ in range(4) for m in (Linear(WIDTH, WIDTH, gain=0.01), nn.LeakyReLU(0.2)))
        )
        self.const = nn.Parameter(torch.randn(1, CHANNELS[4], 4, 4))
        before = [4, *self.sides]
        self.convs = nn.ModuleList(
            ModulatedConv(CHANNELS[a], CHANNELS[side])
            for a, side in zip(before, self.sides, strict=False)
        )
        self.rgb = rgb_layers({side: CHANNELS[side] for side in sides})
        self.register_buffer("average", torch.zeros(WIDTH))
        self.to(memory_format=torch.channels_last)

    def map(self, z: Tensor) -> Tensor:
        """Latents `(b, WIDTH)` of a normal distribution -> w `(b, WIDTH)`."""
        x = F.normalize(z, dim=-1) * math.sqrt(WIDTH)
        for linear in self.mapping[::2]:
            x = leaky(linear(x))
        return x.float()

    def random_codes(
        self, generators: Sequence[torch.Generator], truncation: float = 0.8
    ) -> Tensor:
        """One w per generator in every layer, `(b, layers, WIDTH)`, drawn towards the mean w."""
        z = torch.stack([torch.randn(WIDTH, generator=g) for g in generators])
        z = z.to(self.average.device)
        w = torch.lerp(self.average, self.map(z), truncation)
        return self.everywhere(w)

    def everywhere(self, w: Tensor) -> Tensor:
        """The code `(b, layers, WIDTH)` with w `(b, WIDTH)` in every layer."""
        return w[:, None].expand(-1, self.layers, -1)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `(b, layers, WIDTH)` -> images `b 3 h w`, about [-1, 1]."""
        x = self.const.expand(len(codes), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        image = None
        neighbours = zip([4, *self.sides], self.sides, [*self.sides[1:], None], strict=False)
        for i, (conv, (before, side, after)) in enumerate(zip(self.convs, neighbours, strict=True)):
            x = conv(x, codes[:, i])
            if side != before:
                x = upsample(x)
            if after != side:
                image = add_rgb(image, self.rgb[str(side)](x, codes[:, i]))
        return image


class Discriminator(nn.Module):
    """Residual discriminator on `channels` planes -> (logits `b`, features `(b, 128)`).

    Args:
        size: side of the planes in pixels.
        channels: their number.
    """

    def __init__(self, size: int, channels: int = 3) -> None:
        super().__init__()
        self.stem = Conv(4 * channels, CHANNELS[size // 2], 1)
        self.blocks = nn.ModuleList()
        for side in reversed(sides_below(size)[1:]):
            c = CHANNELS[side]
            out = CHANNELS[side // 2]
            self.blocks.append(
                nn.ModuleList([Conv(c, c), Conv(c, out), Conv(c, out, 1, act=False)])
            )
        self.last = Conv(CHANNELS[4] + 1, CHANNELS[4])
        self.features = Linear(CHANNELS[4] * 16, WIDTH)
        self.head = Linear(WIDTH, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Planes `b channels h w` -> logits and features."""
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        for first, second, skip in self.blocks:
            y = second(F.avg_pool2d(first(x), 2))
            x = (y + skip(F.avg_pool2d(x, 2))) * math.sqrt(0.5)
        deviation = (x.float().var(0, correction=0) + 1e-8).sqrt().mean()
        x = self.last(torch.cat([x, deviation.to(x.dtype).expand(len(x), 1, 4, 4)], 1))
        features = leaky(self.features(x.flatten(1)))
        return self.head(features)[:, 0].float(), features.float()


class Encoder(nn.Module):
    """`channels` planes of `size` px -> a vector of `outputs` numbers."""

    def __init__(self, size: int, channels: int, outputs: int, hidden: int = 192) -> None:
        super().__init__()
        self.more = doublings(size)
        widths = [16 * channels, 64, *[64] * self.more, 96, 128, 128]
        self.convs = nn.ModuleList(Conv(a, b) for a, b in pairwise(widths))
        self.hidden = Linear(128 * 16, hidden)
        self.head = Linear(hidden, outputs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Planes `b channels h w` -> `(b, outputs)`."""
        x = F.pixel_unshuffle(x, 4).contiguous(memory_format=torch.channels_last)
        for i, conv in enumerate(self.convs):
            halved = 0 < i <= self.more or i >= self.more + 2
            x = conv(F.avg_pool2d(x, 2) if halved else x)
        return self.head(leaky(self.hidden(x.flatten(1)))).float()


def sides_below(size: int) -> list[int]:
    """Sides of the feature maps of networks for pictures of `size` px: the last one unfolds."""
    return [side for side in CHANNELS if side < size]


def doublings(size: int) -> int:
    """How often the side of 64 px doubles up to `size`: a network has as many further levels."""
    return len(sides_below(size)) - len(sides_below(64))


def rgb_layers(channels: Mapping[int, int]) -> nn.ModuleDict:
    """Layers from feature maps to RGB, by side; the last gives 4 x 3 planes that unfold to 2 x 2.

    The four pixels of a place start equal: otherwise a grid stays visible for long.
    """
    layers = nn.ModuleDict(
        {str(side): ModulatedConv(c, 3, kernel=1, rgb=True) for side, c in channels.items()}
    )
    last = ModulatedConv(channels[max(channels)], 12, kernel=1, rgb=True)
    last.weight.data.copy_(last.weight.data[::4].repeat_interleave(4, 0))
    layers[str(max(channels))] = last
    return layers


def add_rgb(image: Tensor | None, rgb: Tensor) -> Tensor:
    """Next step of the RGB skips: float32, and of twice the side where `rgb` has to be unfolded."""
    rgb = F.pixel_shuffle(rgb.float(), 2) if rgb.shape[1] == 12 else rgb.float()
    if image is None:
        return rgb
    while image.shape[-1] < rgb.shape[-1]:
        image = upsample(image)
    return image + rgb


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU times sqrt 2, which keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def upsample(x: Tensor) -> Tensor:
    """Twice the side, bilinear."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def adversarial_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's non-saturating loss of its logits."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(discriminator: nn.Module, x: Tensor) -> Tensor:
    """Mean squared gradient norm of the logits at real data (Mescheder et al., 2018), float32."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(discriminator(x)[0].sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def average_decay(updates: int, batch: int) -> float:
    """Decay of the moving average: a half-life of 2,500 samples, shorter at the start."""
    return 0.5 ** (batch / min(HALF_LIFE, 0.05 * updates * batch + 1))


def perceptual(clip: ClipScorer, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS' distance in three layers of the guiding CLIP, `(b,)`.

    a, b: images `b 3 h w` in [-1, 1].
    """
    x = F.adaptive_avg_pool2d(torch.cat([a, b]) / 2 + 0.5, clip.size)
    maps = clip.model.visual.forward_intermediates(
        (x - clip.mean) / clip.std, indices=[0, 1, 2], intermediates_only=True
    )["image_intermediates"]
    pairs = (F.normalize(features.float(), dim=1).chunk(2) for features in maps)
    layers = [(one - other).square().sum(1).mean((1, 2)) for one, other in pairs]
    return torch.stack(layers).mean(0)


class StyleSystem(System):
    """A system on the style-based generator, which it shares."""

    shares = ("style", "generator")

    def pretrain(self, run: Run) -> None:
        """Adversarial training; the generator becomes the moving average of the weights."""
        with seeded(run.seed):
            net = StyleGenerator(self.size).to(self.device)
            discriminator = Discriminator(self.size).to(self.device)
        average = moving_average(net, partial(average_decay, batch=BATCH))
        adam_g = adam(net, LR, momentum=0.0)
        adam_d = adam(discriminator, LR, momentum=0.0)
        faces = Faces.of_foundation(self.config).to(self.device)

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            for optimizer in (adam_g, adam_d):
                set_learning_rates(optimizer, progress, hold=0.6)
            real, _, _ = faces.batch(BATCH, generator)
            penalties = {}
            with torch.autocast(self.device.type, torch.bfloat16):
                discriminator.requires_grad_(True)
                codes = _mixed_codes(net, generator)
                fake = net(codes)
                loss_d = adversarial_loss(discriminator(real)[0], discriminator(fake.detach())[0])
                if number % R1_EVERY == 0:
                    penalties["r1"] = r1_penalty(discriminator, real)
                descend(adam_d, loss_d + 0.5 * R1 * R1_EVERY * penalties.get("r1", 0.0))
                discriminator.requires_grad_(False)
                loss_g = F.softplus(-discriminator(fake)[0]).mean()
                descend(adam_g, loss_g)
            net.average.lerp_(codes.detach()[:, 0].mean(0), 0.01)
            average.update_parameters(net)
            return penalties | {"generator": loss_g, "discriminator": loss_d}

        state = {"net": net, "average": average, "discriminator": discriminator}
        run.stage("style", step, state | {"adam_g": adam_g, "adam_d": adam_d})
        self.networks["generator"].load_state_dict(average.module.state_dict())


def adam(net: nn.Module, lr: float, momentum: float = 0.9) -> torch.optim.Adam:
    """StyleGAN's optimiser; its loops are fused, which matters for small batches."""
    return torch.optim.Adam(net.parameters(), lr, betas=(momentum, 0.99), fused=True)


def _mixed_codes(net: StyleGenerator, generator: torch.Generator) -> Tensor:
    """Codes of random z; in half of the pictures the layers from a random one on take another z."""
    device = generator.device
    z = torch.randn(2, BATCH, WIDTH, generator=generator, device=device)
    first, second = net.map(z.flatten(0, 1)).unflatten(0, (2, BATCH))
    border = torch.randint(1, net.layers, (BATCH, 1, 1), generator=generator, device=device)
    mixed = torch.rand(BATCH, 1, 1, generator=generator, device=device) < 0.5
    use_second = mixed & (torch.arange(net.layers, device=device)[None, :, None] >= border)
    return torch.where(use_second, second[:, None], first[:, None])
