"""Pictures as PNG files: written whole with text chunks, and read back as tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ec2face_core.guards.checks import NotFiniteError
from ec2face_core.io.pictures import read_image
from ec2face_core.io.report import DataError
from ec2face_core.runs import parallel, whole_file


def save_picture(path: Path, image: Tensor, chunks: Mapping[str, str]) -> None:
    """Write an image `3 h w` in [0, 1] as PNG with text chunks.

    Raises:
        NotFiniteError: a value is not finite; it would be written as black.
    """
    try:
        content = png_bytes(image, chunks)
    except NotFiniteError as error:
        raise NotFiniteError(f"the picture for {path} is not finite and is not written") from error
    with whole_file(path) as part:
        part.write_bytes(content)


def png_bytes(image: Tensor, chunks: Mapping[str, str]) -> bytes:
    """The PNG file of an image `3 h w` in [0, 1], with text chunks.

    Raises:
        NotFiniteError: a value is not finite.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in chunks.items():
        info.add_itxt(name, text)
    if not image.isfinite().all():
        raise NotFiniteError("the picture is not finite")
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels.movedim(0, -1).numpy()).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def read_picture(path: Path) -> Tensor:
    """An image `3 h w` in [-1, 1]; DataError, with the file's name, if it cannot be read."""
    try:
        pixels = np.array(read_image(path))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def load_pictures(folder: Path, ids: Sequence[str]) -> Tensor:
    """The pictures `{id}.png` of a folder, `b 3 h w` in [-1, 1]."""
    return torch.stack(list(parallel(read_picture, [folder / f"{name}.png" for name in ids])))
