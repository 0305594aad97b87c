"""The 19 semantic classes of CelebAMask-HQ: names, groups, palette, flips, facer's order.

Conventions owned by this module
    Label ids are CelebAMask-HQ's own (`g_mask.py`), 0 background to 18 cloth. `l_` is the
    *subject's* left, which is image right: mean_x(l_eye) > mean_x(r_eye). A label map is int64 of
    shape `b h w` or `h w`; functions take any integer type and refuse ids out of range (TypeError,
    ValueError). Groups are those of Appendix A: HFA, NFA and RFA (high-, normal-,
    rare-frequency).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .guards.checks import check_labels, check_tensor

CLASSES: tuple[str, ...] = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear",
    "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip

NUM_CLASSES = len(CLASSES)

CLASS_ID: dict[str, int] = {name: i for i, name in enumerate(CLASSES)}

# Names as the paper's figures print them.
DISPLAY_NAMES: dict[str, str] = {"eye_g": "glasses", "ear_r": "earring", "neck_l": "necklace"}

# Appendix A. NFA is what is neither high- nor rare-frequency.
GROUPS: dict[str, tuple[int, ...]] = {
    "HFA": (0, 1, 13, 17),
    "NFA": (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 18),
    "RFA": (15, 16),
}

# CelebAMask-HQ `g_color.py`, row = label id, RGB 0-255.
PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0), (204, 0, 0), (76, 153, 0), (204, 204, 0), (51, 51, 255), (204, 0, 204),
    (0, 255, 255), (255, 204, 204), (102, 51, 0), (255, 0, 0), (102, 204, 0), (255, 255, 0),
    (0, 0, 153), (0, 0, 204), (255, 51, 153), (0, 204, 204), (0, 51, 0), (255, 153, 51),
    (0, 204, 0),
)  # fmt: skip

# A horizontal flip swaps the sides as well as the pixels.
FLIP_PAIRS: tuple[tuple[int, int], ...] = ((4, 5), (6, 7), (8, 9))

# index in the other system -> our id
FACER_TO_CELEBAMASK: tuple[int, ...] = (
    0, 17, 1, 18, 8, 9, 6, 7, 4, 5, 2, 10, 12, 11, 13, 3, 14, 15, 16,
)  # fmt: skip


def display_name(class_id: int) -> str:
    """Name of a class as figures and tables print it."""
    return DISPLAY_NAMES.get(CLASSES[class_id], CLASSES[class_id])


def palette_tensor(device: torch.device | str = "cpu") -> Tensor:
    """The palette, `(19, 3)` floats in [-1, 1]."""
    return torch.tensor(PALETTE, dtype=torch.float32, device=device) / 127.5 - 1


def palette_image(label_map: Tensor) -> Tensor:
    """Label map `b h w` -> palette image `b 3 h w` in [-1, 1], which the mask branch reads."""
    labels = check_labels(label_map, NUM_CLASSES)
    return palette_tensor(labels.device)[labels].movedim(-1, -3)


def flip_labels(label_map: Tensor) -> Tensor:
    """Mirror a label map `... h w` left to right, exchanging the subject's left and right parts."""
    labels = check_labels(label_map, NUM_CLASSES)
    swap = torch.arange(NUM_CLASSES, device=labels.device)
    for left, right in FLIP_PAIRS:
        swap[left], swap[right] = right, left
    return swap[labels.flip(-1)]


def one_hot(label_map: Tensor) -> Tensor:
    """Label map `b h w` -> `b 19 h w` floats in {0, 1}."""
    labels = check_labels(label_map, NUM_CLASSES)
    return torch.nn.functional.one_hot(labels, NUM_CLASSES).movedim(-1, 1).float()


def pixel_counts(label_map: Tensor, where: Tensor | None = None) -> Tensor:
    """Pixels of each class in each map: `b h w` -> `(b, 19)` int64.

    where: bool, of the shape of label_map; only pixels where it is True are counted.
    """
    labels = check_labels(label_map, NUM_CLASSES).flatten(1)
    if where is not None:
        check_tensor(where, "where")
        if where.shape != label_map.shape or where.dtype != torch.bool:
            raise ValueError(
                f"where is {where.dtype} of shape {tuple(where.shape)}: expected booleans of the "
                f"label map's shape {tuple(label_map.shape)}"
            )
    ones = torch.ones_like(labels) if where is None else where.flatten(1).long()
    # a scatter refuses a label above 18, and is 100 times cheaper than one-hot at 512 px
    return labels.new_zeros(len(labels), NUM_CLASSES).scatter_add_(1, labels, ones)
