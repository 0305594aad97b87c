"""Tools that paint portraits: a canvas of layers, coordinates, windows, and signed distances.

A part is a signed distance `b h w`, negative inside, in units of the image side. `Canvas.paint`
blends its layers with the coverage `clamp(1/2 - sdf / pixel)` and sets the label where the centre
of a pixel is inside, so that image and label map agree to the pixel. Flat colour and light are two
layers: the picture is their product.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID

from .. import canvas

Parameters = dict[str, Tensor]  # of `Scenes`, `b 1 1`, colours `b 3 1 1`

Box = tuple[float, float, float, float]  # top, bottom, left, right, in units of the image side


def _slices(box: Box, size: int) -> tuple[slice, slice]:
    """Rows and columns of a box, rounded outwards."""
    top, bottom, left, right = box
    rows = slice(math.floor(top * size), math.ceil(bottom * size))
    columns = slice(math.floor(left * size), math.ceil(right * size))
    return rows, columns


class Canvas:
    """Flat colours `b 3 h w`, light, height and labels `b h w` of a batch, painted in place."""

    def __init__(self, b: int, size: int, device: str | torch.device) -> None:
        self.rgb = torch.zeros(b, 3, size, size, device=device)
        self.light = torch.ones(b, size, size, device=device)
        self.height = torch.zeros(b, size, size, device=device)
        self.label = torch.zeros(b, size, size, dtype=torch.int64, device=device)
        self.pixel = 1 / size

    def paint(
        self, sdf: Tensor, colour: Tensor, label: str = "", light: Tensor | None = None,
        height: Tensor | None = None, opacity: float | Tensor = 1.0, soft: float = 0.0,
    ) -> None:  # fmt: skip
        """Paint one part.

        Args:
            sdf: signed distance of the part, `b h w`.
            colour: RGB in [0, 1], broadcast to `b 3 h w`.
            label: class that the part has in the label map; "" leaves the map as it is.
            light: that falls on the part, `b h w`; None leaves the light as it is.
            height: of the part, `b h w`; None leaves the height as it is.
            opacity: of the part, in [0, 1].
            soft: width of the edge; at least a pixel.
        """
        alpha = self._cover(sdf, opacity, soft)
        self.rgb.lerp_(colour.expand_as(self.rgb), alpha[:, None])
        if light is not None:
            self.light.lerp_(light.expand_as(self.light), alpha)
        if height is not None:
            self.height.lerp_(height.expand_as(self.height), alpha)
        if label:
            self.label.masked_fill_(sdf < 0, CLASS_ID[label])

    def shade(self, sdf: Tensor, factor: float | Tensor, soft: float = 0.0) -> None:
        """Multiply the light of a region by a factor; above 1 it is a highlight.

        Args:
            sdf: signed distance of the region, `b h w`.
            factor: of the light, a number or `b h w`.
            soft: width of the edge; at least a pixel.
        """
        self.light.mul_(1 + self._cover(sdf, 1.0, soft) * (factor - 1))

    def _cover(self, sdf: Tensor, opacity: float | Tensor, soft: float) -> Tensor:
        alpha = (0.5 - sdf / max(self.pixel, soft)).clamp_(0, 1)
        if soft > self.pixel:
            alpha = alpha * alpha * (3 - 2 * alpha)
        return alpha * opacity

    def window(self, box: Box) -> Canvas:
        """A part of the canvas, which shares its memory."""
        rows, columns = _slices(box, self.rgb.shape[-1])
        part = copy.copy(self)
        for name in ("rgb", "light", "height", "label"):
            setattr(part, name, getattr(self, name)[..., rows, columns])
        return part

    def take(self, faces: Tensor) -> Canvas:
        """A canvas of some of the faces; `put` writes it back."""
        part = copy.copy(self)
        for name in ("rgb", "light", "height", "label"):
            setattr(part, name, getattr(self, name)[faces])
        return part

    def put(self, faces: Tensor, part: Canvas) -> None:
        """Write back the faces that `take` returned."""
        for name in ("rgb", "light", "height", "label"):
            getattr(self, name)[faces] = getattr(part, name)


class Geometry(canvas.Geometry):
    """Coordinates of the pixel centres, and the signed distance of the head."""

    def __init__(self, p: Parameters, size: int, device: str | torch.device) -> None:
        super().__init__(p, size, device)
        self.page_x = self.page_x.expand(1, size, size)
        self.page_y = self.page_y.expand(1, size, size)
        self.head = head_shape(self.x, self.y, p)
        self.hair: tuple[Tensor, ...] = ()  # what the back hair leaves to the front hair

    def window(self, box: Box) -> Geometry:
        """The coordinates of a window."""
        rows, columns = _slices(box, self.x.shape[-1])
        part = copy.copy(self)
        for name in ("page_x", "page_y", "x", "y", "u", "v", "head"):
            setattr(part, name, getattr(self, name)[:, rows, columns])
        return part

    def take(self, faces: Tensor) -> Geometry:
        """The coordinates of some of the faces."""
        part = copy.copy(self)
        for name in ("x", "y", "u", "v", "head"):
            setattr(part, name, getattr(self, name)[faces])
        return part


def head_shape(x: Tensor, y: Tensor, p: Parameters) -> Tensor:
    """Signed distance of the head: a skull, and a jaw whose powers make it round or pointed."""
    middle = p["cheek_y"]
    below = y - middle
    lower = below > 0
    ax = ((x - 0.012 * p["yaw"] * below.clamp(min=0) / 0.4) / p["face_w"]).abs() + 1e-4
    length = torch.where(lower, p["chin_y"] - middle, middle - p["head_top"])
    ay = (below / length).abs() + 1e-4
    power_x = torch.where(lower, p["jaw_x"], 2.25)
    power_y = torch.where(lower, p["jaw_y"], 2.2)
    fx = ax**power_x
    fy = ay**power_y
    slope_x = power_x * fx / ax / p["face_w"]
    slope_y = power_y * fy / ay / length
    return (fx + fy - 1) / (slope_x**2 + slope_y**2 + 1.0).sqrt()


def ellipse(x: Tensor, y: Tensor, rx: float | Tensor, ry: float | Tensor) -> Tensor:
    """Signed distance of an ellipse around the origin, exact to first order at its edge.

    Args:
        x: coordinates.
        y: coordinates.
        rx: half axis.
        ry: half axis.
    """
    ax = x / rx
    ay = y / ry
    squared = ax * ax + ay * ay
    slope = ((ax / rx) ** 2 + (ay / ry) ** 2).sqrt()
    radius = squared.sqrt()
    return radius * (radius - 1) / (slope + 1e-6)


def rounded(x: Tensor, y: Tensor, rx: Tensor, ry: Tensor, power: float | Tensor) -> Tensor:
    """Signed distance of a superellipse, near its edge: a power of 2 is round, 4 nearly square.

    Args:
        x: coordinates.
        y: coordinates.
        rx: half axis.
        ry: half axis.
        power: of both coordinates.
    """
    ax = (x / rx).abs() + 1e-4
    ay = (y / ry).abs() + 1e-4
    fx = ax**power
    fy = ay**power
    slope = ((fx / ax / rx) ** 2 + (fy / ay / ry) ** 2).sqrt() * power
    return (fx + fy - 1) / (slope + 1.0)


def soft_max(a: Tensor, b: Tensor, width: float) -> Tensor:
    """The larger of two distances, with a rounded corner of some width: a soft intersection."""
    return torch.maximum(a, b) + (width - (a - b).abs()).clamp(min=0) ** 2 / (4 * width)


def lambert(p: Parameters, nx: Tensor, ny: Tensor) -> Tensor:
    """Light `b h w` on a surface with the normal's components right and down; 1 from the front.

    In the second look a second light, from behind, draws the edge away from the first.
    """
    squared = (nx * nx + ny * ny).clamp(max=0.96)
    nz = (1 - squared).sqrt()
    dot = nx * p["light_x"] + ny * p["light_y"] + nz * p["light_z"]
    wrapped = ((dot + 0.35) / 1.35).clamp(min=0)
    edge = (-torch.sign(p["light_x"]) * nx - 0.45).clamp(min=0)
    return p["ambient"] + p["key"] * wrapped + p["rim"] * edge
