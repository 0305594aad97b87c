"""Earrings and necklaces."""

from __future__ import annotations

import torch

from .canvas import Canvas, Geometry, Parameters, ellipse


def necklace(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """A chain, a row of pearls, or a fine chain with a pendant."""
    kind = p["necklace_type"]
    x = g.x
    line = g.y - p["necklace_y"] + 3.0 * x**2
    steep = (1 + (6.0 * x) ** 2).sqrt()
    across = line / steep
    along = torch.asinh(6.0 * x) * 0.12 + 0.08 * x  # roughly the length of the curve
    ends = x.abs() - 0.125
    thin = across.abs() - p["necklace_w"] * 0.75
    bead = 0.0215
    local = (along / bead - torch.round(along / bead)) * bead
    pearls = (local**2 + across**2).sqrt() - p["necklace_w"] * 1.32
    chain = torch.maximum(torch.where(kind == 1, pearls, thin), ends)
    drop = ellipse(x, g.y - p["necklace_y"] - 0.015, 0.013, 0.017) + (kind != 2)
    shape = torch.minimum(chain, drop)
    canvas.shade(shape - 0.008, 0.72, 0.016)
    links = 0.82 + 0.34 * torch.sin(260 * along) ** 2
    ball = 1.08 - 14 * ((local + 0.003) ** 2 + (across + 0.003) ** 2).sqrt()
    gem = 0.85 + 9 * (0.012 - ellipse(x + 0.004, g.y - p["necklace_y"] - 0.010, 0.006, 0.006).abs())
    light = torch.where(kind == 1, ball, torch.where(drop < 0, gem, links)).clamp(0.6, 1.35)
    canvas.paint(shape, p["necklace_rgb"], "neck_l", light, 0.22 + 0 * x)


def earrings(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """A pair of studs, hoops, drops or hanging pearls; a turned head shows one of them."""
    size = p["earring_size"]
    kind = p["earring_type"]
    for side in (1, -1):
        x = side * g.x - p["face_w"] * 0.99 - 0.008 + 0.035 * side * p["yaw"].clamp(-1, 1)
        y = g.y - 0.635
        stud = ellipse(x, y, 0.0225 * size, 0.0225 * size)
        hoop = ellipse(x, y - 0.052 * size, 0.044 * size, 0.058 * size).abs() - 0.0095
        taper = (0.6 + 9 * (y - 0.02)).clamp(0.35, 1.0)
        drop = ellipse(x, y - 0.072 * size, 0.026 * size * taper, 0.052 * size)
        hook = torch.maximum(x.abs() - 0.006, (y - 0.015).abs() - 0.022)
        pearl = ellipse(x, y - 0.066 * size, 0.0285 * size, 0.0285 * size)
        pearl = torch.minimum(pearl, torch.maximum(x.abs() - 0.006, (y - 0.012).abs() - 0.034))
        ring = torch.where(
            kind < 0.5, stud, torch.where(kind < 1.5, hoop, torch.minimum(drop, hook))
        )
        ring = torch.where(kind > 2.5, pearl, ring)
        ring = ring + (side * p["yaw"] > 0.75)  # the far ear of a turned head
        canvas.shade(ring - 0.008, 0.78, 0.018)
        lit = torch.sign(p["light_x"]) * side
        centre = torch.where(kind < 0.5, 0.0, 0.066 * size)
        ball = 1.16 - 11 * ((x - 0.007 * lit) ** 2 + (y - centre + 0.009) ** 2).sqrt()
        metal = 0.95 + 0.30 * torch.sin(70 * y + 40 * side * x + 2)
        light = torch.where(kind == 1, metal, ball).clamp(0.62, 1.3)
        canvas.paint(ring, p["earring_rgb"], "ear_r", light, 0.30 + 0 * x)
        spark = ellipse(x - 0.007 * lit, y - centre + 0.009, 0.005, 0.005) + (kind == 1)
        white = torch.ones_like(p["earring_rgb"])
        canvas.paint(torch.maximum(spark, ring), white, opacity=0.8, soft=0.010)
