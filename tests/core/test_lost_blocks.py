"""Lost disk blocks are told in JPEG and WebP; flat pictures and metadata of zeros are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ec2face_core.io import blocks
from ec2face_core.io.jpeg import holds_all_blocks
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
    ("WEBP", {"lossless": True}, 512),
    ("WEBP", {"lossless": True}, 4096),
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


@pytest.mark.parametrize(
    "options",
    [{}, {"optimize": True}, {"progressive": True}, {"progressive": True, "subsampling": 0}],
    ids=["plain", "optimized", "progressive", "progressive-444"],
)
@pytest.mark.parametrize("colour", ["black", "white", "half"])
@pytest.mark.parametrize("quality", [1, 50, 90, 100])
def test_flat_jpegs_are_read(tmp_path, colour, options, quality):
    """In the tables that an encoder fits to a flat picture zeros mean `as before`."""
    picture = Image.new("RGB", (1024, 1024), "black" if colour == "half" else colour)
    if colour == "half":
        picture.paste(photo(), (384, 640))
    path = tmp_path / "0.jpg"
    picture.save(path, quality=quality, **options)
    assert read_image(path).size == (1024, 1024)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["plain", "progressive"])
@pytest.mark.parametrize("size", [(257, 130), (64, 64), (15, 16)])
@pytest.mark.parametrize("more", [{}, {"subsampling": 0}, {"subsampling": 1, "restart": 3}])
def test_the_blocks_of_any_jpeg_are_counted(mode, options, size, more, monkeypatch):
    """Whatever an encoder writes ends with the last block; without its last bytes it does not."""
    more = dict(more)
    if "restart" in more:
        more["restart_marker_blocks"] = more.pop("restart")
    data = encoded(photo().resize(size).convert(mode), "JPEG", **options, **more)
    counted = []

    def count(scan, header, frame, tables, interval):
        known = header[1 + 2 * header[0]] == 0
        if known:
            counted.append(holds_all_blocks(scan, header, frame, tables, interval))
            assert not holds_all_blocks(scan[:-3], header, frame, tables, interval)
        return True

    monkeypatch.setattr(blocks, "BLOCK", b"")  # as if zeros were everywhere
    monkeypatch.setattr(blocks, "_may_be_flat", lambda *_: True)
    monkeypatch.setattr(blocks, "holds_all_blocks", count)
    assert blocks._lost_in_jpeg(data) is None
    assert counted and all(counted)


def test_a_lost_block_among_the_means_of_a_progressive_jpeg_is_refused(tmp_path):
    data = encoded(photo(1024), "JPEG", quality=90, progressive=True)
    start = data.index(b"\xff\xda") + 1000
    assert b"\xff\xda" not in data[start - 900 : start + 1024]
    path = tmp_path / "0.jpg"
    path.write_bytes(data[:start] + bytes(1024) + data[start + 1024 :])
    with pytest.raises(DataError, match="512 or more zero bytes"):
        read_image(path)


@pytest.mark.parametrize("method", [0, 4])
@pytest.mark.parametrize("ground", ["black", "white"])
def test_cut_outs_in_lossless_webp_are_read(tmp_path, ground, method):
    picture = Image.new("RGB", (512, 512), ground)
    picture.paste(photo(), (128, 256))
    path = tmp_path / "0.webp"
    picture.save(path, lossless=True, method=method)
    assert (np.asarray(read_image(path)) == np.asarray(picture)).all()
