"""Hair: the mass behind the head, the front that frames the face, strands and curls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .canvas import Canvas, Geometry, Parameters, lambert, rounded, soft_max


def _ringlets(along: Tensor, across: Tensor, p: Parameters) -> Tensor:
    """Brightness of long curls, ringlets that wind down side by side, about in [-0.5, 0.3].

    Args:
        along: the strands, `b h w`.
        across: the strands, `b h w`.
        p: parameters.
    """
    turn = 56 * p["strand"] * along
    place = 11.5 * across + 0.22 * torch.sin(turn + p["wave_phase"])
    number = place.round()
    within = place - number
    winding = torch.sin(turn + 2.4 * number + 3.2 * within + p["wave_phase"])
    return 0.24 * winding - 0.95 * within * within + 0.04


def _honeycomb(g: Geometry, p: Parameters) -> Tensor:
    """Short curls, a honeycomb bent out of order: 1 in the middle of a curl, 0 between three."""
    phase = p["wave_phase"]
    x = 19 * (g.x + 0.020 * torch.sin(17 * g.y + phase) + 0.005 * torch.sin(53 * g.y))
    y = 19 * (g.y + 0.020 * torch.sin(19 * g.x + 2 * phase) + 0.005 * torch.sin(47 * g.x))
    tall = math.sqrt(3)
    even = (x - x.round()) ** 2 + (y - tall * (y / tall).round()) ** 2
    x = x + 0.5
    y = y + 0.5 * tall
    odd = (x - x.round()) ** 2 + (y - tall * (y / tall).round()) ** 2
    return 1 - 3 * torch.minimum(even, odd)


def _curls(g: Geometry, p: Parameters, along: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness of curls and the displacement of their outline, both `b h w`.

    Args:
        g: coordinates.
        p: parameters.
        along: the strands, `b h w`.
        across: the strands, `b h w`.
    """
    short = p["hair_length"] < 0.5
    comb = _honeycomb(g, p)
    a = torch.sin(50 * g.x + 9 * g.y + p["wave_phase"])
    b = torch.sin(46 * g.y - 8 * g.x + 2 * p["wave_phase"])
    bright = torch.where(short, 0.44 * comb - 0.27, _ringlets(along, across, p))
    bulge = torch.where(short, 0.010 - 0.024 * comb, 0.007 * (a + b))
    return bright, bulge


def _length_along(g: Geometry, p: Parameters) -> Tensor:
    """Distance from the crown along the strands, about."""
    return (g.x**2 + (g.y - p["head_top"] + 0.02) ** 2).sqrt()


def outline(g: Geometry, p: Parameters, ripple: Tensor) -> Tensor:
    """Everything that hair covers, before the face is cut out of it."""
    length = p["hair_length"]
    volume = p["hair_volume"] + 0.5 * p["curl"] * (1 - p["hat"])
    short = length < 0.5
    side = torch.where(short, 0.014 + 0.018 * volume, 0.050 + 0.020 * length + 0.046 * volume)
    rx = p["face_w"] + side
    top = p["head_top"] - 0.030 - torch.where(short, 0.026, 0.046) * volume
    ry = 0.45 - top
    dome = rounded(g.x, g.y - 0.45, rx, ry, 2.25)
    bob = length < 1.5
    end = torch.where(short, 0.52, torch.where(bob, 0.79 + 0.05 * p["hair_volume"], 1.3))
    down = (g.y - 0.45).clamp(min=0)
    sway = torch.where(bob, 0.10 * down - 0.36 * down**2, 0.20 * down * (0.4 + p["hair_volume"]))
    flare = rx + sway * length.clamp(max=1)
    fall = soft_max(g.x.abs() - flare, g.y - end, 0.07)
    shape = torch.where(g.y < 0.45, dome, fall)
    return shape + ripple + p["bald"]


def comb(g: Geometry, p: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """Strands, waves, curls and a sheen.

    Returns:
        Colour of hair `b 3 h w`, light on it `b h w`, and the displacement `b h w` of its outline:
        none for straight hair, waves, or the bulges of curls.
    """
    along = _length_along(g, p)
    spread = 0.20 + (g.y - p["head_top"] + 0.06).clamp(0, 0.40)
    spread = torch.maximum(spread, 0.42 * (p["curl"] > 0))
    wave = torch.sin(33 * along + p["wave_phase"])
    across = (g.x - 0.4 * p["hair_part"] + p["wave"] * wave) / spread
    rate = p["strand"]
    fine = 0.50 * torch.sin(31 * rate * across + p["wave_phase"])
    fine = fine + 0.30 * torch.sin(57 * rate * across + 2.3 * p["wave_phase"])
    fine = fine + 0.20 * torch.sin(101 * across + 1.7)
    curly = p["curl"]
    bright, bulge = _curls(g, p, along, across)
    tone = 1 + 0.15 * fine * (1 - 0.4 * curly) + curly * bright
    tone = tone + 11.0 * p["wave"] * torch.cos(33 * along + p["wave_phase"] + 2.5 * across)
    band = torch.exp(-(((along - 0.165 - 0.04 * fine) / 0.045) ** 2)) * (1 - 0.6 * curly)
    mean = p["hair_rgb"].mean(1, keepdim=True)
    gloss = (0.018 + 0.06 * mean) + (0.027 / mean + 0.09) * p["hair_rgb"]  # half white
    colour = (p["hair_rgb"] * tone[:, None] + gloss * band[:, None]).clamp(0, 1)
    nx = (g.x / (p["face_w"] + 0.10)).clamp(-1, 1)
    ny = ((g.y - 0.42) / 0.50).clamp(-1, 0.2)
    light = lambert(p, 0.80 * nx, 0.65 * ny)
    return colour, light, p["wave"] * wave + curly * bulge


def back_hair(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Hair behind head and neck."""
    colour, light, ripple = comb(g, p)
    shape = outline(g, p, ripple)
    g.hair = (shape, colour, light, ripple)
    behind = torch.exp(-((g.x / 0.21) ** 4)) * 0.3  # in the shadow of the head
    light = light * (0.80 - behind)
    canvas.paint(shape, colour, "hair", light, 0.05 + 0.05 * (0.2 - g.x**2))


def front_hair(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Hair over forehead, temples and, where it is worn so, ears and shoulders."""
    hair, colour, light, ripple = g.hair
    bangs = p["bangs"] > 0
    covered = torch.where(g.x > 0, p["cover_l"], p["cover_r"]) > 0
    face_w = p["face_w"]
    opening = soft_max(_side(g, p, covered), _hairline(g, p) - g.y, 0.08)
    opening = opening - 0.6 * ripple
    length = p["hair_length"]
    end = torch.where(length < 0.5, 0.60, torch.where(length < 1.5, 0.80, 1.3))
    end = torch.where(covered, end, torch.where(length < 0.5, 0.545, 0.50))
    end = end + 0.012 * torch.sin(70 * g.x + p["wave_phase"])
    front = torch.maximum(torch.maximum(hair, -opening), (g.y - end) * 0.7)
    # Long hair falls over the shoulders.
    wide = 0.060 + 0.02 * p["hair_volume"] - 2.2 * (0.86 - g.y).clamp(min=0) ** 1.5
    lock = (g.x.abs() - face_w - 0.030 + 0.12 * (g.y - 0.86)).abs() - wide
    lock = torch.maximum(lock + ripple, hair) + (length < 1.5)
    shape = torch.minimum(front, lock)
    canvas.shade(torch.maximum(shape - 0.016, g.head), 0.74, 0.045)
    rim = 1 - 0.20 * torch.exp(-((shape / 0.018) ** 2))  # edges lie deeper
    fringe = bangs & (g.y > 0.22)
    locks = torch.sin(88 * g.x + p["wave_phase"]) * fringe
    light = light * rim * (1 + 0.07 * locks)
    canvas.paint(shape, colour, "hair", light, 0.26 + 0.5 * (0.10 - g.x**2))


def _hairline(g: Geometry, p: Parameters) -> Tensor:
    """Where hair ends above the forehead: a fringe, a parting or hair that is swept back."""
    start = p["hairline"]
    x = g.x - p["hair_part"]
    bend = 0.006 * torch.sin(60 * g.x + p["wave_phase"])
    parted = start + 1.25 * (x.abs() + 1e-4) ** 1.5
    swept = start + 0.9 * g.x**2 + bend
    receding = start + 0.055 * torch.exp(-((g.x / 0.055) ** 2)) - 0.35 * g.x**2
    fringe = 0.350 + 0.6 * g.x**2 + 0.008 * torch.sin(88 * g.x + p["wave_phase"])
    line = torch.where(p["hair_parted"] > 0, parted, swept)
    line = torch.where(p["receding_hairline"] > 0, receding, line)
    return torch.where(p["bangs"] > 0, fringe, line)


def _side(g: Geometry, p: Parameters, covered: Tensor) -> Tensor:
    """Distance to the opening's sides: curtains beside the face, or sideburns before free ears."""
    half = p["face_w"] * (0.93 - 0.07 * p["hair_volume"]) + 0.25 * (g.y - 0.66).clamp(min=0)
    curtain = torch.maximum(g.x.abs() - half, g.head + 0.012 - 0.5 * (g.y - 0.60).clamp(min=0))
    sideburn = 0.030 - 0.020 * p["receding_hairline"]
    free = g.head + sideburn - 0.45 * (g.y - 0.44).clamp(min=0)
    return torch.where(covered, curtain, free)
