"""Earrings, a necklace, glasses and a hat, placed by the geometry of a label map.

    with_earrings = stamp(label_map, "earrings")

They are computed here and not in the browser, so that a test can compare them with masks and the
study of edits (`study/editing.py`) uses the same ones. Lengths are in units of the distance between
the eyes, so a stamp has the same shape in masks of every size. Coordinates (u, v) are those of the
face: the origin lies between the eyes, u runs along them to the right of the picture and v down.
Proportions follow the procedural faces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ec2face_core.attributes import CLASS_ID
from ec2face_core.io.report import DataError

FACE = (
    "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip",
)  # fmt: skip
FEATURES = FACE[3:]  # eyes, brows and mouth, which nothing covers
BROW_TO_EYE = 0.35  # how far the eyes lie below the brows
EYE_TO_LOBE = 0.8  # how far the lobes lie below the eyes


@dataclass(frozen=True)
class FaceFrame:
    """Where the face of a label map is.

    u, v: the face's coordinates of every pixel, `(h, w)`. unit: pixels between the eyes.
    """

    u: np.ndarray
    v: np.ndarray
    unit: float


def stamp(ids: np.ndarray, name: str) -> np.ndarray:
    """A copy of a label map with one thing added.

    Args:
        ids: class ids `(h, w)`.
        name: one of `STAMPS`.

    Raises:
        ValueError: there is no such stamp.
        DataError: the mask lacks what the thing is placed by; the message says what to paint first.
    """
    if name not in STAMPS:
        raise ValueError(f"stamp {name!r} does not exist; known: {', '.join(STAMPS)}")
    class_name, place = STAMPS[name]
    where = place(ids, face_frame(ids))
    if not where.any():
        raise DataError(f"the picture has no room for the {name}: move the face, or paint them")
    added = ids.copy()
    added[where] = CLASS_ID[class_name]
    return added


def face_frame(ids: np.ndarray) -> FaceFrame:
    """The coordinates of the face, from its eyes, or from its brows where eyes are hidden.

    Raises:
        DataError: neither both eyes nor both brows are there.
    """
    y, x = np.indices(ids.shape).astype(float)
    down = 0.0
    points = _centres(ids, ("l_eye", "r_eye"))
    if len(points) < 2:
        points = _centres(ids, ("l_brow", "r_brow"))
        down = BROW_TO_EYE
    if len(points) < 2:
        raise DataError("the mask has neither two eyes nor two brows: paint them first")
    (left_x, left_y), (right_x, right_y) = sorted(points)
    unit = float(np.hypot(right_x - left_x, right_y - left_y))
    if unit < 2:
        raise DataError("the eyes of the mask lie in one place: paint them apart")
    cos = (right_x - left_x) / unit
    sin = (right_y - left_y) / unit
    dx = (x - (left_x + right_x) / 2) / unit
    dy = (y - (left_y + right_y) / 2) / unit
    return FaceFrame(dx * cos + dy * sin, dy * cos - dx * sin - down, unit)


def _centres(ids: np.ndarray, names: tuple[str, str]) -> list[tuple[float, float]]:
    """Mean x, y of those of two classes that are there."""
    found = [np.nonzero(ids == CLASS_ID[name]) for name in names]
    return [(float(x.mean()), float(y.mean())) for y, x in found if len(x)]


def _is(ids: np.ndarray, *names: str) -> np.ndarray:
    return np.isin(ids, [CLASS_ID[name] for name in names])


def _half(frame: FaceFrame, half: float) -> float:
    """Half a line's width, at least half a pixel, so that thin lines have no gaps."""
    return max(half, 0.55 / frame.unit)


def _ellipse(u: np.ndarray, v: np.ndarray, a: float, b: float, power: float = 2.0) -> np.ndarray:
    return np.abs(u / a) ** power + np.abs(v / b) ** power <= 1


def _earrings(ids: np.ndarray, frame: FaceFrame) -> np.ndarray:
    """Drops below both lobes, or beside the face where hair covers an ear."""
    where = np.zeros(ids.shape, bool)
    for side, name in ((-1, "r_ear"), (1, "l_ear")):
        u, v = _lobe(ids, frame, side, name)
        x = frame.u - u
        y = frame.v - v
        hook = (np.abs(x) <= _half(frame, 0.03)) & (y >= 0) & (y <= 0.2)
        where |= hook | _ellipse(x, y - 0.36, 0.13, 0.25)
    return where & ~_is(ids, *FEATURES, "nose")


def _lobe(ids: np.ndarray, frame: FaceFrame, side: int, name: str) -> tuple[float, float]:
    """u, v of a lobe: the lower end of the ear, or the rim of the face at its height."""
    ear = _is(ids, name) & (side * frame.u > 0)
    if ear.any():
        low = frame.v[ear].max()
        near = ear & (frame.v > low - 0.15)
        return float(frame.u[near].mean()), float(low) - 0.05
    row = _is(ids, *FACE) & (np.abs(frame.v - EYE_TO_LOBE) < 0.1) & (side * frame.u > 0)
    if not row.any():
        raise DataError("the mask has no skin beside the nose: paint the face or the ears first")
    return side * (float((side * frame.u[row]).max()) + 0.06), EYE_TO_LOBE


def _necklace(ids: np.ndarray, frame: FaceFrame) -> np.ndarray:
    """A chain that hangs across the middle of the neck, with a pendant."""
    neck = _is(ids, "neck", "neck_l")
    if not neck.any():
        raise DataError("the mask has no neck: paint one first")
    middle = float(np.median(frame.u[neck]))
    column = neck & (np.abs(frame.u - middle) < 0.15)
    if not column.any():
        column = neck
    low = float((frame.v[column].min() + frame.v[column].max()) / 2)
    u = frame.u - middle
    chain = np.abs(frame.v - low + 0.63 * u**2) <= _half(frame, 0.04)
    pendant = _ellipse(u, frame.v - low - 0.08, 0.08, 0.1)
    return ((chain & (np.abs(u) <= 0.75)) | pendant) & _is(ids, "neck", "neck_l", "cloth")


def _glasses(ids: np.ndarray, frame: FaceFrame) -> np.ndarray:
    """Two lenses, a bridge and temples; eyes, brows and hair lie on top, as in CelebAMask-HQ."""
    out = np.abs(frame.u)
    lens = _ellipse(out - 0.52, frame.v - 0.06, 0.40, 0.29, 3.0)
    thin = _half(frame, 0.035)
    bridge = (np.abs(frame.v + 0.05) <= thin) & (out <= 0.24)
    temple = (np.abs(frame.v + 0.05) <= thin) & (out >= 0.8) & (out <= 1.24)
    return (lens | bridge | temple) & _is(ids, "skin", "nose", "eye_g")


def _hat(ids: np.ndarray, frame: FaceFrame) -> np.ndarray:
    """A crown with a brim above the brows; the hair and the forehead above the brim go under it."""
    brows = _is(ids, "l_brow", "r_brow")
    top = float(frame.v[brows].min()) if brows.any() else -BROW_TO_EYE
    line = top - 0.35
    head = _is(ids, *FACE, "hair", "hat") & (np.abs(frame.v - line) < 0.2)
    if not head.any():
        raise DataError("the mask has neither hair nor forehead: paint the head first")
    skin = _is(ids, *FACE) & (np.abs(frame.v) < 0.3)
    widest = np.abs(frame.u[skin if skin.any() else head]).max()
    middle = float(np.clip(frame.u[head].mean(), -0.15, 0.15))
    u = frame.u - middle
    half = float(np.clip(max(1.2 * widest, np.abs(u[head]).max()), 1.3, 2.2))
    above = frame.v <= line
    crown = above & _ellipse(u, frame.v - line, half, 1.35, 2.5)
    covered = above & _is(ids, *FACE, "hair", "hat", "l_ear", "r_ear")
    brim = _ellipse(u, frame.v - line - 0.05, half * 1.02, 0.18, 2.5)
    return (crown | covered | brim) & ~_is(ids, *FEATURES)


Place = Callable[[np.ndarray, FaceFrame], np.ndarray]

STAMPS: dict[str, tuple[str, Place]] = {
    "earrings": ("ear_r", _earrings),
    "necklace": ("neck_l", _necklace),
    "glasses": ("eye_g", _glasses),
    "hat": ("hat", _hat),
}
"""Name -> the class that it paints, and where."""
