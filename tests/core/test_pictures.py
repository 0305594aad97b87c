"""Every picture that people bring comes out as it looks, or is refused with the reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ec2face_core.data import files_by_id, is_dropping, visible_files
from ec2face_core.io import pictures
from ec2face_core.io.pictures import open_picture, read_image
from ec2face_core.io.report import DataError, Report

SIDE = 16
JPEG_ERROR = 6  # levels on smooth pictures at quality 100


@pytest.fixture
def smooth() -> Image.Image:
    """Colours that change slowly, differently along both axes: orientation and channels show."""
    x = np.linspace(0, 255, SIDE).round()
    red, green = np.meshgrid(x, x)
    return Image.fromarray(np.stack([red, green, 255 - red], -1).astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def png_bytes(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ orientation


STORED = {  # orientation -> how the stored pixels lie; undoing it gives the picture
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, *STORED])
def test_orientations_are_turned_upright(smooth, tmp_path, orientation, suffix):
    stored = smooth.transpose(STORED[orientation]) if orientation > 1 else smooth
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    path = tmp_path / f"0.{suffix}"
    stored.save(path, exif=exif, **options.get(suffix, {}))
    assert difference(read_image(path), smooth) <= (JPEG_ERROR if suffix == "jpg" else 0)


def test_orientation_of_a_wide_photo(smooth, tmp_path):
    wide = smooth.resize((2 * SIDE, SIDE))
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    wide.save(tmp_path / "0.jpg", exif=exif)
    assert open_picture(tmp_path / "0.jpg").size == (SIDE, 2 * SIDE)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing(smooth, tmp_path):
    smooth.save(
        tmp_path / "0.jpg", quality=100, subsampling=0, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
    )
    assert difference(read_image(tmp_path / "0.jpg"), smooth) <= JPEG_ERROR


# ------------------------------------------------------------------------------------------ modes


def test_transparency_is_laid_on_white(smooth, tmp_path):
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:4] = 0
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    hidden = np.where(alpha[..., None] == 0, noise, np.asarray(smooth))
    cut_out = Image.fromarray(np.dstack([hidden, alpha]))
    cut_out.save(tmp_path / "0.png")
    picture = np.asarray(read_image(tmp_path / "0.png"))
    assert (picture[:4] == 255).all() and (picture[4:] == np.asarray(smooth)[4:]).all()

    grey = smooth.convert("L")
    grey.putalpha(Image.fromarray(alpha))
    grey.save(tmp_path / "1.png")
    picture = np.asarray(read_image(tmp_path / "1.png"))
    assert (picture[:4] == 255).all() and (
        picture[4:, :, 0] == np.asarray(smooth.convert("L"))[4:]
    ).all()


def test_opaque_alpha_changes_nothing(smooth, tmp_path):
    layer = smooth.convert("RGBA")
    layer.save(tmp_path / "0.png")
    layer.save(tmp_path / "0.webp", lossless=True)
    for name in ("0.png", "0.webp"):
        assert difference(read_image(tmp_path / name), smooth) == 0


def test_palettes_with_and_without_transparency(tmp_path):
    colours = [(255, 0, 0), (0, 128, 0), (10, 20, 30)]
    indices = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 3
    image = Image.fromarray(indices)
    image.putpalette([value for colour in colours for value in colour])
    expected = np.array(colours, np.uint8)[indices]
    image.save(tmp_path / "0.png")
    assert (np.asarray(read_image(tmp_path / "0.png")) == expected).all()
    image.save(tmp_path / "1.png", transparency=2)
    expected[indices == 2] = 255
    assert (np.asarray(read_image(tmp_path / "1.png")) == expected).all()


def test_a_transparent_colour_of_an_rgb_image(smooth, tmp_path):
    pixels = np.asarray(smooth).copy()
    pixels[:3] = (1, 2, 3)
    Image.fromarray(pixels).save(tmp_path / "0.png", transparency=(1, 2, 3))
    picture = np.asarray(read_image(tmp_path / "0.png"))
    assert (picture[:3] == 255).all() and (picture[3:] == pixels[3:]).all()


def test_sixteen_bits_are_scaled(smooth, tmp_path):
    grey = np.asarray(smooth.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "0.png")
    assert (np.asarray(read_image(tmp_path / "0.png"))[..., 0] == grey).all()
    Image.fromarray(np.full((4, 4), 640, np.uint16)).save(tmp_path / "1.png")
    assert (np.asarray(read_image(tmp_path / "1.png")) == round(640 / 257)).all()
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "0.tif")
    assert (np.asarray(read_image(tmp_path / "0.tif"))[..., 0] == grey).all()


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_eight_bits_saved_in_sixteen_are_refused(smooth, tmp_path, colour_type):
    """They are black; the same values stretched to 16 bits are the picture."""
    channels = {0: [0], 2: [0, 1, 2], 4: [0], 6: [0, 1, 2]}[colour_type]
    levels = np.asarray(smooth)[..., channels].astype(">u2")
    path = tmp_path / "0.png"
    for scale in (1, 257):
        layers = [levels * scale]
        if colour_type in (4, 6):
            layers.append(np.full((SIDE, SIDE, 1), 65535, ">u2"))
        rows = b"".join(b"\0" + row.tobytes() for row in np.dstack(layers).astype(">u2"))
        header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour_type, 0, 0, 0)
        parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
        path.write_bytes(pictures.PNG_START + b"".join(parts))
        if scale == 1:
            with pytest.raises(DataError, match="16-bit values that are all below 256"):
                read_image(path)
        else:
            assert (np.asarray(read_image(path))[..., channels] == levels).all()


def test_eight_bits_saved_in_a_sixteen_bit_tiff_are_refused(smooth, tmp_path):
    grey = np.asarray(smooth.convert("L")).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "0.tif")
    with pytest.raises(DataError, match="16-bit values"):
        read_image(tmp_path / "0.tif")


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(tmp_path, values):
    Image.fromarray(np.full((4, 4), 3, values)).save(tmp_path / "0.tif")
    with pytest.raises(DataError, match="32-bit"):
        read_image(tmp_path / "0.tif")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_is_scaled(tmp_path, bits):
    top = 2**bits - 1
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) % (top + 1)
    (tmp_path / "0.png").write_bytes(grey_png(levels, bits))
    expected = levels.astype(int) * 255 // top
    assert (np.asarray(read_image(tmp_path / "0.png"))[..., 0] == expected).all()


def test_cmyk_jpeg(smooth, tmp_path):
    smooth.convert("CMYK").save(tmp_path / "0.jpg", quality=100, subsampling=0)
    assert difference(read_image(tmp_path / "0.jpg"), smooth) <= JPEG_ERROR + 2


def test_a_multi_picture_jpeg_of_a_phone(smooth, tmp_path):
    smooth.save(
        tmp_path / "0.jpg", "MPO", quality=100, subsampling=0, save_all=True,
        append_images=[Image.new("RGB", smooth.size)],
    )  # fmt: skip
    assert difference(read_image(tmp_path / "0.jpg"), smooth) <= JPEG_ERROR


def test_upper_case_and_wrong_suffixes(smooth, tmp_path):
    smooth.save(tmp_path / "0.JPG", "JPEG", quality=100, subsampling=0)
    smooth.save(tmp_path / "1.jpg", "PNG")
    assert difference(read_image(tmp_path / "0.JPG"), smooth) <= JPEG_ERROR
    assert difference(read_image(tmp_path / "1.jpg"), smooth) == 0


def test_faces_are_square(tmp_path):
    Image.new("RGB", (16, 8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="wrong size 16x8: faces are square"):
        read_image(tmp_path / "0.png")
    assert open_picture(tmp_path / "0.png").size == (16, 8)


# ---------------------------------------------------------------------------------- damaged files


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(levels: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, which Pillow cannot write; rows are whole bytes."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte - 1, -1, -1) * bits
    packed = (levels.reshape(len(levels), -1, per_byte) << shifts).sum(-1).astype(np.uint8)
    rows = b"".join(b"\0" + bytes(row) for row in packed)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return pictures.PNG_START + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"nothing", "is none of PNG, JPEG"),
        (b"<!DOCTYPE html><title>404</title>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64), "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "is none of"),
        (pictures.PNG_START, "truncated"),
    ],
)
def test_files_that_are_no_pictures_are_named(tmp_path, content, reason):
    path = tmp_path / "0.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"unreadable image.*{reason}"):
        read_image(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_truncation_anywhere_is_noticed(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"0.{suffix}"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    for part in (1, 12, 40, len(whole) // 2, len(whole) - 16):
        path.write_bytes(whole[:part])
        with pytest.raises(DataError, match="unreadable image"):
            read_image(path)


def test_png_checksums_are_compared(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = png_bytes(Image.fromarray(pixels))
    path = tmp_path / "0.png"
    rng = np.random.default_rng(1)
    for position in rng.integers(8, len(whole), 60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="unreadable image"):
            read_image(path)
    for start in (100, 1000, len(whole) - 700):  # a lost disk block
        path.write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])
        with pytest.raises(DataError, match=r"wrong checksum|truncated"):
            read_image(path)


def test_what_follows_the_end_of_a_png_is_ignored(smooth, tmp_path):
    (tmp_path / "0.png").write_bytes(png_bytes(smooth) + b"appended")
    assert difference(read_image(tmp_path / "0.png"), smooth) == 0


def test_large_texts_and_colour_profiles_are_skipped(smooth, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "{" + "x" * 3_000_000 + "}")
    info.add_text("zipped", "y" * 3_000_000, zip=True)
    info.add_itxt("more", "z" * 3_000_000)
    data = png_bytes(smooth, pnginfo=info)
    profile = b"name\0\0" + zlib.compress(os.urandom(8) * 400_000)
    end = data.index(b"IDAT") - 4
    (tmp_path / "0.png").write_bytes(data[:end] + chunk(b"iCCP", profile) + data[end:])
    assert difference(read_image(tmp_path / "0.png"), smooth) == 0


def test_orientation_in_a_text_chunk_counts(smooth, tmp_path):
    xmp = '<rdf:Description tiff:Orientation="3"/>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    smooth.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "0.png", pnginfo=info)
    assert difference(read_image(tmp_path / "0.png"), smooth) == 0


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tif"])
def test_animations_are_refused(smooth, tmp_path, suffix):
    path = tmp_path / f"0.{suffix}"
    others = [Image.new("RGB", smooth.size, colour) for colour in ("red", "blue")]
    smooth.save(path, save_all=True, append_images=others)
    with pytest.raises(DataError, match="animated, 3 frames"):
        read_image(path)


def test_too_many_pixels_are_named(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0")), chunk(b"IEND", b"")]
    (tmp_path / "0.png").write_bytes(pictures.PNG_START + b"".join(parts))
    with pytest.raises(DataError, match=r"unreadable image.*3600000000 pixels"):
        read_image(tmp_path / "0.png")


def test_files_that_cannot_be_pictures_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "0.png"
    with open(path, "wb") as file:
        file.truncate(3 * 2**30)  # sparse
    with pytest.raises(DataError, match=r"3\.2 GB"):
        read_image(path)
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match="a link to a file that does not exist"):
        read_image(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    with pytest.raises(DataError, match="it is no file"):
        read_image(tmp_path / "2.png")
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "3.png")


def test_links_are_followed(smooth, tmp_path):
    smooth.save(tmp_path / "real.png")
    (tmp_path / "0.png").symlink_to("real.png")
    assert difference(read_image(tmp_path / "0.png"), smooth) == 0


# ---------------------------------------------------------------------------------------- listing


def test_what_systems_leave_in_folders_is_no_picture(smooth, tmp_path):
    smooth.save(tmp_path / "1.png")
    for name in ("._1.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "Icon\r"):
        (tmp_path / name).write_bytes(b"left over")
    (tmp_path / "2.png").mkdir()
    report = Report(tmp_path)
    assert files_by_id(tmp_path, (".png",), report) == {"1": tmp_path / "1.png"}
    assert not report.problems and visible_files(tmp_path) == [tmp_path / "1.png"]
    assert visible_files(tmp_path / "none") == []
    for name in ("__MACOSX/1.png", "a/.ipynb_checkpoints/1.png", "a/._1.png"):
        assert is_dropping(Path(name))
    assert not is_dropping(Path("a/1.png"))


def test_names_are_compared_in_composed_form(tmp_path):
    (tmp_path / "Ame\u0301lie.png").touch()  # as macOS writes it
    files = files_by_id(tmp_path, (".png",), Report(tmp_path))
    assert list(files) == ["Am\u00e9lie"]
    (tmp_path / "Am\u00e9lie.png").touch()
    report = Report(tmp_path)
    files_by_id(tmp_path, (".png",), report)
    assert "duplicate id" in report.problems[0][1]


def test_a_report_shows_twenty_lines_and_a_count(tmp_path):
    report = Report(tmp_path, 30_000)
    for i in range(30_000):
        report.add(tmp_path / f"{i:05d}.png", "missing mask")
    with pytest.raises(DataError) as caught:
        report.raise_if_bad()
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and "30,000 problem(s), 30,000 faces" in lines[0]
    assert lines[1] == "  00000.png: missing mask" and lines[-1] == "  ... and 29,980 more"
    assert len(caught.value.report.problems) == 30_000


@pytest.mark.filterwarnings("ignore:Tag data", "ignore:Corrupt EXIF")
def test_any_bytes_are_read_or_refused(smooth, tmp_path):
    """300 damaged files: `DataError` or a picture; never another exception."""
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    kinds = {"PNG": {}, "JPEG": {}, "WEBP": {"lossless": True}, "BMP": {}, "GIF": {}}
    whole = []
    for kind, options in kinds.items():
        buffer = io.BytesIO()
        smooth.save(buffer, kind, exif=exif, **options)
        whole.append(buffer.getvalue())
    rng = np.random.default_rng(0)
    path = tmp_path / "0.png"
    refused = 0
    for i in range(300):
        data = bytearray(whole[i % len(whole)])
        for place in rng.integers(0, len(data), 3):
            data[place : place + int(rng.integers(4))] = bytes(rng.integers(0, 256, 2, np.uint8))
        path.write_bytes(data)
        try:
            picture = read_image(path)
        except DataError:
            refused += 1
        else:
            assert picture.mode == "RGB" and picture.width == picture.height
    assert 100 < refused < 300
