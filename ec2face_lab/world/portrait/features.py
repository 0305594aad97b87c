"""Head and face: skin, ears, eyes, brows, nose, mouth, beard and wrinkles."""

from __future__ import annotations

import torch
from torch import Tensor

from .canvas import Canvas, Geometry, Parameters, ellipse, lambert, soft_max


def _rgb(like: Tensor, red: float, green: float, blue: float) -> Tensor:
    """A colour `1 3 1 1` on the device of another tensor, without waiting for it.

    Args:
        like: a tensor of floats.
        red: in [0, 1].
        green: in [0, 1].
        blue: in [0, 1].
    """
    colour = like.new_empty(1, 3, 1, 1)
    for channel, value in enumerate((red, green, blue)):
        colour[:, channel] = value
    return colour


def _redder(skin: Tensor, amount: float) -> Tensor:
    """Skin with more blood in it: green and blue are dimmed."""
    return torch.cat([skin[:, :1], skin[:, 1:] * (1 - amount)], 1)


def ears(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Both ears, where hair does not cover them."""
    for side, name, cover in ((1, "l_ear", "cover_l"), (-1, "r_ear", "cover_r")):
        x = side * g.x - p["face_w"] * 0.99 - 0.012 + 0.035 * side * p["yaw"].clamp(-1, 1)
        y = g.y - 0.545
        x = x + 0.22 * y
        hidden = p[cover] * 0.3
        lobe = 0.042 - 0.10 * y.clamp(0, 0.1)
        ear = ellipse(x, y, lobe, 0.086) + hidden
        light = lambert(p, side * 0.45 + 0 * x, -0.1 + 0 * x) * 0.96
        canvas.paint(ear, _redder(p["skin_rgb"], 0.05), name, light, 0.14 + 0 * x)
        inner = ellipse(x + 0.002, y + 0.010, 0.020, 0.052) + hidden
        canvas.shade(inner, 0.74, 0.022)
        canvas.shade(ellipse(x + 0.004, y + 0.004, 0.009, 0.030) + hidden, 0.80, 0.014)


def head(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The head's skin with cheeks and the soft shades that give it relief."""
    shape = g.head
    dome = (1 - (g.x / 0.34) ** 2 - ((g.y - 0.5) / 0.62) ** 2).clamp(min=0.02).sqrt()
    nx = (g.u / (p["face_w"] * 1.04)).clamp(-1, 1)
    ny = ((g.y - 0.50) / 0.46).clamp(-1, 1)
    light = lambert(p, 0.80 * nx * nx.abs() ** 0.4, 0.55 * ny * ny.abs() ** 0.5)
    canvas.paint(shape, p["skin_rgb"], "skin", light, 0.06 + 0.34 * dome)
    skin = p["skin_rgb"]
    pink = _redder(skin, 0.16)
    cheek = ellipse(g.u.abs() - 0.140, g.v - 0.612, 0.075, 0.055)
    canvas.paint(torch.maximum(cheek, shape), pink, opacity=0.55, soft=0.10)
    rosy = torch.lerp(skin, _rgb(skin, 0.86, 0.32, 0.34), 0.46)
    rouge = ellipse(g.u.abs() - 0.148, g.v - 0.615, 0.066, 0.046)
    canvas.paint(torch.maximum(rouge, shape), rosy, opacity=0.90 * p["rosy_cheeks"], soft=0.085)
    # Hollows and highlights.
    hollow = ellipse(g.u.abs() - 0.205, g.v - 0.70, 0.05, 0.09)
    canvas.shade(torch.maximum(hollow, shape), 1 - 0.10 * (1 - p["chubby"]), 0.10)
    canvas.shade(ellipse(g.u.abs() - 0.135, g.v - 0.575, 0.055, 0.026), 1.045, 0.06)
    canvas.shade(ellipse(g.u, g.v - 0.30, 0.11, 0.05), 1.04, 0.11)
    canvas.shade(ellipse(g.u, g.v - 0.845, 0.045, 0.026), 1.05, 0.05)
    socket = ellipse(g.u.abs() - p["eye_x"] * 0.93, g.v - p["eye_y"] + 0.012, 0.068, 0.042)
    canvas.shade(socket, 0.86, 0.055)
    _jowls(canvas, g, p)


def _jowls(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The second chin and round cheeks of a chubby face."""
    fold = ellipse(g.u, g.v - 0.80, 0.105, 0.075)
    below = (fold.abs() - 0.004) + (g.v < 0.835)
    canvas.shade(below, 1 - 0.34 * p["chubby"], 0.018)
    apple = ellipse(g.u.abs() - 0.165, g.v - 0.655, 0.062, 0.062)
    canvas.shade(apple, 1 + 0.05 * p["chubby"], 0.07)


def wrinkles(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Lines on the forehead, beside the eyes and from nose to mouth, of those who are not young."""
    amount = p["wrinkles"]
    across = g.v - 0.12 * g.u**2
    lines = 0.20 * (0.3 - torch.cos(193 * (across - 0.325) + 0.5 * torch.sin(30 * g.u))) * 0.1
    reach = 0.125 - 18 * (across - 0.325) ** 2
    brow = soft_max(lines, torch.maximum((across - 0.325).abs() - 0.046, g.u.abs() - reach), 0.01)
    canvas.shade(brow, 1 - 0.26 * amount * torch.exp(-((g.u / 0.11) ** 4)), 0.022)
    fold_x = 0.064 + 0.36 * (g.v - 0.64) + 0.8 * (g.v - 0.64) ** 2 + 0.014 * p["smiling"]
    fold = torch.maximum((g.u.abs() - fold_x).abs() - 0.004, (g.v - 0.705).abs() - 0.055)
    canvas.shade(fold, 1 - 0.40 * amount, 0.020)
    x = g.u.abs() - p["eye_x"] - 0.064
    rays = ((g.v - p["eye_y"] - 0.004).abs() - 0.008 - 0.42 * x.clamp(min=0)).abs() - 0.002
    crow = torch.maximum(rays, (x - 0.018).abs() - 0.014)
    canvas.shade(crow, 1 - 0.30 * amount, 0.014)


def beard(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """A beard on jaw and chin; cheeks and lips stay free."""
    edge = 0.655 + 0.85 * (0.225 - g.u.abs()).clamp(-0.05, 0.125)
    shape = soft_max(g.head - 0.004, edge - g.v, 0.02)
    grain = torch.sin(130 * g.u + 14 * torch.sin(9 * g.v)) * torch.sin(40 * g.v + 22 * g.u.abs())
    colour = (p["hair_rgb"] * 0.90 * (1 + 0.04 * grain[:, None])).clamp(0, 1)
    canvas.paint(shape, colour, opacity=p["beard_density"], soft=0.028)


def mustache(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """A mustache between nose and mouth."""
    u = g.u.abs()
    y = g.v - p["nose_y"] - 0.040 - 1.5 * u**2
    shape = ellipse(u - 0.038, y, 0.050, 0.0155)
    canvas.paint(shape, p["hair_rgb"] * 0.84, opacity=0.92, soft=0.012)


def nose(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Bridge, tip and nostrils, by soft shades."""
    tip = p["nose_y"]
    width = p["nose_w"]
    root = 0.445
    s = ((g.v - root) / (tip - root)).clamp(0, 1)  # 0 at the root, 1 at the base
    half = 0.021 + (width - 0.010) * s**2.2
    base = tip + 0.010 - 3.2 * (g.u.abs() - 0.012).clamp(min=0) ** 2
    shape = soft_max(soft_max(g.u.abs() - half, g.v - base, 0.03), root - g.v, 0.02)
    bump = 0.10 * s**1.5 * (1 - (g.u / half.clamp(min=1e-3)) ** 2).clamp(min=0)
    canvas.paint(shape, _redder(p["skin_rgb"], 0.045), "nose", height=canvas.height + bump)
    # The side away from the light, a ridge, and the shadow below.
    lit = torch.sign(p["light_x"])
    away = -lit * g.u
    flank = (away - half * 0.62).abs() - 0.010 - 0.006 * s
    flank = torch.maximum(flank, torch.maximum(root - g.v, g.v - tip + 0.01))
    canvas.shade(flank, 0.86, 0.024)
    ridge = torch.maximum((g.u - 0.004 * lit).abs() - 0.006, (g.v - 0.545).abs() - 0.075)
    canvas.shade(ridge, 1.07, 0.022)
    canvas.shade(ellipse(g.u, g.v - tip + 0.026, width * 0.42, 0.020), 1.08, 0.028)
    wing = ellipse(g.u.abs() - width * 0.78, g.v - tip + 0.016, 0.014 + 0.1 * width, 0.026)
    canvas.shade((wing - 0.002).abs() - 0.003 + (g.u.abs() < width * 0.80) * 0.1, 0.66, 0.015)
    canvas.shade(ellipse(g.u, g.v - tip - 0.014, width * 1.0, 0.012), 0.84, 0.024)
    nostril = ellipse(g.u.abs() - width * 0.44, g.v - tip - 0.002 + 0.16 * g.u.abs(),
                      0.006 + 0.12 * width, 0.0065)  # fmt: skip
    canvas.shade(nostril, 0.36, 0.010)


def mouth(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """Lips and what lies between them."""
    width = p["mouth_w"]
    x = g.u / width
    squared = x * x
    arch = (1 - squared).clamp(min=0)
    line = p["mouth_y"] - p["smile"] * squared.clamp(max=1.2) + 0.4 * p["smile"]
    line = line + 0.003 * torch.exp(-squared / 0.03) * (1 - p["mouth_open"])
    gap = p["mouth_gap"] * arch
    above = line - 0.35 * gap
    below = line + 0.65 * gap
    ends = g.u.abs() - width
    bow = 1.22 - 0.40 * torch.exp(-squared / 0.016) - 0.25 * squared
    top = above - p["lip_u"] * 1.25 * arch**0.7 * bow
    bottom = below + p["lip_l"] * 1.35 * arch**0.75
    upper = torch.maximum(torch.maximum(top - g.v, g.v - above), ends)
    lower = torch.maximum(torch.maximum(below - g.v, g.v - bottom), ends)
    inside = torch.maximum(torch.maximum(above - g.v, g.v - below), ends)
    inside = inside + (1 - p["mouth_open"])
    # Skin around the mouth: the groove above, the shade below, the corners.
    canvas.shade(ellipse(g.u, g.v - bottom - 0.012, width * 0.62, 0.010), 0.84, 0.024)
    canvas.shade(ellipse(g.u, g.v - p["nose_y"] - 0.040, 0.008, 0.022), 0.94, 0.016)
    corner = ellipse(g.u.abs() - width - 0.003, g.v - line, 0.010, 0.008)
    canvas.shade(corner, 0.74, 0.018)
    fold_x = 0.078 + 0.36 * (g.v - 0.64) + 0.8 * (g.v - 0.64) ** 2
    fold = torch.maximum((g.u.abs() - fold_x).abs() - 0.003, (g.v - 0.70).abs() - 0.042)
    canvas.shade(fold, 1 - 0.17 * p["smiling"] * (1 - p["wrinkles"]), 0.022)
    light = canvas.light
    canvas.paint(inside, _rgb(inside, 0.27, 0.07, 0.08), "mouth", 0.9 * light)
    row = torch.maximum(inside, g.v - above - 0.52 * p["mouth_gap"] * arch**0.6)
    canvas.paint(row, _rgb(inside, 0.95, 0.93, 0.89), opacity=p["teeth"])
    tongue = torch.maximum(inside, below - 0.22 * gap - g.v)
    canvas.paint(tongue, _rgb(inside, 0.62, 0.26, 0.26), opacity=0.6, soft=0.008)
    lip = p["lip_rgb"]
    canvas.paint(upper, lip * 0.90, "u_lip", 0.94 * light, canvas.height + 0.02)
    canvas.paint(lower, lip, "l_lip", light, canvas.height + 0.03)
    seam = torch.maximum((g.v - line).abs() - 0.0028, ends + 0.003)
    canvas.paint(seam, lip * 0.42, opacity=0.9 * (1 - p["mouth_open"]), soft=0.011)
    shine = ellipse(g.u, g.v - below - 0.48 * p["lip_l"], width * 0.34, p["lip_l"] * 0.20)
    glossy = lip + (1 - lip) * 0.55
    canvas.paint(shine, glossy, opacity=0.25 + 0.35 * p["lipstick"], soft=0.012)


def left_eye(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The subject's left eye, on the right of the picture."""
    _eye(canvas, g, p, 1)


def right_eye(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The subject's right eye."""
    _eye(canvas, g, p, -1)


def _eye(canvas: Canvas, g: Geometry, p: Parameters, side: int) -> None:
    label = "l_eye" if side > 0 else "r_eye"
    skin = p["skin_rgb"]
    makeup = p["heavy_makeup"]
    x = side * g.u - p["eye_x"]  # outwards from the nose is positive
    y = g.v - p["eye_y"] + p["eye_tilt"] * x
    width = p["eye_w"]
    tall = p["eye_h"]
    t = x / width
    arc = (1 - t * t).clamp(min=0)
    upper = tall * 1.12 * arc * (1 - 0.12 * t)
    lower = tall * 0.72 * arc * (1 + 0.22 * t)
    almond = torch.maximum(torch.maximum(-upper - y, y - lower), x.abs() - width)
    # Make-up, the lid's crease and what lies under the eye.
    lid = ellipse(x - 0.004, y + tall * 1.15, width * 1.12, tall * 0.8 + 0.006)
    canvas.paint(lid, torch.lerp(skin, p["shadow_rgb"], 0.85), opacity=0.85 * makeup, soft=0.026)
    crease = (y + upper * 1.0 + 0.0105 + 0.002 * arc).abs() - 0.0018
    canvas.shade(torch.maximum(crease, x.abs() - width * 0.95), 0.74, 0.010)
    bag_y = y - tall * 0.9 - 0.020 + 5.5 * x**2
    bag = torch.maximum(bag_y.abs() - 0.0035, x.abs() - width * 0.80)
    canvas.shade(bag, 1 - 0.46 * p["bags_under_eyes"], 0.013)
    hollow = ellipse(x + 0.006, y - tall * 0.9 - 0.011, width * 0.9, 0.014)
    tired = torch.cat([skin[:, :2] * 0.62, skin[:, 2:] * 0.80], 1)
    canvas.paint(hollow, tired, opacity=0.62 * p["bags_under_eyes"], soft=0.020)
    # The eyeball in the lid's shadow.
    white = _rgb(almond, 0.95, 0.94, 0.92)
    shadow = 0.80 + 0.24 * ((y + upper) / 0.022).clamp(0, 1)
    canvas.paint(almond, white, label, shadow * (0.35 + 0.65 * canvas.light))
    canvas.paint(torch.maximum(almond, t + 0.80), _rgb(almond, 0.84, 0.60, 0.56),
                 opacity=0.7, soft=0.010)  # fmt: skip
    ix = x - side * p["gaze"]
    iy = y + 0.0035
    radius = (ix * ix + iy * iy).sqrt()
    iris = p["iris_rgb"]
    lower_glow = (0.80 + 0.45 * (iy / 0.022)).clamp(0.6, 1.3)
    canvas.paint(torch.maximum(radius - 0.0238, almond), iris * 0.38)
    canvas.paint(torch.maximum(radius - 0.0206, almond), (iris * lower_glow[:, None]).clamp(0, 1))
    canvas.paint(torch.maximum(radius - 0.0098, almond), _rgb(almond, 0.03, 0.03, 0.04))
    glint = ellipse(g.u - side * p["eye_x"] - p["gaze"] + 0.0075, y + 0.0105, 0.0054, 0.0054)
    canvas.paint(torch.maximum(glint, almond), _rgb(almond, 1.0, 1.0, 1.0), opacity=0.95)
    # Lashes.
    female = 1 - p["male"]
    ink = skin * 0.16
    thick = 0.0030 + 0.0012 * female + 0.0028 * makeup
    lash = torch.maximum((y + upper + 0.4 * thick).abs() - thick, x.abs() - width * 1.04)
    canvas.paint(lash, ink, opacity=0.92)
    wing_x = (x - width * 0.80) / (0.020 + 0.010 * makeup)
    wing = (y + tall * 0.30 + 0.016 * wing_x.clamp(0, 1)).abs() - 0.0042 * (1 - wing_x).clamp(0, 1)
    wing = torch.maximum(wing, (wing_x - 0.5).abs() * 0.02 - 0.01)
    canvas.paint(wing, ink, opacity=(0.55 * female + 0.4 * makeup).clamp(max=0.92))
    under = torch.maximum((y - lower - 0.001).abs() - 0.0014 - 0.0012 * makeup, -x - width * 0.5)
    canvas.paint(torch.maximum(under, x - width), ink, opacity=0.40 + 0.35 * makeup)


def left_brow(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The subject's left brow, on the right of the picture."""
    _brow(canvas, g, p, 1)


def right_brow(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    """The subject's right brow."""
    _brow(canvas, g, p, -1)


def _brow(canvas: Canvas, g: Geometry, p: Parameters, side: int) -> None:
    label = "l_brow" if side > 0 else "r_brow"
    x = side * g.u - p["eye_x"] - 0.004
    y = g.v - p["eye_y"] + p["brow_y"]
    t = x / 0.066  # -1 at the nose, 1 at the temple
    past = t - 0.25
    arched = 0.022 * (past * past + 0.02).sqrt() + 0.026 * past.clamp(min=0) - 0.020
    flat = 0.010 * (t - 0.1) ** 2 - 0.004 * t
    y = y - torch.lerp(flat, arched, p["brow_arch"])
    taper = (
        (1.0 - 0.75 * ((t + 0.35).clamp(min=0) / 1.35) ** 1.5) * (1.02 + t).clamp(0, 0.35) / 0.35
    )
    thick = p["brow_h"] * taper
    stroke = torch.maximum(y.abs() - thick, x.abs() - 0.066)
    ink = torch.lerp(p["hair_rgb"] * 0.66, p["skin_rgb"] * 0.40, 0.30)
    canvas.paint(stroke, ink, label, opacity=0.90, soft=0.010)
