"""Renders `scenes.Scenes`: image, label map and dense maps from the same shapes, at any size.

Every part is a signed distance that is painted on a `canvas.Canvas`, back to front, each within its
window of the picture. Eyes and brows lie over glasses, as CelebAMask-HQ's `g_mask.py` has it. The
picture is flat colour times light; a height field that is painted along gives depth and normals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..rendering import Rendered
from . import clothes, features, hair, jewellery, worn
from .backdrop import backdrop
from .canvas import Box, Canvas, Geometry, Parameters

if TYPE_CHECKING:
    from .scenes import Scenes


class _Part(NamedTuple):
    paint: Callable[[Canvas, Geometry, Parameters], None]
    box: Box  # the window it lies in, whatever the pose
    flag: str = ""  # only the faces that have it


_ALL: Box = (0.0, 1.0, 0.0, 1.0)

_PARTS = (  # back to front
    _Part(backdrop, _ALL),
    _Part(hair.back_hair, _ALL),
    _Part(clothes.neck, (0.55, 1.0, 0.0, 1.0)),
    _Part(clothes.clothes, (0.78, 1.0, 0.0, 1.0)),
    _Part(jewellery.necklace, (0.80, 1.0, 0.25, 0.75), "necklace"),
    _Part(features.ears, (0.36, 0.74, 0.10, 0.90)),
    _Part(features.head, (0.03, 1.0, 0.16, 0.84)),
    _Part(features.wrinkles, (0.20, 0.88, 0.22, 0.78), "wrinkles"),
    _Part(features.beard, (0.55, 1.0, 0.16, 0.84), "beard"),
    _Part(features.nose, (0.36, 0.74, 0.32, 0.68)),
    _Part(features.mouth, (0.62, 0.88, 0.30, 0.70)),
    _Part(features.mustache, (0.60, 0.80, 0.32, 0.68), "mustache"),
    _Part(worn.glasses, (0.28, 0.66, 0.0, 1.0), "eyeglasses"),
    _Part(features.left_eye, (0.32, 0.62, 0.48, 0.82)),
    _Part(features.right_eye, (0.32, 0.62, 0.18, 0.52)),
    _Part(worn.lenses, (0.34, 0.64, 0.18, 0.82), "eyeglasses"),
    _Part(features.left_brow, (0.30, 0.54, 0.48, 0.82)),
    _Part(features.right_brow, (0.30, 0.54, 0.18, 0.52)),
    _Part(hair.front_hair, _ALL),
    _Part(jewellery.earrings, (0.54, 0.92, 0.06, 0.94), "earrings"),
    _Part(worn.hat, (0.0, 0.50, 0.0, 1.0), "hat"),
)


@torch.no_grad()
def render(scenes: Scenes, size: int, device: str | torch.device = "cpu") -> Rendered:
    """Render every face of `scenes` at `size` x `size` pixels, on a device."""
    p = _parameters(scenes, device)
    canvas = Canvas(len(scenes), size, device)
    g = Geometry(p, size, device)
    for part in _PARTS:
        window = canvas.window(part.box)
        place = g if part.box == _ALL else g.window(part.box)
        if not part.flag:
            part.paint(window, place, p)
            continue
        rows = torch.from_numpy(np.flatnonzero(scenes[part.flag])).to(device)
        if len(rows):
            chosen = window.take(rows)
            part.paint(chosen, place.take(rows), {name: x[rows] for name, x in p.items()})
            window.put(rows, chosen)
    return _develop(canvas, p)


def _parameters(scenes: Scenes, device: str | torch.device) -> Parameters:
    """The values of `scenes` as float32, `b 1 1` and colours `b 3 1 1`, in two transfers."""
    numbers = [name for name, x in scenes.values.items() if x.ndim == 1]
    colours = [name for name, x in scenes.values.items() if x.ndim == 2]
    table = torch.from_numpy(np.stack([scenes[name] for name in numbers]).astype(np.float32))
    triples = torch.from_numpy(np.stack([scenes[name] for name in colours]).astype(np.float32))
    p = dict(zip(numbers, table.to(device)[:, :, None, None], strict=True))
    return p | dict(zip(colours, triples.to(device)[..., None, None], strict=True))


def _develop(canvas: Canvas, p: Parameters) -> Rendered:
    """Colour times light, whose shadows are warm, and the dense maps."""
    depth = canvas.height
    slope = 0.25 / canvas.pixel  # central differences per image side, relief halved
    pad = torch.nn.functional.pad(depth[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx = ((pad[:, 1:-1, 2:] - pad[:, 1:-1, :-2]) * slope).clamp(-1.5, 1.5)
    dy = ((pad[:, 2:, 1:-1] - pad[:, :-2, 1:-1]) * slope).clamp(-1.5, 1.5)
    normals = torch.stack([-dx, -dy, torch.ones_like(dx)], 1)
    normals = normals / normals.norm(dim=1, keepdim=True)
    light = canvas.light.clamp(min=0.02)[:, None]
    dim = 1 - light
    red = light * (1 + 0.14 * dim + p["warmth"][:, None])
    blue = light * (1 - 0.07 * dim - p["warmth"][:, None])
    image = canvas.rgb * torch.cat([red, light, blue], 1)
    near = (depth / 0.55).clamp(0, 1)[:, None]
    return Rendered(
        image.clamp(0, 1) * 2 - 1,
        canvas.label,
        canvas.rgb.clamp(0, 1) * 2 - 1,
        normals,
        near * 2 - 1,
    )
