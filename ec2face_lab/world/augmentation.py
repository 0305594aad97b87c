"""Random changes of rendered faces, so that networks can also read generated and decoded pictures.

Guides and evaluators see different ones: `soften` imitates roughly what a generator or an
autoencoder does to a face, `disturb` changes light, tone, grain and place. All numbers come from
the global generator of the images' device. Images are `b 3 h w` in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ec2face_core.attributes import flip_labels


def soften(images: Tensor, strength: float) -> Tensor:
    """Colour jitter, softening (half the resolution and back), blur and noise, each at random.

    strength: of colours and noise; 1 is a visible change.
    """
    x = images * (1 + _normal(images, 0.12 * strength))
    x = x * (1 + _normal(images, 0.05 * strength, 3))
    x = x + _normal(images, 0.08 * strength) + _normal(images, 0.04 * strength, 3)
    half = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    softness = _uniform(images) * _sometimes(images)
    x = torch.lerp(x, torch.where(_sometimes(images), half, blurred), softness)
    noise = 0.12 * strength * _uniform(images) * _sometimes(images)
    return (x + noise * torch.randn_like(x)).clamp(-1, 1)


def disturb(images: Tensor, strength: float) -> Tensor:
    """Uneven light, gamma, saturation, a wide blur, and grain of two sizes, each at random.

    strength: of light, tone and grain; 1 is a visible change.
    """
    b, _, h, w = images.shape
    light = torch.randn(b, 1, 3, 3, device=images.device) * 0.12 * strength
    light = F.interpolate(light, (h, w), mode="bicubic", align_corners=True)
    tone = (_normal(images, 0.25 * strength)).exp()
    x = ((images / 2 + 0.5) * (1 + light)).clamp(1e-3, 1).pow(tone) * 2 - 1
    grey = x.mean(1, keepdim=True)
    x = torch.lerp(grey, x, 1 + _normal(images, 0.2 * strength))
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    x = torch.lerp(x, blurred, 0.6 * _uniform(images) * _sometimes(images))
    coarse = F.interpolate(torch.randn(b, 3, h // 2, w // 2, device=images.device), (h, w))
    grain = torch.where(_sometimes(images), coarse, torch.randn_like(x))
    return (x + 0.1 * strength * _uniform(images) * _sometimes(images) * grain).clamp(-1, 1)


def moved(pictures: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Mirror half of the pictures and shift each by whole pixels; edges are repeated.

    Args:
        pictures: `b c h w`, of any type; a label map can be one of the channels.
        pixels: the longest shift along each axis.

    Returns:
        The pictures, and which are mirrored, `(b,)` bool: `renamed` corrects their label maps.
    """
    b, _, h, w = pictures.shape
    device = pictures.device
    face = torch.arange(b, device=device)[:, None, None]
    shifts = torch.randint(-pixels, pixels + 1, (2, b, 1), device=device)
    rows = (torch.arange(h, device=device) + shifts[0]).clamp(0, h - 1)[:, :, None]
    columns = (torch.arange(w, device=device) + shifts[1]).clamp(0, w - 1)
    mirrored = torch.rand(b, device=device) < 0.5
    columns = torch.where(mirrored[:, None], w - 1 - columns, columns)[:, None]
    return pictures.movedim(1, -1)[face, rows, columns].movedim(-1, 1), mirrored


def renamed(label_maps: Tensor, mirrored: Tensor) -> Tensor:
    """Exchange the subject's left and right parts where the pixels of a face are mirrored.

    label_maps: `b h w` int64. mirrored: `(b,)` bool.
    """
    return torch.where(mirrored[:, None, None], flip_labels(label_maps.flip(-1)), label_maps)


def _normal(images: Tensor, scale: float, channels: int = 1) -> Tensor:
    return torch.randn(len(images), channels, 1, 1, device=images.device) * scale


def _uniform(images: Tensor) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device)


def _sometimes(images: Tensor) -> Tensor:
    """True for half of the images."""
    return torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
