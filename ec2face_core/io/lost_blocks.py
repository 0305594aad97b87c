"""Lost disk blocks in JPEG and WebP, whose decoders make garbage of them without an error.

A file system fills a block that was never written with zero bytes. The codes of a photograph hold
no run of so many.
"""

from __future__ import annotations

BLOCK = bytes(512)  # the smallest block of a disk
SCAN = 0xDA  # JPEG marker: codes follow
END = b"\xff\xd9"  # of a JPEG; inside codes 0xff is followed by 0


def lost_block(data: bytes, kind: str | None) -> int | None:
    """Where the codes of a file are lost: the first of 512 zero bytes or more; None: nowhere.

    Zeros in metadata, or after the end, are no loss. A flat drawing whose tables were optimised may
    hold real ones.

    Args:
        data: of the whole file.
        kind: its format, in Pillow's words; None: not known.
    """
    if BLOCK not in data:
        return None
    if kind in ("JPEG", "MPO"):
        start = _scan(data)
        end = data.find(END, start)
    elif kind == "WEBP" and (start := data.find(b"VP8 ", 12)) > 0:  # lossy
        end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
    else:
        return None
    found = data.find(BLOCK, start, end if end > 0 else len(data))
    return found if found >= 0 else None


def _scan(data: bytes) -> int:
    """Where the codes of a JPEG begin, or where a marker should be and is not."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == SCAN:
            break
        filling = data[position + 1] == 0xFF
        position += 1 if filling else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position
