"""The colours of portraits: natural, muted, RGB 0-255."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RGB = tuple[int, int, int]

SKIN: tuple[RGB, ...] = (  # from light to dark
    (240, 202, 174), (226, 180, 146), (206, 154, 114), (174, 122, 86), (132, 88, 62), (94, 62, 46),
)  # fmt: skip

HAIR: tuple[RGB, ...] = (  # black, brown, blond, red, gray: the order of `captions.HAIR_COLOURS`
    (34, 29, 30), (98, 64, 42), (214, 180, 122), (168, 78, 38), (176, 174, 172),
)  # fmt: skip

IRIS: tuple[RGB, ...] = (
    (74, 46, 30), (112, 76, 44), (94, 128, 164), (98, 128, 92), (120, 124, 126),
)  # fmt: skip

LIPSTICK: tuple[RGB, ...] = ((188, 44, 56), (168, 34, 76), (206, 76, 104), (136, 32, 46))

TINTS: tuple[RGB, ...] = ((92, 62, 92), (64, 82, 112), (104, 66, 52), (70, 88, 76))  # eye shadow

METAL: tuple[RGB, ...] = (  # gold, silver, garnet, turquoise, pearl
    (224, 182, 84), (206, 211, 220), (170, 50, 74), (52, 132, 140), (244, 238, 226),
)  # fmt: skip

FRAMES: tuple[RGB, ...] = (
    (30, 28, 30), (92, 60, 40), (150, 122, 74), (44, 56, 84), (104, 36, 44),
)  # fmt: skip

BRIGHT_FRAMES: tuple[RGB, ...] = (
    (20, 18, 20), (206, 170, 92), (226, 204, 166), (196, 200, 208), (214, 96, 88),
)  # fmt: skip

CLOTH: tuple[RGB, ...] = (
    (48, 62, 92), (62, 64, 70), (226, 216, 196), (230, 230, 228), (120, 46, 56), (106, 108, 76),
    (206, 160, 156), (90, 114, 146), (178, 140, 98), (60, 86, 70), (142, 144, 148), (38, 38, 42),
    (194, 156, 78), (160, 150, 182), (164, 90, 62),
)  # fmt: skip

BACKDROPS: dict[str, tuple[tuple[RGB, RGB], ...]] = {
    "first": (
        ((186, 180, 170), (132, 126, 118)),
        ((150, 162, 174), (96, 110, 126)),
        ((160, 168, 148), (108, 120, 100)),
        ((212, 198, 174), (166, 148, 122)),
        ((196, 172, 166), (142, 116, 114)),
        ((104, 104, 110), (58, 60, 66)),
        ((230, 227, 220), (194, 190, 182)),
        ((134, 146, 106), (82, 98, 68)),
        ((184, 202, 216), (222, 224, 220)),
        ((122, 150, 150), (76, 102, 106)),
        ((160, 132, 104), (104, 82, 62)),
    ),
    "second": (
        ((64, 92, 104), (26, 42, 56)),
        ((112, 62, 66), (52, 28, 36)),
        ((70, 76, 116), (28, 32, 56)),
        ((176, 124, 72), (88, 56, 38)),
        ((112, 84, 122), (50, 38, 66)),
        ((72, 104, 84), (28, 46, 40)),
        ((170, 176, 186), (104, 112, 126)),
        ((60, 60, 64), (24, 24, 28)),
    ),
}


def pick(colours: Sequence[RGB], index: np.ndarray) -> np.ndarray:
    """Colours `(b, 3)` in [0, 1] by their indices `(b,)`."""
    return np.array(colours)[index.astype(int)] / 255


def along(colours: Sequence[RGB], t: np.ndarray) -> np.ndarray:
    """Colours `(b, 3)` in [0, 1] between the first, t = 0, and the last, t = 1."""
    table = np.array(colours) / 255
    grid = np.linspace(0, 1, len(table))
    return np.stack([np.interp(t, grid, table[:, c]) for c in range(3)], -1)
