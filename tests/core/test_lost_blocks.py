"""Lost disk blocks are told in JPEG and lossy WebP; zeros in metadata are none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ec2face_core.io.pictures import read_image
from ec2face_core.io.report import DataError

SIDE = 256


def photo(side: int = SIDE) -> Image.Image:
    """Soft shades with noise, as a camera sees a face."""
    y, x = np.mgrid[:side, :side]
    shades = [128 + 80 * np.sin(x / 40 + y / 90), 128 + 70 * np.cos(y / 50), x / 4 + y / 8]
    noise = np.random.default_rng(0).normal(0, 9, (side, side, 3))
    return Image.fromarray((np.stack(shades, -1) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


LOSSES = [
    ("JPEG", {"quality": 75}, 512),
    ("JPEG", {"quality": 95}, 4096),
    ("JPEG", {"quality": 100, "subsampling": 0}, 4096),
    ("JPEG", {"quality": 90, "restart_marker_rows": 1}, 512),
    ("JPEG", {"quality": 95, "optimize": True}, 1024),
    ("JPEG", {"quality": 50, "optimize": True}, 1024),
    ("JPEG", {"quality": 50, "optimize": True, "restart_marker_rows": 4}, 512),
    ("JPEG", {"quality": 95, "progressive": True}, 4096),
    ("WEBP", {"quality": 95}, 512),
]


@pytest.mark.parametrize(("kind", "options", "lost"), LOSSES)
@pytest.mark.parametrize("place", [0.55, 0.7, 1.0])
def test_a_lost_block_is_refused(tmp_path, kind, options, lost, place):
    data = encoded(photo(), kind, **options)
    start = int((len(data) - lost) * place)
    path = tmp_path / "0.jpg"
    path.write_bytes(data)
    read_image(path)
    path.write_bytes(data[:start] + bytes(lost) + data[start + lost :])
    with pytest.raises(DataError, match=r"unreadable image \((512 or more zero bytes|.*truncated)"):
        read_image(path)


def test_a_lost_block_over_the_tables_of_a_jpeg_is_refused(tmp_path):
    data = encoded(photo(), "JPEG", quality=90)
    path = tmp_path / "0.jpg"
    path.write_bytes(data[:20] + bytes(1024) + data[1044:])
    with pytest.raises(DataError, match="unreadable image"):
        read_image(path)


def test_zeros_beside_the_pixels_are_no_loss(tmp_path):
    path = tmp_path / "0.jpg"
    data = encoded(photo(), "JPEG", icc_profile=bytes(3000), comment=bytes(2000))
    for content in (
        data,
        data + bytes(4096),  # padding after the end
        encoded(photo(), "JPEG", exif=b"Exif\0\0" + bytes(3000)),
        encoded(photo(), "WEBP", icc_profile=bytes(3000)),
        encoded(photo(), "WEBP", exif=bytes(3000)),
        encoded(photo(), "WEBP") + bytes(4096),
    ):
        assert bytes(512) in content
        path.write_bytes(content)
        assert read_image(path).width == SIDE


@pytest.mark.parametrize("quality", [1, 50, 90, 100])
@pytest.mark.parametrize("colour", ["black", "white", "half"])
def test_flat_jpegs_of_the_usual_tables_are_read(tmp_path, colour, quality):
    picture = Image.new("RGB", (1024, 1024), "black" if colour == "half" else colour)
    if colour == "half":
        picture.paste(photo(), (384, 640))
    path = tmp_path / "0.jpg"
    picture.save(path, quality=quality)
    assert read_image(path).size == (1024, 1024)


def test_a_flat_drawing_with_tables_of_its_own_is_told_what_to_do(tmp_path):
    """In such tables zeros mean `as before`, so nobody can tell them from a loss."""
    path = tmp_path / "0.jpg"
    Image.new("RGB", (2048, 2048), "white").save(path, progressive=True)
    with pytest.raises(DataError, match="a flat drawing: save it as PNG"):
        read_image(path)


def test_a_jpeg_that_was_cut_before_its_scan_is_refused(tmp_path):
    path = tmp_path / "0.jpg"
    path.write_bytes(encoded(photo(), "JPEG")[:40] + bytes(600))
    with pytest.raises(DataError, match="unreadable image"):
        read_image(path)
