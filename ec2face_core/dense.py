"""Generic dense conditions of a procedural scene: what the foundation learns to read as tokens.

None of them is the mask: depth, normals, flat colours, edges, a low resolution, and regions whose
colours are drawn anew for every face, so that no colour has a meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import NUM_CLASSES
from .rendering import Rendered


@dataclass
class Photographs:
    """What photographs with masks show: image `b 3 h w` in [-1, 1] and label map `b h w`."""

    image: Tensor
    label_map: Tensor


CONDITIONS = ("regions", "albedo", "normals", "depth", "edges", "low resolution")


def dense_condition(kind: str, faces: Rendered | Photographs, generator: torch.Generator) -> Tensor:
    """One of CONDITIONS as a picture `b 3 h w` in [-1, 1]; photographs have the last two and the
    first only."""
    if kind == "albedo":
        return faces.albedo
    if kind == "normals":
        return faces.normals
    if kind == "depth":
        return faces.depth.expand(-1, 3, -1, -1)
    if kind == "low resolution":
        small = F.avg_pool2d(faces.image, 8)
        return F.interpolate(small, scale_factor=8, mode="nearest")
    if kind == "edges":
        grey = F.pad(faces.image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        dx = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
        dy = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        return ((dx**2 + dy**2).sqrt().clamp(0, 1) * 2 - 1).expand(-1, 3, -1, -1)
    # Regions: every face has its own colours, and half of the faces have some classes merged.
    b = len(faces.image)
    colours = torch.rand(b, NUM_CLASSES, 3, generator=generator) * 2 - 1
    other = torch.randint(NUM_CLASSES, (b, NUM_CLASSES), generator=generator)
    merge = torch.rand(b, NUM_CLASSES, generator=generator) < 0.15
    merge &= torch.rand(b, 1, generator=generator) < 0.5
    merged = torch.gather(colours, 1, other[..., None].expand(-1, -1, 3))
    colours = torch.where(merge[..., None], merged, colours)
    flat = torch.gather(colours, 1, faces.label_map.flatten(1)[..., None].expand(-1, -1, 3))
    return flat.movedim(1, 2).unflatten(2, faces.label_map.shape[1:]).contiguous()
