"""The one way to open a picture.

A file is read whole, and its format is told by its content, not by its name. The checksums of a PNG
are compared; empty, damaged, animated and foreign files are refused with the reason.
Pictures come out upright (EXIF), in 8-bit RGB: 16 bits are scaled, transparency is laid on white.
Errors are `DataError`s without the file's name, which the caller knows. Label maps: `masks.py`.
"""

from __future__ import annotations

import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .lost_blocks import lost_block
from .report import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
MAX_BYTES = 2**30  # of a file that can be a picture of a face


PNG_START = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION = 0x0112  # EXIF
ORIENTED_TEXT = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # may hold the orientation
SMALL = 2**16  # bytes of a text chunk that is read
LOW_VALUES = (
    "16-bit values that are all below 256, as if 8 bits were saved in 16: black, where it is no "
    "mistake; export 8 bits"
)


def read_image(path: Path) -> Image.Image:
    """Square RGB picture; DataError with the reason otherwise."""
    return square(to_rgb(open_picture(path)))


def open_picture(path: Path) -> Image.Image:
    """The picture of a file, checked and upright, in the file's own mode and of any shape.

    path: a file of one of `FORMATS`; DataError if it cannot be read.
    """
    return upright(decoded(open_header(path, "image"), "image"))


def square(picture: Image.Image) -> Image.Image:
    """The same picture; DataError if it is not square."""
    if picture.width != picture.height:
        raise DataError(f"wrong size {picture.width}x{picture.height}: faces are square")
    return picture


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16 bits are scaled, transparency is laid on white.

    Raises:
        DataError: pixels of 32 bits, whose range is unknown, or of another colour space; 16 bits
            that hold the values of 8.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        if values.max(initial=0) < 256:
            raise DataError(LOW_VALUES)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"32-bit pixels ({image.mode}) have no known range: export 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        white.alpha_composite(layer)
        image = white
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{image.mode} cannot be read as RGB: export RGB") from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; the same object where it says nothing."""
    try:
        turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # Pillow raises many kinds for damaged EXIF data, which turn nothing
        turned = False
    return ImageOps.exif_transpose(image) if turned else image


def open_header(path: Path, kind: str) -> Any:
    """An opened image whose pixels are not yet decoded; the checksums of a PNG are right.

    Args:
        path: the file.
        kind: what it should be; errors call it so.

    Raises:
        DataError: it cannot be opened.
    """
    data = _content(path, kind)
    try:
        if data.startswith(PNG_START):
            data = b"".join(_png_chunks(data))
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "WEBP":
            image.info["lossless"] = b"VP8 " not in data[:SMALL]  # the chunk of lossy pixels
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        lost = lost_block(data, image.format)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"unreadable {kind} ({_cause(data, error)})") from error
    if frames > 1:
        raise DataError(f"unreadable {kind} (animated, {frames} frames: export one of them)")
    if lost is not None:
        raise DataError(
            f"unreadable {kind} (512 or more zero bytes at byte {lost:,}, as a lost disk block "
            "leaves them: get the file anew; a flat drawing: save it as PNG)"
        )
    return image


def decoded(image: Any, kind: str) -> Any:
    """The same image with its pixels; DataError if they are damaged.

    Of 16-bit colours Pillow keeps the upper halves, so that colours below 256 are refused, too.
    """
    halved = ";16" in raw_mode(image) and not image.mode.startswith("I")
    try:
        image.load()
    except Exception as error:  # as above
        raise DataError(f"unreadable {kind} ({error})") from error
    if halved:
        bands = image.split()[:-1] if image.mode in ("LA", "RGBA") else image.split()
        if all(band.getextrema()[1] == 0 for band in bands):
            raise DataError(LOW_VALUES)
    return image


def raw_mode(image: Any) -> str:
    """How a file stores the pixels of an image, in Pillow's words; empty where nobody knows.

    An image that is decoded already is looked up in its file.
    """
    tiles = getattr(image, "tile", ())
    file = getattr(image, "filename", "")
    if not tiles and file and image.format in ("PNG", "TIFF"):
        try:
            with Image.open(file) as again:
                tiles = again.tile
        except (OSError, ValueError):  # it is gone
            pass
    for tile in tiles:
        options = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if options and isinstance(options[0], str):
            return options[0]
    return ""


def _content(path: Path, kind: str) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"unreadable {kind} (it is no file)")
        if status.st_size > MAX_BYTES:
            raise DataError(f"unreadable {kind} ({status.st_size / 1e9:.1f} GB)")
        return path.read_bytes()
    except OSError as error:
        reason = "a link to a file that does not exist" if path.is_symlink() else error.strerror
        raise DataError(f"unreadable {kind} ({reason})") from error


def _cause(data: bytes, error: Exception) -> str:
    """What a file is that Pillow cannot open."""
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull`"
    if data.lstrip()[:1] == b"<":
        return "HTML or XML, as a failed download leaves it"
    if data[4:8] == b"ftyp":
        return "HEIC or AVIF: export PNG or JPEG"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"is none of {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The parts of a PNG file without texts and colour profiles, which nothing here needs.

    Pillow refuses those above 1 MB, and compares no checksums while it decodes.
    """
    yield PNG_START
    position = len(PNG_START)
    kind = b""
    while kind != b"IEND":
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        kind = data[position + 4 : position + 8]
        if end > len(data):
            raise ValueError(f"truncated after {len(data):,} bytes")
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError(f"wrong checksum at byte {position:,}")
        text = data[position + 8 : end - 4]
        oriented = length < SMALL and text.startswith(ORIENTED_TEXT)
        if kind not in TEXT_CHUNKS or oriented:
            yield data[position:end]
        position = end
