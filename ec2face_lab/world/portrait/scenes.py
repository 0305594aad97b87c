"""Procedural portraits: what is in each, and what of it can be seen.

A `Scenes` table holds every geometric and photometric parameter of a batch of faces, a function of
(seed, index, look); `rendering.render` turns it into images and 19-class label maps of any size.
Attribute frequencies and pixel shares follow the long tail measured on 1,000 pairs of CelebAMask-HQ
(share of images: earring 23.4 %, necklace 4.5 %, glasses 5.8 %, hat 5.3 %, ears 48-53 %, open mouth
56 %). Lengths are in units of the image side, y runs down. What a caption may say is either clearly
there or clearly absent: between a big nose and another lies a gap.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...prepare.captions import HAIR_WORDS
from .. import scenes
from ..scenes import FLAGS, FREQUENCIES, Values
from .palettes import (
    BACKDROPS,
    BRIGHT_FRAMES,
    CLOTH,
    FRAMES,
    HAIR,
    IRIS,
    LIPSTICK,
    METAL,
    SKIN,
    TINTS,
    along,
    pick,
)
from .uniforms import Uniforms

LOOKS = ("first", "second")


class Scenes(scenes.Scenes):
    """Parameters of a batch of portraits, and what of them can be seen."""

    @property
    def facts(self) -> dict[str, np.ndarray]:
        """What can be seen: bool `(b,)` for each flag, int64 for the words of hair.

        A word is an index into `HAIR_WORDS`, or -1 where it cannot be seen.
        """
        v = self.values
        seen = {name: v[name] > 0 for name in FLAGS}
        hat = seen["hat"]
        for name in ("bald", "bangs", "receding_hairline"):
            seen[name] = seen[name] & ~hat
        for name in ("narrow_eyes", "bags_under_eyes", "heavy_makeup"):
            seen[name] = seen[name] & ~(v["sunglasses"] > 0)
        no_hair = v["bald"] > 0
        covered = hat & (v["hair_length"] == 0)
        hidden = {"hair_colour": no_hair, "hair_style": no_hair | covered, "hair_length": no_hair}
        for name, where in hidden.items():
            seen[name] = np.where(where, -1, v[name]).astype(np.int64)
        return seen

    @property
    def attributes(self) -> list[dict[str, bool | str]]:
        """What can be seen of each face, in the words that `captions.captions` reads.

        Every face has every key: a flag is false and a word is "" where the fact cannot be seen.
        """
        columns: list[list[bool] | list[str]] = []
        facts = self.facts
        for name, seen in facts.items():
            if name in HAIR_WORDS:
                words = np.array([*HAIR_WORDS[name], ""])  # -1 is the last
                columns.append(words[seen].tolist())
            else:
                columns.append(seen.tolist())
        return [dict(zip(facts, row, strict=True)) for row in zip(*columns, strict=True)]


def sample_scenes(
    seed: int, indices: np.ndarray | range | list[int], look: str = "first", frequencies: str = ""
) -> Scenes:
    """Sample the parameters of faces; a face is a function of (seed, index, look).

    Args:
        seed: of all faces.
        indices: numbers of the faces.
        look: `first` or `second` (other light, skin shading, backgrounds).
        frequencies: of the accessories, `natural` (long tail), `second` or `balanced`; by default
            those of the look.

    Raises:
        ValueError: there is no such look.
    """
    if look not in LOOKS:
        raise ValueError(f"look {look!r}: expected 'first' or 'second'")
    frequency = FREQUENCIES[frequencies or {"first": "natural", "second": "second"}[look]]
    d = Uniforms(seed, LOOKS.index(look), np.asarray(indices))
    v: Values = {}
    _person(v, d, frequency)
    _pose(v, d)
    _hair(v, d)
    _hair_shape(v, d)
    _eyes(v, d)
    _nose_and_mouth(v, d)
    _skin(v, d)
    _accessories(v, d, frequency)
    _jewellery(v, d)
    _clothes(v, d)
    _backdrop(v, d, look)
    _light(v, d, look)
    return Scenes(look, v)


def _person(v: Values, d: Uniforms, frequency: dict[str, Any]) -> None:
    """Gender, age, skin tone and shape of the head."""
    v["male"] = d.flag(frequency["male"])
    v["young"] = d.flag(0.78)
    v["pale_skin"] = d.flag(0.09)
    v["tone"] = d.uniform() ** 1.3
    v["dark"] = np.clip((v["tone"] - 0.4) / 0.3, 0, 1) * (1 - v["pale_skin"])
    v["chubby"] = d.flag(0.1)
    v["oval_face"] = d.flag(0.3) * (1 - v["chubby"])


def _pose(v: Values, d: Uniforms) -> None:
    """Pose and outline of the head."""
    male = v["male"]
    chubby = v["chubby"]
    oval = v["oval_face"]
    v["roll"] = d.uniform(-0.1, 0.1)
    v["yaw"] = d.uniform(-1, 1) * d.uniform() ** 0.5
    v["pitch"] = d.uniform(-0.015, 0.015)
    v["shift_x"] = d.uniform(-0.012, 0.012)
    v["scale"] = d.uniform(1.03, 1.11)
    v["shift_y"] = d.uniform(-0.010, 0.012) - 0.35 * (v["scale"] - 1)
    v["face_w"] = d.uniform(0.236, 0.246) + 0.026 * chubby - 0.026 * oval + 0.006 * male
    v["head_top"] = d.uniform(0.10, 0.13)
    v["cheek_y"] = d.uniform(0.49, 0.51) + 0.03 * chubby
    v["chin_y"] = d.uniform(0.887, 0.902) + 0.012 * oval - 0.005 * chubby
    v["jaw_x"] = d.uniform(1.75, 1.9) + 0.35 * male + 0.4 * chubby - 0.1 * oval
    v["jaw_y"] = d.uniform(2.1, 2.3) + 0.4 * male + 0.3 * chubby - 0.15 * oval


def _hair(v: Values, d: Uniforms) -> None:
    """Hair: whether there is any, its colour, style and length."""
    male = v["male"]
    old = 1 - v["young"]
    v["bald"] = d.flag(male * (0.05 + 0.13 * old))
    hair = 1 - v["bald"]
    dark = v["dark"]
    blond = 0.28 - 0.08 * old - 0.22 * dark
    red = 0.11 - 0.05 * old - 0.06 * dark
    v["hair_colour"] = d.choice(0.19 + 0.30 * dark, 0.36 - 0.1 * old, blond, red, 0.06)
    v["hair_colour"] = np.where(d.flag(0.45 * old) > 0, 4.0, v["hair_colour"])
    base = pick(HAIR, v["hair_colour"])
    v["hair_rgb"] = np.clip(base * d.uniform(0.86, 1.12)[:, None] + d.colour(-0.012, 0.012), 0, 1)
    v["hair_style"] = d.choice(0.45, 0.35, 0.2)
    length = np.where(male > 0, d.choice(0.9, 0.07, 0.03), d.choice(0.08, 0.27, 0.65))
    v["hair_length"] = length * hair
    v["bangs"] = d.flag(np.where(male > 0, 0.1, 0.24)) * hair
    v["receding_hairline"] = d.flag(male * (0.1 + 0.3 * old)) * hair * (1 - v["bangs"])


def _hair_shape(v: Values, d: Uniforms) -> None:
    """The outline of the hair, and which ears it covers."""
    hair = 1 - v["bald"]
    style = v["hair_style"]
    v["hair_volume"] = d.uniform(0.0, 1.0)
    parted = d.flag(0.7) * (v["hair_length"] > 0)
    v["hair_parted"] = np.maximum(parted, d.flag(0.25) * (v["hair_length"] == 0))
    side = np.where(d.flag(0.5) > 0, 1.0, -1.0)
    v["hair_part"] = side * np.where(d.flag(0.4) > 0, d.uniform(0.0, 0.02), d.uniform(0.06, 0.12))
    v["hairline"] = d.uniform(0.212, 0.245) - 0.065 * v["receding_hairline"]
    v["wave_phase"] = d.uniform(0, 6.28)
    v["strand"] = d.uniform(0.8, 1.2)
    wavy = style == 1
    curly = style == 2
    v["wave"] = wavy * d.uniform(0.011, 0.015)
    v["curl"] = curly * d.uniform(0.9, 1.1)
    cover = np.array([0.08, 0.55, 0.74])[v["hair_length"].astype(int)] * hair
    v["cover_l"] = d.flag(cover)  # hair over the ear
    v["cover_r"] = np.where(d.flag(0.75) > 0, v["cover_l"], d.flag(cover))


def _eyes(v: Values, d: Uniforms) -> None:
    """Eyes and brows."""
    male = v["male"]
    v["eye_x"] = d.uniform(0.102, 0.112)
    v["eye_y"] = d.uniform(0.465, 0.48)
    v["narrow_eyes"] = d.flag(0.12)
    v["eye_w"] = d.uniform(0.050, 0.055)
    v["eye_h"] = d.uniform(0.0262, 0.029) - 0.0142 * v["narrow_eyes"]
    v["eye_tilt"] = d.uniform(-0.02, 0.16)
    dark = v["dark"]
    light = 1 - dark
    v["iris_rgb"] = pick(IRIS, d.choice(0.25 + 0.5 * dark, 0.25, 0.23 * light, 0.14 * light, 0.13))
    v["gaze"] = d.uniform(-0.007, 0.007)
    v["bushy_eyebrows"] = d.flag(np.where(male > 0, 0.3, 0.06))
    v["arched_eyebrows"] = d.flag(np.where(male > 0, 0.06, 0.4))
    v["brow_y"] = d.uniform(0.064, 0.074) + 0.004 * v["arched_eyebrows"]
    v["brow_h"] = d.uniform(0.0080, 0.0098) + 0.0105 * v["bushy_eyebrows"] + 0.002 * male
    v["brow_arch"] = d.uniform(0.0, 0.15) + 0.85 * v["arched_eyebrows"]


def _nose_and_mouth(v: Values, d: Uniforms) -> None:
    """Nose, mouth and smile."""
    male = v["male"]
    v["big_nose"] = d.flag(np.where(male > 0, 0.38, 0.1))
    v["nose_w"] = d.uniform(0.042, 0.047) + 0.026 * v["big_nose"]
    v["nose_y"] = d.uniform(0.632, 0.645) + 0.018 * v["big_nose"]
    smiling = d.flag(np.where(male > 0, 0.4, 0.53))
    v["smiling"] = smiling
    v["mouth_open"] = d.flag(np.where(smiling > 0, 0.8, 0.31))
    v["mouth_gap"] = v["mouth_open"] * d.uniform(0.026, 0.042)
    v["mouth_w"] = d.uniform(0.070, 0.080) + 0.026 * smiling
    v["mouth_y"] = d.uniform(0.732, 0.744)
    v["smile"] = np.where(smiling > 0, d.uniform(0.026, 0.036), d.uniform(-0.006, 0.002))
    v["big_lips"] = d.flag(np.where(male > 0, 0.12, 0.35))
    v["lip_u"] = d.uniform(0.0135, 0.016) + 0.0125 * v["big_lips"] - 0.002 * male
    v["lip_l"] = d.uniform(0.020, 0.023) + 0.0160 * v["big_lips"] - 0.002 * male
    v["teeth"] = np.maximum(smiling, d.flag(0.5))


def _skin(v: Values, d: Uniforms) -> None:
    """Make-up, beard, wrinkles and the colours of skin and lips."""
    male = v["male"]
    young = v["young"]
    old = 1 - young
    v["heavy_makeup"] = d.flag((1 - male) * 0.55 * (0.4 + 0.6 * young))
    lipstick = np.maximum(v["heavy_makeup"], d.flag((1 - male) * 0.3))
    v["rosy_cheeks"] = d.flag((1 - male) * 0.16)
    v["bags_under_eyes"] = d.flag(0.12 + 0.2 * male + 0.15 * old)
    v["beard"] = d.flag(male * 0.3)
    v["mustache"] = np.maximum(v["beard"] * d.flag(0.7), d.flag(male * 0.09))
    v["lipstick"] = lipstick * (1 - v["beard"])
    v["beard_density"] = d.uniform(0.7, 0.92)
    v["wrinkles"] = old * d.uniform(0.8, 1.0)
    pale = np.array([0.948, 0.856, 0.808])
    skin = np.where(v["pale_skin"][:, None] > 0, pale, along(SKIN, v["tone"]))
    v["skin_rgb"] = np.clip(skin + d.uniform(-0.012, 0.012)[:, None] + d.colour(-0.01, 0.01), 0, 1)
    natural = v["skin_rgb"] * np.where(male[:, None] > 0, [0.86, 0.70, 0.66], [0.90, 0.66, 0.64])
    natural = natural + v["dark"][:, None] * [0.06, 0.01, 0.025]  # or they are lost on dark skin
    made_up = pick(LIPSTICK, d.choice(0.3, 0.25, 0.25, 0.2))
    v["lip_rgb"] = np.where(v["lipstick"][:, None] > 0, made_up, natural)
    v["shadow_rgb"] = pick(TINTS, d.choice(0.25, 0.25, 0.25, 0.25))


def _accessories(v: Values, d: Uniforms, frequency: dict[str, Any]) -> None:
    """Which accessories there are; eyeglasses and hat."""
    male = v["male"]
    for name in ("earrings", "necklace", "eyeglasses", "hat"):
        women, men = frequency[name]
        v[name] = d.flag(np.where(male > 0, men, women))
    v["hair_volume"] = v["hair_volume"] * (1 - 0.9 * v["hat"])
    v["sunglasses"] = d.flag(0.35) * v["eyeglasses"]
    v["lens_w"] = d.uniform(0.080, 0.090)
    v["lens_h"] = d.uniform(0.056, 0.072)
    v["lens_power"] = d.uniform(2.0, 4.0)
    v["frame_w"] = d.uniform(0.006, 0.009)
    frame = d.choice(0.4, 0.2, 0.15, 0.15, 0.1)
    seen = (v["dark"] < 0.5) | (v["sunglasses"] > 0)  # dark frames are lost on dark skin
    v["frame_rgb"] = np.where(seen[:, None], pick(FRAMES, frame), pick(BRIGHT_FRAMES, frame))
    v["hat_type"] = d.choice(0.4, 0.3, 0.3)  # cap, beanie, brimmed
    v["hat_y"] = d.uniform(0.245, 0.285)
    v["hat_rgb"] = pick(CLOTH, np.floor(d.uniform(0, len(CLOTH))))
    v["band_rgb"] = pick(CLOTH, np.floor(d.uniform(0, len(CLOTH)))) * 0.6


def _jewellery(v: Values, d: Uniforms) -> None:
    """Earrings and necklace."""
    v["earring_type"] = d.choice(0.22, 0.36, 0.22, 0.2)  # stud, hoop, drop, hanging pearl
    v["earring_size"] = d.uniform(0.8, 1.2)
    v["earring_rgb"] = pick(METAL, d.choice(0.4, 0.25, 0.1, 0.13, 0.12))
    v["necklace_type"] = d.choice(0.35, 0.3, 0.35)  # chain, pearls, pendant
    v["necklace_y"] = d.uniform(0.925, 0.955)
    v["necklace_w"] = d.uniform(0.0060, 0.0080)
    pearls = pick(((244, 238, 226),), np.zeros(len(v["male"])))
    metal = pick(METAL, d.choice(0.5, 0.3, 0.08, 0.12))
    v["necklace_rgb"] = np.where(v["necklace_type"][:, None] == 1, pearls, metal)


def _clothes(v: Values, d: Uniforms) -> None:
    """Clothes."""
    v["shoulder_y"] = d.uniform(0.85, 1.02)
    v["neckline"] = d.uniform(0.0, 1.0)
    v["collar"] = d.choice(0.45, 0.3, 0.25)  # round, V, shirt
    v["cloth_rgb"] = pick(CLOTH, np.floor(d.uniform(0, len(CLOTH))))
    v["cloth_rgb"] = np.clip(v["cloth_rgb"] + d.uniform(-0.04, 0.04)[:, None], 0, 1)


def _backdrop(v: Values, d: Uniforms, look: str) -> None:
    """The background, out of focus."""
    pairs = np.array(BACKDROPS[look]) / 255  # (n, 2, 3)
    chosen = pairs[np.floor(d.uniform(0, len(pairs))).astype(int)]
    jitter = d.colour(-0.03, 0.03)
    swap = d.flag(0.5)[:, None] > 0
    v["bg_a"] = np.clip(np.where(swap, chosen[:, 1], chosen[:, 0]) + jitter, 0, 1)
    v["bg_b"] = np.clip(np.where(swap, chosen[:, 0], chosen[:, 1]) + jitter, 0, 1)
    v["bg_kind"] = d.choice(0.4, 0.3, 0.3)  # studio, room, lights
    v["bg_angle"] = d.uniform(0, 6.28)
    v["bg_freq"] = d.uniform(5, 9)
    v["bg_x"] = d.uniform(-0.3, 0.3)


def _light(v: Values, d: Uniforms, look: str) -> None:
    """A key light from a side and above, and the light that comes from everywhere."""
    second = look == "second"
    x = d.uniform(-0.75, 0.75) * (1.25 if second else 1.0)
    y = d.uniform(-0.55, -0.25)
    length = np.sqrt(x**2 + y**2 + 0.8**2)
    v["light_x"] = x / length
    v["light_y"] = y / length
    v["light_z"] = 0.8 / length
    v["ambient"] = d.uniform(0.36, 0.46) - (0.14 if second else 0.0)
    v["key"] = 1.07 - v["ambient"] + d.uniform(-0.03, 0.03)
    v["warmth"] = d.uniform(-0.02, 0.03) - (0.03 if second else 0.0)
    v["rim"] = d.uniform(0.8, 1.6) * second
