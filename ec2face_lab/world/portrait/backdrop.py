"""Backgrounds out of focus: a studio, a room, lights or leaves far away."""

from __future__ import annotations

import torch

from .canvas import Canvas, Geometry, Parameters


def backdrop(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Fill the picture with a background."""
    x = g.page_x
    y = g.page_y
    glow = torch.exp(-(((x - p["bg_x"]) / 0.42) ** 2) - ((y - 0.4) / 0.5) ** 2)
    # A room: a bright window with soft edges, a darker wall towards the floor.
    edge = x * torch.cos(0.1 * p["bg_angle"]) - p["bg_x"]
    pane = torch.sigmoid((0.17 - edge.abs()) * 26) - 0.5 * torch.sigmoid((0.014 - edge.abs()) * 60)
    room = 0.75 * pane * torch.sigmoid((0.75 - y) * 14) + 0.2 * (1 - y)
    # Outdoors: light above, and round spots out of focus.
    f = p["bg_freq"]
    turn = p["bg_angle"]
    a = torch.sin(f * (x + 0.6 * y) + turn + torch.sin(3 * y + turn))
    b = torch.sin(f * (1.1 * y - 0.4 * x) + 2 * turn + torch.sin(4 * x))
    c = torch.sin(2.3 * f * (x - 0.3 * y) + 3 * turn) * torch.sin(2.1 * f * y + 4 * turn)
    spots = 0.30 + 0.28 * a * b + 0.28 * torch.sigmoid((c - 0.45) * 9) + 0.4 * (1 - y) ** 1.5
    kind = p["bg_kind"]
    mix = torch.where(kind < 0.5, glow, torch.where(kind < 1.5, room, spots)).clamp(0, 1)
    canvas.rgb.copy_(torch.lerp(p["bg_b"], p["bg_a"], mix[:, None]))
    corner = x * x + (y - 0.5) ** 2
    canvas.light.copy_((1.04 - 0.36 * corner).expand_as(canvas.light))
