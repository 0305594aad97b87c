"""Lost disk blocks in JPEG and WebP, whose decoders make garbage of them without an error.

A file system fills a block that was never written with zero bytes. In compressed data so long a run
does not occur, but in large areas of one colour: some codes of these are zeros. Where a file's own
code tables allow that, the blocks of the picture are counted (`jpeg.py`).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .jpeg import Tables, holds_all_blocks

BLOCK = bytes(512)  # the smallest block of a disk
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # what ends the data of a JPEG's scan
FLAT = 2  # pixels of one colour for each zero byte of a lossless WebP


def lost_block(data: bytes, image: Any) -> int | None:
    """Where the compressed data of a file are lost; None where nothing says so.

    Args:
        data: of the whole file.
        image: the same as Pillow has opened it.

    Returns:
        The first byte of 512 zeros or more.
    """
    if BLOCK not in data:
        return None
    if image.format in ("JPEG", "MPO"):
        return _lost_in_jpeg(data)
    return _lost_in_webp(data, image) if image.format == "WEBP" else None


def _lost_in_jpeg(data: bytes) -> int | None:
    """Zeros in the scans of a JPEG, or where a marker should be; metadata may hold them."""
    tables: dict[tuple[int, int], bytes] = {}
    frame = b""
    interval = 0
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:  # no marker
            return position if data.startswith(BLOCK, position) else None
        kind = data[position + 1]
        if kind == 0xFF:  # filling
            position += 1
            continue
        if kind == 0xD9:  # the end; what follows is no picture
            return None
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position + 4 : position + 2 + length]
        position += 2 + length
        if kind == 0xC4:
            tables |= _tables(segment)
        elif 0xC0 <= kind <= 0xCF and kind != 0xCC:
            frame = segment
        elif kind == 0xDD:
            interval = int.from_bytes(segment[:2], "big")
        elif kind == 0xDA:
            found = MARKER.search(data, position)
            end = found.start() if found else len(data)
            place = data.find(BLOCK, position, end)
            if place >= 0 and not (
                _may_be_flat(segment, tables)
                and holds_all_blocks(data[position:end], segment, frame, tables, interval)
            ):
                return place
            position = end
    return None


def _tables(segment: bytes) -> dict[tuple[int, int], bytes]:
    """The Huffman tables of a DHT segment, as `jpeg.Tables` has them."""
    found = {}
    position = 0
    while position + 17 < len(segment):
        end = position + 17 + sum(segment[position + 1 : position + 17])
        found[segment[position] >> 4, segment[position] & 15] = segment[position + 1 : end]
        position = end
    return found


def _may_be_flat(segment: bytes, tables: Tables) -> bool:
    """Whether zeros in this scan mean blocks that equal the one before, as flat areas have them."""
    count = segment[0] if segment else 0
    if len(segment) < 4 + 2 * count:
        return False
    chosen = [segment[2 + 2 * i] for i in range(count)]
    first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
    if first:  # later coefficients only: their flat areas are counted, not written
        return False
    refined = last == 0 and bits >> 4 > 0
    same = all(_means_zero(tables.get((0, number >> 4))) for number in chosen)
    ended = last == 0 or all(_means_zero(tables.get((1, number & 15))) for number in chosen)
    return refined or (same and ended)


def _means_zero(table: bytes | None) -> bool:
    """Whether the code of zeros alone is the symbol 0 of a table: no change, or no more."""
    return table is not None and len(table) > 16 and table[16] == 0


def _lost_in_webp(data: bytes, image: Any) -> int | None:
    """Zeros in the pixels of a WebP: without loss only where no area is of one colour."""
    position = 12
    while position + 8 <= len(data):
        kind = data[position : position + 4]
        end = position + 8 + int.from_bytes(data[position + 4 : position + 8], "little")
        place = data.find(BLOCK, position + 8, end)
        if place >= 0 and kind in (b"VP8 ", b"VP8L"):
            rest = data[place:end]
            zeros = len(rest) - len(rest.lstrip(b"\0"))
            flat = kind == b"VP8L" and _longest_stretch(image) >= FLAT * zeros
            return None if flat else place
        position = end + end % 2
    return None


def _longest_stretch(image: Any) -> int:
    """Of how many pixels in reading order the longest stretch of one colour is."""
    pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4)
    changes = np.flatnonzero((pixels[1:] != pixels[:-1]).any(1))
    return int(np.diff(changes, prepend=-1, append=len(pixels) - 1).max())
