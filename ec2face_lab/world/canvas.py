"""Tools that render procedural faces: a canvas of three layers, coordinates, an ellipse.

A part is a signed distance `b h w`, negative inside, in units of the image side. `Canvas.paint`
blends its colour with the coverage `clamp(1/2 - sdf / pixel)` and sets the label where the centre
of a pixel is inside, so that image and label map agree to the pixel.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID


class Canvas:
    """Albedo `b 3 h w` in [0, 1], label map and height of a batch, painted in place."""

    def __init__(self, b: int, size: int, device: str) -> None:
        self.rgb = torch.zeros(b, 3, size, size, device=device)
        self.label = torch.zeros(b, size, size, dtype=torch.int64, device=device)
        self.height = torch.zeros(b, size, size, device=device)
        self.pixel = 1 / size

    def paint(
        self, sdf: Tensor, colour: Tensor, label: str = "", height: Tensor | None = None,
        opacity: float | Tensor = 1.0, soft: float = 0.0,
    ) -> None:  # fmt: skip
        """Paint one part.

        Args:
            sdf: signed distance of the part, `b h w`.
            colour: RGB in [0, 1], broadcast to `b 3 h w`.
            label: class that the part has in the label map; "" leaves the map as it is.
            height: of the part, `b h w`; None leaves the height as it is.
            opacity: of the colour, in [0, 1].
            soft: width of the edge; at least a pixel.
        """
        inside = sdf < 0
        alpha = (0.5 - sdf / max(self.pixel, soft)).clamp_(0, 1) * opacity
        self.rgb.lerp_(colour.expand_as(self.rgb), alpha[:, None])
        if label:
            self.label.masked_fill_(inside, CLASS_ID[label])
        if height is not None:
            self.height = torch.where(inside, height, self.height)

    def take(self, rows: Tensor) -> Canvas:
        """A canvas of some of the faces; `put` writes it back."""
        part = copy.copy(self)
        part.rgb = self.rgb[rows]
        part.label = self.label[rows]
        part.height = self.height[rows]
        return part

    def put(self, rows: Tensor, part: Canvas) -> None:
        """Write back the faces that `take` returned."""
        self.rgb[rows] = part.rgb
        self.label[rows] = part.label
        self.height[rows] = part.height


class Geometry:
    """Coordinates of the pixel centres: of the picture, of the head, and of the turned face."""

    def __init__(self, p: dict[str, Tensor], size: int, device: str | torch.device) -> None:
        line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
        self.page_x = (line - 0.5)[None, None, :]
        self.page_y = line[None, :, None]
        x = self.page_x - p["shift_x"]
        y = self.page_y - 0.5 - p["shift_y"]
        cos = torch.cos(p["roll"])
        sin = torch.sin(p["roll"])
        self.x = (x * cos + y * sin) / p["scale"]  # head coordinates, unrolled
        self.y = (y * cos - x * sin) / p["scale"] + 0.5
        # A turned face: features move with the yaw and the far side narrows.
        d = self.x - 0.035 * p["yaw"]
        self.u = d + 0.55 * p["yaw"] * d * d.abs().clamp(max=0.4) + 0.6 * p["yaw"] * d * d
        self.v = self.y - p["pitch"]

    def take(self, rows: Tensor) -> Geometry:
        """The coordinates of some of the faces."""
        part = copy.copy(self)
        for name in ("x", "y", "u", "v"):
            setattr(part, name, getattr(self, name)[rows])
        return part


def ellipse(
    x: Tensor, y: Tensor, rx: float | Tensor, ry: float | Tensor, power: float | Tensor = 2.0
) -> Tensor:
    """Signed distance of a superellipse around the origin, exact in scale at the shorter axis.

    Args:
        x: coordinates.
        y: coordinates.
        rx: half axis.
        ry: half axis.
        power: 2 is an ellipse; larger ones are squarer.
    """
    if isinstance(power, float) and power == 2.0:
        radius = ((x / rx) ** 2 + (y / ry) ** 2).sqrt()
    else:
        radius = ((x / rx).abs() ** power + (y / ry).abs() ** power) ** (1 / power)
    short = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
    return (radius - 1) * short
