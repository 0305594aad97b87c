"""Procedural faces: the miniature's counterpart of MM-CelebA-HQ and, with a second look, MM-FFHQ.

A `Scenes` table holds every geometric and photometric parameter of a batch of faces, a function of
(seed, index, look); `rendering.render` turns it into images and 19-class label maps of any size.
Attribute frequencies and pixel shares follow the long tail measured on 1,000 pairs of CelebAMask-HQ
(share of images: earring 23.4 %, necklace 4.5 %, glasses 5.8 %, hat 5.3 %, ears 48-53 %, open mouth
56 %). Lengths are in units of the image side, y runs down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..prepare.captions import HAIR_COLOURS, HAIR_LENGTHS, HAIR_STYLES

_COLUMNS = 160  # uniform numbers per face; more than are used

SKIN_TONES = (
    (255, 226, 202), (242, 201, 164), (222, 172, 128), (190, 134, 92), (136, 86, 56), (92, 58, 42),
)  # fmt: skip

HAIR_RGB = ((30, 26, 28), (92, 60, 38), (216, 180, 112), (158, 74, 36), (172, 170, 168))

FLAGS = (
    "male", "young", "bald", "bangs", "receding_hairline", "smiling", "mouth_open", "eyeglasses",
    "hat", "earrings", "necklace", "beard", "mustache", "lipstick", "heavy_makeup",
    "arched_eyebrows", "bushy_eyebrows", "big_nose", "big_lips", "narrow_eyes", "bags_under_eyes",
    "pale_skin", "rosy_cheeks", "chubby", "oval_face",
)  # fmt: skip

# Probabilities of the accessories: (women, men). Balanced ones train the perception models.
FREQUENCIES = {
    "natural": {"earrings": (0.355, 0.03), "necklace": (0.066, 0.01), "eyeglasses": (0.042, 0.086),
                "hat": (0.042, 0.072), "male": 0.37},
    "second": {"earrings": (0.34, 0.05), "necklace": (0.10, 0.01), "eyeglasses": (0.11, 0.11),
               "hat": (0.08, 0.08), "male": 0.06},
    "balanced": {"earrings": (0.6, 0.4), "necklace": (0.5, 0.4), "eyeglasses": (0.25, 0.25),
                 "hat": (0.22, 0.22), "male": 0.45},
}  # fmt: skip


Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scenes:
    """Parameters of a batch of faces: name -> float64 array `(b,)` or `(b, 3)` for colours."""

    look: str  # first | second
    values: Values

    def __len__(self) -> int:
        return len(self.values["male"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    @property
    def attributes(self) -> list[dict[str, bool | str]]:
        """What is visible in each face, in the words that `captions.captions` reads."""
        v = self.values
        rows = []
        for i in range(len(self)):
            row: dict[str, bool | str] = {name: bool(v[name][i]) for name in FLAGS}
            row["hair_colour"] = HAIR_COLOURS[int(v["hair_colour"][i])]
            row["hair_style"] = HAIR_STYLES[int(v["hair_style"][i])]
            row["hair_length"] = HAIR_LENGTHS[int(v["hair_length"][i])]
            rows.append(row)
        return rows


class _Uniforms:
    """Hands out columns of a `(b, k)` table of uniform numbers in a fixed order."""

    def __init__(self, uniforms: np.ndarray) -> None:
        self.columns = iter(uniforms.T)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return low + (high - low) * next(self.columns)

    def flag(self, probability: float | np.ndarray) -> np.ndarray:
        return (next(self.columns) < probability).astype(float)

    def choice(self, *probabilities: float | np.ndarray) -> np.ndarray:
        """Index sampled with the given probabilities; the last takes what is left."""
        u = next(self.columns)
        total = 0.0
        index = 0.0
        for p in probabilities[:-1]:
            total = total + p
            index = index + (u >= total)
        return np.asarray(index, dtype=float)

    def colour(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return np.stack([self.uniform(low, high) for _ in range(3)], -1)


def _tone(t: np.ndarray) -> np.ndarray:
    """Skin colour `(b, 3)` in [0, 1] along the tones, t in [0, 1] from pale to dark."""
    tones = np.array(SKIN_TONES) / 255
    grid = np.linspace(0, 1, len(tones))
    return np.stack([np.interp(t, grid, tones[:, c]) for c in range(3)], -1)


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
    """
    if look not in ("first", "second"):
        raise ValueError(f"look {look!r}: expected 'first' or 'second'")
    frequency = FREQUENCIES[frequencies or {"first": "natural", "second": "second"}[look]]
    table = [
        np.random.default_rng((seed, int(i), look == "second")).random(_COLUMNS) for i in indices
    ]
    d = _Uniforms(np.stack(table))
    v: Values = {}
    _person(v, d, frequency)
    _pose(v, d)
    _hair(v, d)
    _features(v, d)
    _skin(v, d)
    _accessories(v, d, frequency)
    _surroundings(v, d)
    v["lipstick"] = v["lipstick"] * (1 - v["beard"])
    return Scenes(look, v)


def _person(v: Values, d: _Uniforms, frequency: dict[str, Any]) -> None:
    """Gender, age, skin tone and shape of the head."""
    v["male"] = d.flag(frequency["male"])
    v["young"] = d.flag(0.78)
    v["tone"] = d.uniform() ** 1.4
    v["pale_skin"] = (v["tone"] < 0.06).astype(float)
    v["chubby"] = d.flag(0.1)
    v["oval_face"] = d.flag(0.3) * (1 - v["chubby"])


def _pose(v: Values, d: _Uniforms) -> None:
    """Pose and outline of the head."""
    male = v["male"]
    chubby = v["chubby"]
    v["roll"] = d.uniform(-0.1, 0.1)
    v["yaw"] = d.uniform(-1, 1) * np.abs(d.uniform()) ** 0.5
    v["pitch"] = d.uniform(-0.02, 0.02)
    v["shift_x"] = d.uniform(-0.012, 0.012)
    v["shift_y"] = d.uniform(-0.01, 0.015)
    v["scale"] = d.uniform(0.96, 1.05)
    v["face_w"] = d.uniform(0.235, 0.262) + 0.022 * chubby - 0.012 * v["oval_face"] + 0.006 * male
    v["face_h"] = d.uniform(0.395, 0.42)
    v["jaw"] = d.uniform(1.9, 2.2) + 0.3 * male + 0.25 * chubby
    v["head_top"] = d.uniform(0.10, 0.13)


def _hair(v: Values, d: _Uniforms) -> None:
    """Hair, and which ears it covers."""
    male = v["male"]
    old = 1 - v["young"]
    v["bald"] = d.flag(male * (0.05 + 0.13 * old))
    hair = 1 - v["bald"]
    v["hair_colour"] = d.choice(0.27, 0.36 - 0.1 * old, 0.22 - 0.08 * old, 0.09 - 0.05 * old, 0.06)
    v["hair_colour"] = np.where(d.flag(0.45 * old) > 0, 4.0, v["hair_colour"])
    base = np.array(HAIR_RGB)[v["hair_colour"].astype(int)] / 255
    v["hair_rgb"] = np.clip(
        base * (0.82 + 0.36 * d.uniform()[:, None]) + d.colour(-0.02, 0.02), 0, 1
    )
    v["hair_style"] = d.choice(0.45, 0.35, 0.2)
    v["hair_length"] = (
        np.where(male > 0, d.choice(0.9, 0.07, 0.03), d.choice(0.08, 0.27, 0.65)) * hair
    )
    v["bangs"] = d.flag(np.where(male > 0, 0.1, 0.24)) * hair
    v["receding_hairline"] = d.flag(male * (0.1 + 0.3 * old)) * hair * (1 - v["bangs"])
    v["hair_volume"] = d.uniform(0.0, 1.0)
    v["hair_part"] = d.uniform(-0.12, 0.12)
    v["hairline"] = d.uniform(0.19, 0.245) - 0.05 * v["receding_hairline"]
    v["wave_phase"] = d.uniform(0, 6.28)
    v["strand"] = d.uniform(0.7, 1.3)
    cover = np.array([0.08, 0.55, 0.74])[v["hair_length"].astype(int)] * hair
    v["cover_l"] = d.flag(cover)  # hair over the ear
    v["cover_r"] = np.where(d.flag(0.75) > 0, v["cover_l"], d.flag(cover))


def _features(v: Values, d: _Uniforms) -> None:
    """Eyes, brows, nose and mouth."""
    male = v["male"]
    v["eye_x"] = d.uniform(0.098, 0.112)
    v["eye_y"] = d.uniform(0.46, 0.48)
    v["narrow_eyes"] = d.flag(0.12)
    v["eye_w"] = d.uniform(0.040, 0.047)
    v["eye_h"] = d.uniform(0.018, 0.024) - 0.007 * v["narrow_eyes"]
    v["eye_tilt"] = d.uniform(-0.1, 0.16)
    eyes = (
        np.array([(70, 42, 26), (92, 62, 36), (80, 110, 150), (86, 120, 86), (110, 112, 116)]) / 255
    )
    v["iris_rgb"] = eyes[d.choice(0.4, 0.22, 0.2, 0.1, 0.08).astype(int)]
    v["gaze"] = d.uniform(-0.008, 0.008)
    v["bushy_eyebrows"] = d.flag(np.where(male > 0, 0.3, 0.06))
    v["arched_eyebrows"] = d.flag(np.where(male > 0, 0.06, 0.4))
    v["brow_y"] = d.uniform(0.058, 0.075)
    v["brow_h"] = d.uniform(0.010, 0.014) + 0.006 * v["bushy_eyebrows"] + 0.002 * male
    v["brow_arch"] = d.uniform(0.0, 2.0) + 4.5 * v["arched_eyebrows"]
    v["big_nose"] = d.flag(np.where(male > 0, 0.38, 0.1))
    v["nose_w"] = d.uniform(0.047, 0.056) + 0.013 * v["big_nose"]
    v["nose_y"] = d.uniform(0.645, 0.665) + 0.008 * v["big_nose"]
    smiling = d.flag(np.where(male > 0, 0.4, 0.53))
    v["smiling"] = smiling
    v["mouth_open"] = d.flag(np.where(smiling > 0, 0.8, 0.31))
    v["mouth_gap"] = v["mouth_open"] * d.uniform(0.022, 0.046)
    v["mouth_w"] = d.uniform(0.072, 0.086) + 0.017 * smiling
    v["mouth_y"] = d.uniform(0.728, 0.742)
    v["smile"] = np.where(smiling > 0, d.uniform(0.018, 0.034), d.uniform(-0.008, 0.005))
    v["big_lips"] = d.flag(np.where(male > 0, 0.12, 0.35))
    v["lip_u"] = d.uniform(0.015, 0.020) + 0.007 * v["big_lips"]
    v["lip_l"] = d.uniform(0.023, 0.029) + 0.010 * v["big_lips"]
    v["teeth"] = np.maximum(smiling, d.flag(0.5))


def _skin(v: Values, d: _Uniforms) -> None:
    """Make-up, beard, wrinkles and the colours of skin and lips."""
    male = v["male"]
    young = v["young"]
    tone = v["tone"]
    old = 1 - v["young"]
    v["heavy_makeup"] = d.flag((1 - male) * 0.55 * (0.4 + 0.6 * young))
    v["lipstick"] = np.maximum(v["heavy_makeup"], d.flag((1 - male) * 0.3))
    v["rosy_cheeks"] = d.flag((1 - male) * 0.16)
    v["bags_under_eyes"] = d.flag(0.12 + 0.2 * male + 0.15 * old)
    v["beard"] = d.flag(male * 0.3)
    v["mustache"] = np.maximum(v["beard"] * d.flag(0.7), d.flag(male * 0.09))
    v["beard_density"] = d.uniform(0.45, 0.9)
    v["wrinkles"] = old * d.uniform(0.5, 1.0)
    v["skin_rgb"] = np.clip(_tone(tone) + d.colour(-0.02, 0.02), 0, 1)
    reds = np.array([(196, 48, 60), (176, 30, 70), (214, 90, 110), (140, 28, 40)]) / 255
    lipstick = reds[d.choice(0.35, 0.2, 0.3, 0.15).astype(int)]
    natural = v["skin_rgb"] * np.array([0.86, 0.62, 0.6])
    v["lip_rgb"] = np.where(v["lipstick"][:, None] > 0, lipstick, natural)
    v["shadow_rgb"] = d.colour(0.15, 0.5)


def _accessories(v: Values, d: _Uniforms, frequency: dict[str, Any]) -> None:
    """Earrings, necklace, eyeglasses and hat."""
    male = v["male"]
    for name in ("earrings", "necklace", "eyeglasses", "hat"):
        women, men = frequency[name]
        v[name] = d.flag(np.where(male > 0, men, women))
    v["hair_volume"] = v["hair_volume"] * (1 - 0.9 * v["hat"])
    metals = (
        np.array([(226, 190, 90), (214, 218, 226), (186, 62, 88), (52, 132, 148), (244, 240, 232)])
        / 255
    )
    v["earring_type"] = d.choice(0.2, 0.4, 0.4)  # stud, hoop, drop
    v["earring_size"] = d.uniform(0.75, 1.25)
    v["earring_rgb"] = metals[d.choice(0.4, 0.25, 0.12, 0.11, 0.12).astype(int)]
    v["necklace_y"] = d.uniform(0.925, 0.955)
    v["necklace_w"] = d.uniform(0.0065, 0.0090)
    v["pendant"] = d.flag(0.5)
    v["necklace_rgb"] = metals[d.choice(0.4, 0.25, 0.1, 0.1, 0.15).astype(int)]
    v["sunglasses"] = d.flag(0.35) * v["eyeglasses"]
    v["lens_w"] = d.uniform(0.078, 0.092)
    v["lens_h"] = d.uniform(0.052, 0.074)
    v["lens_p"] = d.uniform(2.0, 4.0)
    v["frame_rgb"] = d.colour(0.02, 0.3)
    v["hat_type"] = d.choice(0.4, 0.3, 0.3)  # cap, beanie, brimmed
    v["hat_y"] = d.uniform(0.235, 0.285)
    v["hat_rgb"] = d.colour(0.05, 0.9)
    v["hat_stripe"] = d.uniform(0.5, 1.4)


def _surroundings(v: Values, d: _Uniforms) -> None:
    """Clothes, background and light."""
    v["shoulder_y"] = d.uniform(0.835, 1.055)
    v["neckline"] = d.uniform(0.0, 1.0)
    v["cloth_rgb"] = d.colour(0.05, 0.95)
    v["bg_a"] = d.colour(0.08, 0.92)
    v["bg_b"] = d.colour(0.08, 0.92)
    v["bg_angle"] = d.uniform(0, 6.28)
    v["bg_freq"] = d.uniform(2, 9)
    v["bg_kind"] = d.choice(0.4, 0.35, 0.25)
    v["light_angle"] = d.uniform(-1.5, 1.5)
    v["light_tilt"] = d.uniform(0.35, 0.9)
    v["ambient"] = d.uniform(0.5, 0.68)
    v["warmth"] = d.uniform(-0.05, 0.07)
