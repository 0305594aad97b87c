"""Eyeglasses, sunglasses and hats."""

from __future__ import annotations

import torch
from torch import Tensor

from .canvas import Canvas, Geometry, Parameters, ellipse, lambert, rounded


def _lens(g: Geometry, p: Parameters) -> Tensor:
    x = g.u.abs() - p["eye_x"] - 0.004
    y = g.v - p["eye_y"] - 0.012
    return rounded(x, y, p["lens_w"], p["lens_h"], p["lens_power"])


def glasses(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The frame and the clear glass behind the eyes' paint."""
    lens = _lens(g, p)
    y = g.v - p["eye_y"]
    width = p["frame_w"]
    bridge = torch.maximum((y + 0.012 - 3 * g.u**2).abs() - width * 0.9, g.u.abs() - 0.04)
    temple = torch.maximum((y + 0.012).abs() - width * 0.9, 0.175 - g.u.abs())
    temple = torch.maximum(temple, g.head - 0.012)
    frame = torch.minimum(torch.minimum(bridge, temple), lens.abs() - width)
    canvas.shade(frame - 0.006, 0.86, 0.02)
    clear = torch.maximum(lens, -frame)
    skin = p["skin_rgb"]
    canvas.paint(clear, skin * 0.90 + 0.085, "eye_g", opacity=0.45)
    shine = 1 + 0.35 * torch.exp(-(((y + 0.05) / 0.02) ** 2))
    canvas.paint(frame, p["frame_rgb"], "eye_g", shine, canvas.height + 0.01)


def lenses(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """What lies over the eyes: a reflection on clear glass, or dark lenses."""
    lens = _lens(g, p) + p["frame_w"] * 0.5
    dark = p["sunglasses"] > 0
    x = g.u.abs() - p["eye_x"]
    y = g.v - p["eye_y"]
    streak = (torch.sign(g.u) * x * 0.8 + y * 0.6 + 0.012).abs() - 0.010
    fade = (0.65 - 6 * (y + 0.05)).clamp(0.25, 1.0)[:, None]  # lighter above
    tint = p["frame_rgb"] * 0.12 + 0.02 + 0.09 * (1 - fade)
    opaque = lens + (~dark).float()
    canvas.paint(opaque, tint, "eye_g", torch.ones_like(lens), opacity=0.97)
    white = torch.ones_like(p["frame_rgb"])
    glare = torch.maximum(streak, lens + 0.010)
    canvas.paint(glare, white, opacity=torch.where(dark, 0.20, 0.16), soft=0.012)


def hat(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """A cap, a beanie or a hat with a brim."""
    kind = p["hat_type"]
    cap = kind < 0.5
    beanie = (kind > 0.5) & (kind < 1.5)
    brimmed = kind > 1.5
    line = p["hat_y"]
    x = g.x
    y = g.y
    rx = p["face_w"] + 0.038 + 0.02 * p["hair_volume"] + 0.02 * (p["hair_length"] > 0)
    top = torch.where(brimmed, -0.02, torch.where(beanie, 0.0, 0.015))
    half = torch.where(brimmed, rx * 0.86, rx)
    power = torch.where(brimmed, 3.0, 2.4)
    crown = rounded(x, y - line, half, line - top, power)
    crown = torch.maximum(crown, y - line - 0.3 * x**2)
    # The shadow on forehead and hair.
    under = ellipse(x, y - line - 0.055, rx * 1.05, 0.050)
    canvas.shade(under, 0.62, 0.05)
    nx = (0.85 * x / rx).clamp(-0.95, 0.95)
    ny = ((y - line) / line * 0.8 + 0.1).clamp(-0.9, 0.1)
    light = lambert(p, nx, ny)
    ribs = 1 + 0.10 * torch.sin(120 * x / (0.55 + 0.9 * y).clamp(min=0.3)) * beanie
    seam = (x.abs() - rx * 0.52 * (1 - ((line - y) / line).clamp(0, 1) ** 2).sqrt()).abs()
    seams = 1 - 0.16 * torch.exp(-((torch.minimum(seam, x.abs() + 0.004) / 0.006) ** 2)) * cap
    dent = 1 - 0.22 * torch.exp(-((x / 0.05) ** 2) - ((y - top - 0.03) / 0.09) ** 2) * brimmed
    canvas.paint(
        crown, p["hat_rgb"], "hat", light * ribs * seams * dent, 0.30 + 0.5 * (0.13 - x**2)
    )
    _band(canvas, g, p, crown, light)
    _brim(canvas, g, p, rx, light)


def _band(canvas: Canvas, g: Geometry, p: Parameters, crown: Tensor, light: Tensor) -> None:
    """A ribbon around a brimmed hat; the turned-up edge of a beanie."""
    kind = p["hat_type"]
    line = p["hat_y"] + 0.3 * g.x**2
    beanie = (kind > 0.5) & (kind < 1.5)
    ribbon = torch.maximum(crown, line - 0.055 - g.y) + (kind < 1.5)
    canvas.paint(ribbon, p["band_rgb"], "hat", light)
    rx = p["face_w"] + 0.048 + 0.02 * p["hair_volume"] + 0.02 * (p["hair_length"] > 0)
    y = g.y - line + 0.020
    cuff = torch.maximum(y.abs() - 0.046, g.x.abs() - rx) + (~beanie).float()
    bulge = 1.04 - 0.22 * (y / 0.046) ** 2
    ribs = 1 + 0.14 * torch.sin(105 * g.x)
    canvas.shade(torch.maximum(cuff - 0.012, crown), 0.74, 0.02)
    canvas.paint(cuff, p["hat_rgb"], "hat", light * bulge * ribs, 0.34 + 0.4 * (0.13 - g.x**2))


def _brim(canvas: Canvas, g: Geometry, p: Parameters, rx: Tensor, light: Tensor) -> None:
    """The peak of a cap or the brim of a hat."""
    cap = p["hat_type"] < 0.5
    brimmed = p["hat_type"] > 1.5
    none = ~cap & ~brimmed
    x = torch.where(cap, g.x - 0.06 * p["yaw"], g.x)
    y = g.y - p["hat_y"] - torch.where(cap, 0.45 * x**2 + 0.010, 0.16 * x**2 - 0.006)
    reach = torch.where(cap, rx * 0.84, rx * 1.42)
    thick = torch.where(cap, 0.066, 0.036)
    brim = ellipse(x, y, reach, thick) + none.float()
    fall = torch.where(cap, 0.66 + 3.0 * y.abs(), 0.98 - 5.5 * y.clamp(-0.02, 0.045))
    canvas.paint(brim, p["hat_rgb"] * 0.92, "hat", light * fall, 0.42 - 0.3 * x**2)
    edge = torch.maximum(brim.abs() - 0.003, -y)
    canvas.shade(torch.maximum(edge, brim), 0.72, 0.010)
