"""Whether the scan of a JPEG holds as many blocks as its picture has.

Decoders do not say when they run out of data or leave some, which lost data nearly always cause.
The codes are only counted here. Scans of all coefficients, or of the mean values of progressive
files; ITU-T T.81 has the terms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESTART = re.compile(rb"\xff[\xd0-\xd7]")
END = 128  # above all coefficients of a block

Tables = Mapping[tuple[int, int], bytes]  # (0 DC or 1 AC, number) -> 16 counts, then symbols


class _Steps(NamedTuple):
    """By how much the code at each 16-bit window advances; 0 bits for what is no code."""

    bits: np.ndarray
    coefficients: np.ndarray


def holds_all_blocks(
    scan: bytes, header: bytes, frame: bytes, tables: Tables, interval: int = 0
) -> bool:
    """Whether a scan ends with the last block of the picture.

    Args:
        scan: its data, up to the next marker.
        header: the SOS segment without its length.
        frame: the SOF segment without its length.
        tables: the Huffman tables that hold for this scan.
        interval: units between restarts; 0: there are none.

    Returns:
        False also if something in it is no code.
    """
    sampling = {frame[i]: (frame[i + 1] >> 4, frame[i + 1] & 15) for i in range(6, len(frame), 3)}
    count = header[0]
    if any(header[1 + 2 * i] not in sampling for i in range(count)):
        return False
    parts = [(*sampling[header[1 + 2 * i]], header[2 + 2 * i]) for i in range(count)]
    across, down = (max(s[axis] for s in sampling.values()) for axis in (0, 1))
    h = v = 1
    units = [number for h_, v_, number in parts for _ in range(h_ * v_)]
    if count == 1:  # its own blocks, none beyond its border
        h, v, number = parts[0]
        units = [number]
    height = int.from_bytes(frame[1:3], "big") * v
    width = int.from_bytes(frame[3:5], "big") * h
    left = -(-height // (8 * down)) * -(-width // (8 * across))
    last, bits = header[2 + 2 * count : 4 + 2 * count]
    steps = {key: _steps(table, key[0]) for key, table in tables.items()}
    for segment in RESTART.split(scan):
        here = min(left, interval or left)
        left -= here
        data = segment.replace(b"\xff\x00", b"\xff")
        if bits >> 4:  # one bit a block
            fits = 0 <= 8 * len(data) - here * len(units) < 8
        else:
            fits = _holds(data, units * here, steps, last > 0)
        if not fits:
            return False
    return left == 0


def _steps(table: bytes, kind: int) -> _Steps:
    """A Huffman table by windows of 16 bits."""
    bits = np.zeros(2**16, np.uint8)
    coefficients = np.zeros(2**16, np.uint8)
    symbols = iter(table[16:])
    code = 0
    for length in range(1, 17):
        for _, symbol in zip(range(table[length - 1]), symbols, strict=False):
            windows = slice(code << (16 - length), (code + 1) << (16 - length))
            bits[windows] = length + (symbol & 15)
            coefficients[windows] = END if kind and symbol == 0 else (symbol >> 4) + 1
            code += 1
        code <<= 1
    return _Steps(bits, coefficients)


def _holds(
    data: bytes,
    blocks: Sequence[int],
    steps: Mapping[tuple[int, int], _Steps],
    all_coefficients: bool,
) -> bool:
    """Whether some data without stuffing are exactly these blocks, and less than a byte.

    blocks: for each the numbers of its tables, as a scan's header has them.
    """
    padded = np.frombuffer(data + b"\xff" * 4, np.uint8).astype(np.uint32)
    words = padded[:-3] << 16 | padded[1:-2] << 8 | padded[2:-1]
    windows = np.stack([words >> (8 - k) & 0xFFFF for k in range(8)], -1).ravel()
    wanted = {(0, n >> 4) for n in blocks} | {(1, n & 15) for n in blocks if all_coefficients}
    if wanted - steps.keys():
        return False
    bits = {key: steps[key].bits[windows].tobytes() for key in wanted}
    runs = {key: steps[key].coefficients[windows].tobytes() for key in wanted}
    total = 8 * len(data)
    position = 0
    for number in blocks:
        dc = bits[0, number >> 4][position]
        position += dc
        if not dc or position > total:
            return False
        if not all_coefficients:
            continue
        ac = bits[1, number & 15]
        run = runs[1, number & 15]
        k = 1
        while k < 64:
            step = ac[position]
            k += run[position]
            position += step
            if not step or position > total:
                return False
        if 64 < k < END:
            return False
    return total - position < 8
