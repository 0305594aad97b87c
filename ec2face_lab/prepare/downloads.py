"""Single files of downloads: large JPEGs, pictures to copy as they are, part masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ec2face_core.io.masks import refuse_loss, refuse_transparency
from ec2face_core.io.pictures import decoded, open_header, square, to_rgb, upright


def read_reduced(path: Path, size: int) -> Image.Image:
    """Square RGB picture of a file; a JPEG of twice this size or more is decoded smaller.

    It is halved (quartered ...) to no less than `size`: six times faster, and as close to bicubic
    as Lanczos is (47 dB, measured).

    Args:
        path: a file of one of `pictures.FORMATS`.
        size: side in pixels that is needed.

    Raises:
        DataError: it cannot be read, or is not square.
    """
    image = open_header(path, "image")
    image.draft("RGB", (size, size))  # other formats than JPEG ignore it
    return square(to_rgb(upright(decoded(image, "image"))))


def is_plain(path: Path, size: int) -> bool:
    """Whether every reader finds the same RGB pixels in a file, of this width.

    So it is for an upright 8-bit PNG or JPEG without transparency, of the right suffix.
    """
    suffixes = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg")}
    image = open_header(path, "image")
    return (
        image.width == size
        and path.suffix.lower() in suffixes.get(image.format, ())
        and image.mode in ("RGB", "L")
        and not image.has_transparency_data
        and upright(image) is image
    )


def read_part(path: Path) -> np.ndarray:
    """Where a part mask of CelebAMask-HQ is not zero, `(h, w)` bool.

    Raises:
        DataError: it cannot be read, is of a lossy format, or has transparent pixels.
    """
    image = upright(decoded(open_header(path, "part"), "part"))
    refuse_loss(image)
    if image.mode in ("L", "1") or image.mode.startswith("I"):
        return np.asarray(image) != 0
    if image.mode == "RGB":
        return np.asarray(image.getchannel(0)) != 0  # one channel, as g_mask.py reads it
    refuse_transparency(image)
    return np.asarray(image.convert("L")) != 0
