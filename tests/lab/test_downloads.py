"""Single files of downloads: large JPEGs, pictures that are copied as they are, part masks."""

from __future__ import annotations

import numpy as np
import pytest
from face_files import label_map
from PIL import Image

from ec2face_core.io.pictures import ORIENTATION
from ec2face_core.io.report import DataError
from ec2face_lab.prepare.downloads import is_plain, read_part, read_reduced

SIDE = 16


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def test_large_jpegs_are_decoded_smaller(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.jpg")
    Image.fromarray(pixels).save(tmp_path / "0.png")
    Image.fromarray(pixels[:32]).save(tmp_path / "1.jpg")
    assert read_reduced(tmp_path / "0.jpg", 16).size == (16, 16)
    assert read_reduced(tmp_path / "0.png", 16).size == (64, 64)
    with pytest.raises(DataError, match="faces are square"):
        read_reduced(tmp_path / "1.jpg", 16)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_upright_pngs_and_jpegs_are_plain(noise, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"0.{suffix}"
    noise.save(path, exif=exif)
    assert is_plain(path, SIDE) == (orientation == 1 and suffix != "webp")
    assert not is_plain(path, SIDE + 1)


def test_transparency_cmyk_and_wrong_suffixes_are_not_plain(noise, tmp_path):
    layer = noise.copy()
    layer.putalpha(128)
    layer.save(tmp_path / "0.png")
    noise.convert("CMYK").save(tmp_path / "0.jpg")  # other readers invert it
    noise.save(tmp_path / "1.jpg", "PNG")
    noise.save(tmp_path / "1.JPG", "JPEG")
    for name in ("0.png", "0.jpg", "1.jpg"):
        assert not is_plain(tmp_path / name, SIDE)
    assert is_plain(tmp_path / "1.JPG", SIDE)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16", "LA"])
def test_part_masks_are_what_is_not_zero(tmp_path, mode):
    part = label_map() == 1
    grey = Image.fromarray(part.astype(np.uint8) * 255)
    if mode == "I;16":
        image = Image.fromarray(part.astype(np.uint16))
    elif mode == "LA":
        image = grey.copy()
        image.putalpha(255)
    else:
        image = grey.convert(mode)
    image.save(tmp_path / "0.png")
    assert (read_part(tmp_path / "0.png") == part).all()
    grey.save(tmp_path / "1.png", "JPEG")
    with pytest.raises(DataError, match="JPEG"):
        read_part(tmp_path / "1.png")
