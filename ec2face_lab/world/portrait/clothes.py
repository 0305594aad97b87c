"""Neck and clothes."""

from __future__ import annotations

import torch

from .canvas import Canvas, Geometry, Parameters, ellipse, lambert, soft_max


def neck(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Neck and shoulders' skin, under the shadow of the chin."""
    x = g.x - 0.012 * p["yaw"]
    slope = (g.y - p["shoulder_y"] + 0.03).clamp(min=0) + 0.25 * (g.y - 0.86).clamp(min=0)
    half = 0.128 + 0.028 * p["male"] + 0.012 * p["chubby"] + 1.4 * slope
    half = half + 0.10 * (0.84 - g.y).clamp(min=0)
    shape = torch.maximum((x.abs() - half) * 0.8, 0.68 - g.y)
    light = lambert(p, 0.75 * (x / half).clamp(-1, 1), 0.1 + 0 * x)
    canvas.paint(shape, p["skin_rgb"] * 0.98, "neck", light, 0.10 + 0.10 * (0.09 - (x / 1.6) ** 2))
    chin = soft_max(g.head - 0.055, g.y - 1.0, 0.05)
    canvas.shade(torch.maximum(chin, shape - 0.01), 0.60, 0.10)
    collarbone = ((x.abs() - 0.02) * 0.35 - (g.y - 0.985)).abs() - 0.004
    canvas.shade(torch.maximum(collarbone, 0.05 - x.abs()), 0.90, 0.025)


def clothes(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """A garment with a round neckline, a V, or a shirt's collar."""
    top = p["shoulder_y"]
    x = g.x
    y = g.y - top
    shoulders = ellipse(x, y - 0.36, 0.66, 0.37)
    kind = p["collar"]
    wide = 0.135 + 0.03 * p["male"] + 0.05 * p["neckline"]
    deep = 0.05 + 0.06 * p["neckline"]
    round_neck = ellipse(x, y + 0.01, wide, deep)
    v_neck = x.abs() * 0.8 + (y - deep - 0.06) * 0.6
    shirt = x.abs() * 0.9 + (y - 0.075) * 0.45
    opening = torch.where(kind < 0.5, round_neck, torch.where(kind < 1.5, v_neck, shirt))
    cloth = torch.maximum(shoulders, -opening)
    folds = torch.sin(17 * x + 9 * g.y + p["wave_phase"]) * torch.sin(11 * x - 6 * g.y)
    light = lambert(p, (1.1 * x).clamp(-0.9, 0.9), (0.35 - 2.5 * y).clamp(-0.7, 0.35))
    light = light * (1 + 0.06 * folds)
    canvas.shade(shoulders, 0.9, 0.05)
    canvas.paint(cloth, p["cloth_rgb"], "cloth", light, 0.10 - 0.1 * x**2)
    hem = (opening - 0.011).abs() - 0.010
    canvas.shade(torch.maximum(torch.maximum(hem, -opening), shoulders), 1.12, 0.012)
    canvas.shade(torch.maximum((opening - 0.026).abs() - 0.003, shoulders), 0.80, 0.012)
    _shirt_collar(canvas, g, p)


def _shirt_collar(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The two flaps of a shirt's collar, on those who wear a shirt."""
    x = g.x.abs()
    y = g.y - p["shoulder_y"]
    inner = -(x * 0.9 + (y - 0.075) * 0.45)
    outer = x * 0.50 + y * 0.80 - 0.085
    flap = torch.maximum(torch.maximum(inner, outer), -0.045 - y + 0.25 * (x - 0.13))
    flap = torch.maximum(flap, x - 0.185) + (p["collar"] < 1.5)
    light = lambert(p, 0.5 * torch.sign(g.x) + 0 * y, -0.25 + 0 * y) * 1.04
    canvas.shade(torch.maximum(flap - 0.012, -flap), 0.8, 0.02)
    canvas.paint(flap, (p["cloth_rgb"] * 1.08).clamp(0, 1), "cloth", light, 0.14 + 0 * y)
