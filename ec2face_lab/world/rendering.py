"""Renders `scenes.Scenes`: image, label map and dense maps from the same shapes, at any size.

Every part is a signed distance that is painted on a `canvas.Canvas`, back to front, eyes and brows
over glasses, as CelebAMask-HQ's `g_mask.py` does. A height field that is painted along gives depth,
normals and shading.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .canvas import Canvas, Geometry, ellipse

if TYPE_CHECKING:
    from .scenes import Scenes


Parameters = dict[str, Tensor]  # of `Scenes`, `b 1 1`, colours `b 3 1 1`

Part = Callable[[Canvas, Geometry, Parameters], None]


@dataclass
class Rendered:
    """Pictures of a batch of faces, in [-1, 1]."""

    image: Tensor  # b 3 h w
    label_map: Tensor  # b h w, int64 ids
    albedo: Tensor  # b 3 h w, flat colours without light
    normals: Tensor  # b 3 h w
    depth: Tensor  # b 1 h w, near is 1


@torch.no_grad()
def render(scenes: Scenes, size: int, device: str = "cpu") -> Rendered:
    """Render every face of `scenes` at `size` x `size` pixels."""
    p = {}
    for name, value in scenes.values.items():
        x = torch.as_tensor(value, dtype=torch.float32, device=device)
        p[name] = x[:, None, None] if x.ndim == 1 else x[:, :, None, None]
    canvas = Canvas(len(scenes), size, device)
    g = Geometry(p, size, device)
    _background(canvas, g, p, scenes.look)
    _back_hair(canvas, g, p)
    _neck_and_clothes(canvas, g, p)
    _some(canvas, g, p, "necklace", _necklace)
    _ears(canvas, g, p)
    _head(canvas, g, p)
    _some(canvas, g, p, "beard", _beard)
    _some(canvas, g, p, "mustache", _mustache)
    _some(canvas, g, p, "eyeglasses", _glasses)
    _eyes_and_brows(canvas, g, p)
    _some(canvas, g, p, "sunglasses", _sunglasses)
    _nose(canvas, g, p)
    _mouth(canvas, g, p)
    _front_hair(canvas, g, p)
    _some(canvas, g, p, "earrings", _earrings)
    _some(canvas, g, p, "hat", _hat)
    return _shade(canvas, p, scenes.look)


def _some(canvas: Canvas, g: Geometry, p: Parameters, flag: str, paint: Part) -> None:
    """Paint a rare part on those faces of the batch that have it."""
    rows = p[flag].flatten().nonzero().flatten()
    if len(rows):
        part = canvas.take(rows)
        paint(part, g.take(rows), {name: value[rows] for name, value in p.items()})
        canvas.put(rows, part)


def _head_shape(g: Geometry, p: Parameters) -> Tensor:
    """Skull above, jaw below; the jaw's power makes it round or square."""
    middle = 0.5 * (p["head_top"] + p["face_h"] + 0.5)
    top = ellipse(g.x, g.y - middle, p["face_w"] * 1.02, middle - p["head_top"], 2.3)
    jaw = ellipse(
        g.x - 0.01 * p["yaw"],
        g.y - middle,
        p["face_w"] * 1.02,
        p["face_h"] + 0.5 - middle,
        p["jaw"],
    )
    return torch.where(g.y < middle, top, jaw)


def _waves(g: Geometry, p: Parameters) -> Tensor:
    """Displacement of the hair's outline: none for straight, ripples for wavy, curls for curly."""
    amount = torch.tensor([0.0, 0.010, 0.016], device=g.y.device)[p["hair_style"].long()]
    frequency = torch.tensor([20.0, 34.0, 58.0], device=g.y.device)[p["hair_style"].long()]
    return amount * torch.sin(frequency * g.y + 0.3 * frequency * g.x + p["wave_phase"])


def _hair_shape(g: Geometry, p: Parameters) -> Tensor:
    """Everything the hair covers, before the face is cut out of it."""
    long = p["hair_length"]
    volume = p["hair_volume"]
    rx = p["face_w"] + 0.034 + 0.036 * long + (0.030 + 0.030 * long) * volume
    top = p["head_top"] - 0.06 - 0.09 * volume
    dome = ellipse(g.x, g.y - 0.42, rx, 0.42 - top, 2.2)
    end = torch.where(long > 1.5, 1.2, torch.where(long > 0.5, 0.80 + 0.1 * volume, 0.50))
    flare = rx + 0.13 * long * (g.y - 0.42).clamp(min=0) * (0.3 + volume)
    fall = torch.maximum(g.x.abs() - flare, torch.maximum(0.42 - g.y, g.y - end))
    return torch.minimum(dome.masked_fill((g.y > 0.52) & (long < 0.5), 1.0), fall) + _waves(g, p)


def _strands(g: Geometry, p: Parameters) -> Tensor:
    """Hair colour with strands and a sheen, `b 3 h w`."""
    style = p["hair_style"]
    bend = style * 0.03 * torch.sin(26 * g.y + p["wave_phase"])
    along = (g.x + bend) / (0.35 + (g.y - 0.05).abs())
    strand = torch.sin(70 * p["strand"] * along + p["wave_phase"]) + 0.3 * torch.sin(173 * along)
    sheen = torch.exp(-(((g.y - 0.17 - 0.5 * g.x**2) / 0.05) ** 2))
    return (p["hair_rgb"] * (1 + 0.10 * strand[:, None]) + 0.10 * sheen[:, None]).clamp(0, 1)


# --- parts, back to front ---


def _background(canvas: Canvas, g: Geometry, p: Parameters, look: str) -> None:
    angle = p["bg_angle"]
    f = p["bg_freq"]
    x = g.page_x
    y = g.page_y
    ramp = 0.5 + 0.5 * (torch.cos(angle) * x * 1.6 + torch.sin(angle) * (y - 0.5) * 1.6)
    if look == "first":  # gradients, soft lights, panels
        lights = 0.5 + 0.5 * torch.sin(f * 2 * x + angle) * torch.sin(f * 1.7 * y + 2 * angle)
        panels = (torch.sin(f * 2.5 * x + angle) * 4).clamp(-1, 1) * 0.3 + 0.5
    else:  # horizons, tiles, rays
        lights = ((y - 0.35 - 0.1 * torch.sin(f * x + angle)) * 30).clamp(0, 1)
        panels = 0.5 + 0.35 * torch.sign(torch.sin(f * 3 * x + angle) * torch.sin(f * 3 * y))
    mix = torch.where(p["bg_kind"] < 0.5, ramp, torch.where(p["bg_kind"] < 1.5, lights, panels))
    mix = mix.clamp(0, 1)[:, None]
    canvas.rgb.copy_(p["bg_a"] * (1 - mix) + p["bg_b"] * mix)


def _back_hair(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    shape = _hair_shape(g, p).masked_fill(p["bald"] > 0, 1.0)
    dark = _strands(g, p) * 0.72
    canvas.paint(shape, dark, "hair", 0.10 + 0.1 * (0.2 - g.x**2))


def _neck_and_clothes(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    half = 0.145 + 0.03 * p["male"] + 0.5 * (g.y - 0.86).clamp(min=0)
    sides = (g.x - 0.01 * p["yaw"]).abs() - half
    neck = torch.maximum(sides, 0.7 - g.y)
    chin = torch.exp(-(((g.y - 0.86) / 0.06) ** 2)) * 0.34  # shadow of the chin
    canvas.paint(neck, p["skin_rgb"] * (0.93 - chin[:, None]), "neck",
                 0.16 + 0.12 * (0.09 - (g.x / 1.6) ** 2))  # fmt: skip
    shoulders = ellipse(g.x, g.y - p["shoulder_y"] - 0.30, 0.62, 0.31, 2.3)
    shoulders = torch.maximum(shoulders, p["shoulder_y"] - g.y)
    depth = 0.02 + 0.07 * p["neckline"]
    opening = ellipse(g.x, g.y - p["shoulder_y"] + 0.02, 0.13 + 0.07 * p["neckline"], depth + 0.03)
    cloth = torch.maximum(shoulders, -opening)
    folds = 1 + 0.10 * torch.sin(38 * g.x + 14 * g.y + p["wave_phase"])
    canvas.paint(cloth, (p["cloth_rgb"] * folds[:, None]).clamp(0, 1), "cloth", 0.15 - 0.2 * g.x**2)


def _necklace(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    drop = p["necklace_y"] - 0.9 * g.x**2 / 0.3
    chain = torch.maximum((g.y - drop).abs() - p["necklace_w"], g.x.abs() - 0.12)
    pearl = 0.85 + 0.3 * torch.sin(150 * g.x) ** 2
    pendant = ellipse(g.x, g.y - p["necklace_y"] - 0.016, 0.014, 0.018) + 1 - p["pendant"]
    shape = torch.minimum(chain, pendant)
    canvas.paint(shape, (p["necklace_rgb"] * pearl[:, None]).clamp(0, 1), "neck_l", 0.22 + 0 * g.x)


def _ears(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    for side, name, cover in ((1, "l_ear", "cover_l"), (-1, "r_ear", "cover_r")):
        x = side * g.x - p["face_w"] * 1.02 - 0.012 + 0.035 * side * p["yaw"].clamp(-1, 1)
        y = g.y - 0.545 + 0.25 * x
        ear = ellipse(x, y, 0.042, 0.088) + p[cover] * 0.2
        canvas.paint(ear, p["skin_rgb"] * 0.92, name, 0.14 + 0 * g.x)
        canvas.paint(ellipse(x + 0.004, y + 0.008, 0.018, 0.05) + p[cover] * 0.2,
                     p["skin_rgb"] * 0.68, opacity=0.8, soft=0.02)  # fmt: skip


def _head(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    head = _head_shape(g, p)
    dome = (1 - (g.x / 0.34) ** 2 - ((g.y - 0.5) / 0.62) ** 2).clamp(min=0.02).sqrt()
    canvas.paint(head, p["skin_rgb"], "skin", 0.06 + 0.34 * dome)
    cheek = ellipse(g.u.abs() - 0.145, g.v - 0.61, 0.07, 0.05)
    pink = p["skin_rgb"] * p["skin_rgb"].new_tensor([1.0, 0.74, 0.74])[:, None, None]
    blush = (0.15 + 0.55 * p["rosy_cheeks"] + 0.3 * p["heavy_makeup"]).clamp(max=0.75)
    canvas.paint(torch.maximum(cheek, head), pink, opacity=blush, soft=0.09)
    dark = p["skin_rgb"] * 0.62
    fold_x = 0.075 + 0.35 * (g.v - 0.64)  # nose to mouth
    fold = torch.maximum((g.u.abs() - fold_x).abs() - 0.004, (g.v - 0.70).abs() - 0.05)
    lines = (torch.sin(95 * g.v + 4 * g.u).abs() - 0.12) * 0.02  # forehead
    lines = torch.maximum(lines, torch.maximum((g.v - 0.315).abs() - 0.04, g.u.abs() - 0.13))
    canvas.paint(torch.minimum(fold, lines), dark, opacity=0.75 * p["wrinkles"], soft=0.008)
    canvas.paint(fold, dark, opacity=0.35 * p["smiling"], soft=0.012)


def _beard(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    head = _head_shape(g, p)
    edge = 0.66 + 0.9 * (0.22 - g.u.abs()).clamp(-0.1, 0.12)  # cheeks free, jaw covered
    beard = torch.maximum(head, edge - g.v)
    grain = 0.92 + 0.10 * torch.sin(190 * g.u + 40 * g.v) * torch.sin(150 * g.v)
    colour = (p["hair_rgb"] * 0.85 * grain[:, None]).clamp(0, 1)
    canvas.paint(beard, colour, opacity=p["beard_density"], soft=0.03)


def _mustache(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    y = g.v - 0.692 - 1.6 * g.u**2
    canvas.paint(ellipse(g.u, y, 0.085, 0.017, 2.5), p["hair_rgb"] * 0.85, opacity=0.85, soft=0.012)


def _lens(g: Geometry, p: Parameters) -> Tensor:
    x = g.u.abs() - p["eye_x"] - 0.004
    y = g.v - p["eye_y"] - 0.012
    return ellipse(x, y, p["lens_w"], p["lens_h"], p["lens_p"])


def _glasses(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    lens = _lens(g, p)
    bridge = torch.maximum((g.v - p["eye_y"] + 0.01).abs() - 0.007, g.u.abs() - 0.05)
    temple = torch.maximum(
        (g.v - p["eye_y"] + 0.012).abs() - 0.007, (g.u.abs() - 0.215).abs() - 0.045
    )
    frame = torch.minimum(torch.minimum(bridge, temple), lens.abs() - 0.010)
    clear = torch.maximum(lens, -frame)
    canvas.paint(clear, p["skin_rgb"] * 0.9 + 0.12, "eye_g", opacity=0.6)
    canvas.paint(frame, p["frame_rgb"], "eye_g", canvas.height + 0.01)


def _sunglasses(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    lens = _lens(g, p)
    glare = 0.18 * torch.exp(-(((g.u - g.v + 0.5) / 0.05) ** 2))[:, None]
    canvas.paint(lens, p["frame_rgb"] * 0.6 + glare, "eye_g", canvas.height + 0.008)


def _eyes_and_brows(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    dark = p["skin_rgb"] * 0.35
    for side, eye, brow in ((1, "l_eye", "l_brow"), (-1, "r_eye", "r_brow")):
        x = side * g.u - p["eye_x"]  # outwards from the nose is positive
        y = g.v - p["eye_y"] + p["eye_tilt"] * x
        arc = (1 - (x / p["eye_w"]) ** 2).clamp(min=0)
        upper = p["eye_h"] * 1.15 * arc
        lower = p["eye_h"] * 0.85 * arc
        almond = torch.maximum(torch.maximum(-upper - y, y - lower), x.abs() - p["eye_w"])
        socket = ellipse(x, y + 0.006, p["eye_w"] * 1.45, p["eye_h"] * 2.3)
        shadow = torch.where(p["heavy_makeup"][:, None] > 0, p["shadow_rgb"], p["skin_rgb"] * 0.72)
        canvas.paint(socket, shadow, opacity=0.35 + 0.3 * p["heavy_makeup"], soft=0.03)
        bag = torch.maximum(
            (y - p["eye_h"] * 2 - 0.004 + 4 * x**2).abs() - 0.004, x.abs() - p["eye_w"]
        )
        canvas.paint(bag, dark, opacity=0.6 * p["bags_under_eyes"], soft=0.010)
        canvas.paint(almond, almond.new_tensor([0.93, 0.92, 0.90])[None, :, None, None], eye)
        iris_x = side * g.u - p["eye_x"] - side * p["gaze"]
        iris = torch.maximum(ellipse(iris_x, y + 0.001, 0.0175, 0.0175), almond)
        canvas.paint(iris, p["iris_rgb"])
        canvas.paint(torch.maximum(ellipse(iris_x, y + 0.001, 0.008, 0.008), almond), dark * 0.2)
        glint = ellipse(g.u - side * p["eye_x"] - p["gaze"] + 0.005, y + 0.006, 0.0042, 0.0042)
        canvas.paint(torch.maximum(glint, almond), torch.ones_like(p["skin_rgb"]))
        lid = torch.maximum(
            (y + upper).abs() - 0.0045 - 0.003 * p["heavy_makeup"], x.abs() - p["eye_w"] * 1.06
        )
        canvas.paint(torch.maximum(lid, y - 0.3 * p["eye_h"]), dark * 0.5, opacity=0.9)

        bx = x - 0.004
        by = y + p["brow_y"] + 0.002 - p["brow_arch"] * (bx - 0.018) ** 2
        thick = p["brow_h"] * (1.3 - 6.0 * (bx + 0.02).clamp(min=0))
        stroke = torch.maximum(by.abs() - thick, bx.abs() - 0.066)
        canvas.paint(stroke, p["hair_rgb"] * 0.75 * (1 - 0.25 * p["bushy_eyebrows"][:, None]), brow,
                     opacity=0.88)  # fmt: skip


def _nose(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    tip = p["nose_y"]
    s = ((g.v - 0.445) / (tip - 0.445)).clamp(0, 1)  # 0 at the root, 1 at the base
    half = 0.026 + (p["nose_w"] - 0.012) * s**1.7
    rounded = tip + 0.008 - 0.25 * (g.u.abs() - 0.02).clamp(min=0)
    nose = torch.maximum(torch.maximum(g.u.abs() - half, 0.445 - g.v), g.v - rounded)
    bump = 0.10 * s**1.5 * (1 - (g.u / half.clamp(min=1e-3)) ** 2).clamp(min=0)
    canvas.paint(nose, p["skin_rgb"] * 0.975, "nose", canvas.height + bump)
    base = torch.maximum((g.v - tip - 0.004).abs() - 0.006, g.u.abs() - p["nose_w"] * 0.9)
    canvas.paint(base, p["skin_rgb"] * 0.6, opacity=0.6, soft=0.012)
    nostril = ellipse(g.u.abs() - p["nose_w"] * 0.45, g.v - tip + 0.002, 0.012, 0.007)
    canvas.paint(nostril, p["skin_rgb"] * 0.35, opacity=0.9)
    canvas.paint(ellipse(g.u + 0.006, g.v - tip + 0.035, 0.012, 0.02), p["skin_rgb"] * 0.5 + 0.5,
                 opacity=0.35, soft=0.03)  # fmt: skip


def _mouth(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    x = g.u / p["mouth_w"]
    arch = (1 - x**2).clamp(min=0)
    line = p["mouth_y"] - p["smile"] * (x**2).clamp(max=1.2) + 0.4 * p["smile"]
    gap = p["mouth_gap"] * arch
    ends = g.u.abs() - p["mouth_w"]
    bow = 1.3 - 0.36 * torch.exp(-((x / 0.16) ** 2))
    top = line - 0.35 * gap - p["lip_u"] * 1.25 * arch**0.75 * bow
    bottom = line + 0.65 * gap + p["lip_l"] * 1.6 * arch**0.8
    upper = torch.maximum(torch.maximum(top - g.v, g.v - line + 0.35 * gap), ends)
    lower = torch.maximum(torch.maximum(line + 0.65 * gap - g.v, g.v - bottom), ends)
    inside = torch.maximum(torch.maximum(line - 0.35 * gap - g.v, g.v - line - 0.65 * gap), ends)
    inside = inside + 0.02 * (1 - p["mouth_open"])
    dark = inside.new_tensor([0.30, 0.08, 0.10])[None, :, None, None]
    canvas.paint(inside, dark, "mouth")
    teeth = torch.maximum(inside, g.v - line - 0.15 * gap)
    canvas.paint(
        teeth, inside.new_tensor([0.95, 0.93, 0.90])[None, :, None, None], opacity=p["teeth"]
    )
    canvas.paint(upper, p["lip_rgb"] * 0.90, "u_lip", canvas.height + 0.02)
    canvas.paint(lower, p["lip_rgb"], "l_lip", canvas.height + 0.03)
    seam = torch.maximum((g.v - line).abs() - 0.0035, ends)
    canvas.paint(seam, p["lip_rgb"] * 0.45, opacity=0.9 * (1 - p["mouth_open"]))
    shine = ellipse(g.u + 0.02, g.v - line - 0.65 * gap - 0.4 * p["lip_l"], 0.02, 0.004)
    canvas.paint(
        shine, torch.ones_like(p["skin_rgb"]), opacity=0.15 + 0.4 * p["lipstick"], soft=0.01
    )


def _front_hair(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    hair = _hair_shape(g, p)
    x = g.x - p["hair_part"] * (1 - p["bangs"])
    fringe = 0.375 + 0.012 * torch.sin(90 * g.x + p["wave_phase"])
    swept = p["hairline"] + 0.9 * x**2 + 0.02 * torch.sin(9 * x + p["wave_phase"])
    top = torch.where(p["bangs"] > 0, fringe, swept)
    covered = torch.where(g.x > 0, p["cover_l"], p["cover_r"])
    # Covered ears: curtains run down beside the face. Free ears: hair ends at the sideburns.
    side = p["face_w"] * (0.93 - 0.06 * p["hair_volume"]) + 0.30 * (g.y - 0.62).clamp(min=0)
    side = torch.where(covered > 0, side, p["face_w"] * 0.93 + 2.0 * (g.y - 0.46).clamp(min=0))
    face = torch.maximum(g.x.abs() - side, top - g.y) - 0.5 * _waves(g, p)
    ends = torch.where(covered > 0, 0.62 + 0.40 * (p["hair_length"] - 0.5), 0.56)
    front = torch.maximum(torch.maximum(hair, -face), g.y - ends)
    front = front.masked_fill(p["bald"] > 0, 1.0)
    shadow = torch.maximum(front - 0.014, _head_shape(g, p))
    canvas.paint(shadow, p["skin_rgb"] * 0.6, opacity=0.45 * (1 - p["bald"]), soft=0.03)
    canvas.paint(
        front, _strands(g, p), "hair", 0.26 + 0.5 * (0.10 - g.x**2) - 0.2 * (g.y - 0.4) ** 2
    )


def _earrings(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    size = p["earring_size"]
    kind = p["earring_type"]
    glitter = (0.9 + 0.25 * torch.sin(140 * g.x) * torch.sin(140 * g.y))[:, None]
    for side in (1, -1):
        x = side * g.x - p["face_w"] * 1.02 - 0.014 + 0.035 * side * p["yaw"].clamp(-1, 1)
        y = g.y - 0.635
        stud = ellipse(x, y, 0.023 * size, 0.023 * size)
        hoop = ellipse(x, y - 0.055 * size, 0.042 * size, 0.058 * size).abs() - 0.0105
        drop = ellipse(x, y - 0.075 * size, 0.024 * size, 0.052 * size)
        hook = torch.maximum(x.abs() - 0.007, (y - 0.015).abs() - 0.02)
        ring = torch.where(
            kind < 0.5, stud, torch.where(kind < 1.5, hoop, torch.minimum(drop, hook))
        )
        hidden = (side * p["yaw"] > 0.75).float()  # the far ear of a turned head
        canvas.paint(
            ring + hidden, (p["earring_rgb"] * glitter).clamp(0, 1), "ear_r", 0.30 + 0 * g.x
        )


def _hat(canvas: Canvas, g: Geometry, p: Parameters) -> None:
    kind = p["hat_type"]
    rx = p["face_w"] + 0.07 + 0.02 * p["hair_volume"]
    dome = ellipse(g.x, g.y - p["hat_y"], rx, p["hat_y"] + 0.02, 2.5)
    crown = torch.maximum(dome, g.y - p["hat_y"] - 0.35 * g.x**2 * (kind < 1.5))
    reach = torch.where(kind < 0.5, rx * 0.95, torch.where(kind < 1.5, rx, rx * 1.42))
    thick = torch.where(kind < 0.5, 0.045, torch.where(kind < 1.5, 0.035, 0.042))
    brim = ellipse(g.x - 0.1 * p["yaw"] * (kind < 0.5), g.y - p["hat_y"] - 0.012, reach, thick, 2.5)
    band = 0.85 + 0.15 * torch.cos(p["hat_stripe"] * 22 * (g.y - p["hat_y"]))
    knit = 1 + 0.12 * torch.sin(110 * g.x) * ((kind > 0.5) & (kind < 1.5))
    colour = (p["hat_rgb"] * (band * knit)[:, None]).clamp(0, 1)
    shadow = ellipse(g.x, g.y - p["hat_y"] - 0.05, rx, 0.04)
    canvas.paint(
        torch.maximum(shadow, _head_shape(g, p)), p["skin_rgb"] * 0.5, opacity=0.5, soft=0.04
    )
    canvas.paint(crown, colour, "hat", 0.30 + 0.6 * (0.13 - g.x**2) - 0.3 * (g.y - 0.2) ** 2)
    canvas.paint(brim, colour * 0.82, "hat", 0.42 - 0.3 * g.x**2 + 0 * g.y)


def _shade(canvas: Canvas, p: Parameters, look: str) -> Rendered:
    """Lambert shading of the albedo by the height field, a tint, and the dense maps."""
    depth = canvas.height
    slope = 0.5 / (4 * canvas.pixel)  # central differences per image side, relief halved
    pad = torch.nn.functional.pad(depth[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx = ((pad[:, 1:-1, 2:] - pad[:, 1:-1, :-2]) * slope * 2).clamp(-1.5, 1.5)
    dy = ((pad[:, 2:, 1:-1] - pad[:, :-2, 1:-1]) * slope * 2).clamp(-1.5, 1.5)
    normals = torch.stack([-dx, -dy, torch.ones_like(dx)], 1)
    normals = normals / normals.norm(dim=1, keepdim=True)
    angle = p["light_angle"]
    tilt = p["light_tilt"]
    light = torch.stack([torch.sin(angle) * tilt, -0.5 * torch.cos(angle) * tilt,
                         1.15 - 0.5 * tilt], 1)  # fmt: skip
    light = light / light.norm(dim=1, keepdim=True)
    diffuse = (normals * light).sum(1, keepdim=True).clamp(min=0)
    ambient = p["ambient"][:, None]
    if look == "second":  # harder light with a coloured rim
        diffuse = (diffuse * 1.3 - 0.15).clamp(0, 1.1)
        ambient = ambient - 0.12
    lit = ambient + (1.12 - ambient) * diffuse
    figure = (canvas.label > 0)[:, None]
    shade = torch.where(figure, lit, torch.ones_like(lit))
    tint = torch.cat([1 + p["warmth"], torch.ones_like(p["warmth"]), 1 - p["warmth"]], 1)
    image = (canvas.rgb * shade * tint.reshape(-1, 3, 1, 1)).clamp(0, 1)
    if look == "second":
        rim = (1 - normals[:, 2:3]).clamp(0, 1) ** 2 * figure
        image = (image + 0.35 * rim * p["bg_b"]).clamp(0, 1)
    near = (depth / math.sqrt(0.3)).clamp(0, 1)[:, None]
    return Rendered(
        image * 2 - 1, canvas.label, canvas.rgb.clamp(0, 1) * 2 - 1, normals, near * 2 - 1
    )
