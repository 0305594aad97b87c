"""What the procedural faces are drawn with: a canvas of three layers, coordinates, an ellipse.

A part is a signed distance `b h w`, negative inside, in units of the image side. `Canvas.paint`
blends its colour in with the coverage `clamp(1/2 - sdf / pixel)` and takes the label where the
pixel centre is inside, so that image and label map agree to the pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID


class Canvas:
    """Albedo `b 3 h w` in [0, 1], label map and height of a batch, painted in place."""

    def __init__(self, b: int, size: int, device: str):
        self.rgb = torch.zeros(b, 3, size, size, device=device)
        self.label = torch.zeros(b, size, size, dtype=torch.int64, device=device)
        self.height = torch.zeros(b, size, size, device=device)
        self.pixel = 1 / size

    def paint(
        self, sdf: Tensor, colour: Tensor, label: str = "", height: Tensor | None = None,
        opacity: float | Tensor = 1.0, soft: float = 0.0,
    ) -> None:  # fmt: skip
        """Blend `colour` in where sdf < 0, over `soft` (at least a pixel); label and height too."""
        inside = sdf < 0
        alpha = (0.5 - sdf / max(self.pixel, soft)).clamp_(0, 1) * opacity
        self.rgb.lerp_(colour.expand_as(self.rgb), alpha[:, None])
        if label:
            self.label.masked_fill_(inside, CLASS_ID[label])
        if height is not None:
            self.height = torch.where(inside, height, self.height)

    def take(self, rows: Tensor) -> Canvas:
        """A canvas of some of the faces; `put` brings it back."""
        part = object.__new__(Canvas)
        part.rgb, part.label, part.height = self.rgb[rows], self.label[rows], self.height[rows]
        part.pixel = self.pixel
        return part

    def put(self, rows: Tensor, part: Canvas) -> None:
        """Write the faces that `take` gave out."""
        self.rgb[rows], self.label[rows], self.height[rows] = part.rgb, part.label, part.height


class Geometry:
    """Coordinates of the pixel centres: of the picture, of the head, and of the turned face."""

    def __init__(self, p: dict[str, Tensor], size: int, device: str):
        line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
        self.page_x, self.page_y = (line - 0.5)[None, None, :], line[None, :, None]
        x, y = self.page_x - p["shift_x"], self.page_y - 0.5 - p["shift_y"]
        cos, sin = torch.cos(p["roll"]), torch.sin(p["roll"])
        self.x = (x * cos + y * sin) / p["scale"]  # head coordinates, unrolled
        self.y = (y * cos - x * sin) / p["scale"] + 0.5
        # A turned face: features move with the yaw and the far side narrows.
        d = self.x - 0.035 * p["yaw"]
        self.u = d + 0.55 * p["yaw"] * d * d.abs().clamp(max=0.4) + 0.6 * p["yaw"] * d * d
        self.v = self.y - p["pitch"]

    def take(self, rows: Tensor) -> Geometry:
        """The coordinates of some of the faces."""
        part = object.__new__(Geometry)
        part.page_x, part.page_y = self.page_x, self.page_y
        part.x, part.y, part.u, part.v = self.x[rows], self.y[rows], self.u[rows], self.v[rows]
        return part


def ellipse(x: Tensor, y: Tensor, rx, ry, power=2.0) -> Tensor:
    """Superellipse around the origin; the distance is exact in scale at the shorter axis."""
    if isinstance(power, float) and power == 2.0:
        radius = ((x / rx) ** 2 + (y / ry) ** 2).sqrt()
    else:
        radius = ((x / rx).abs() ** power + (y / ry).abs() ** power) ** (1 / power)
    short = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
    return (radius - 1) * short
