"""The one way to open a label map: a file, an image or an array -> class ids.

Ids are the indices of a palette image in our palette, the values of a grey image of any bit depth,
the colours of every other image, and the integers of an array. Formats with loss, transparent
pixels and foreign palettes are refused with the reason, never guessed. `pictures.py` opens the
files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..attributes import NUM_CLASSES, PALETTE
from .pictures import decoded, open_header, upright
from .report import DataError

LOSSY = ("JPEG", "MPO")
TOLERANCE = 32.0  # Euclidean distance of a colour to its palette colour, 0-255
PALETTE_TOLERANCE = 8.0  # the same for the few colours of a palette image
EDGE_TOLERANCE = 8.0  # within it, a pixel of a mask with smooth edges is no edge
SMOOTH = 0.4  # largest share of edge pixels in such a mask
NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
ROUNDS = 16  # pixels that its edges may be wide
LEVELS = {"L;2": 85, "L;4": 17}  # Pillow scales grey images of few bits by these factors


def read_mask(path: Path, colours: bool = False, snap_edges: bool = False) -> np.ndarray:
    """Class ids of a mask file, `(h, w)` uint8, of two classes or more.

    Args:
        path: a palette or grey image without loss.
        colours: also read RGB images in the colours of `PALETTE`.
        snap_edges: see `labels_from_palette`.

    Raises:
        DataError: it cannot be read, holds other ids, or shows one class only.
    """
    image = open_header(path, "mask")
    _scale(image)  # refuses what Pillow would halve
    if not colours and image.mode in ("RGB", "RGBA"):
        raise DataError(f"mask is {image.mode}, not ids: `convert-merged` turns colours into ids")
    ids = image_ids(image, snap_edges)
    check_ids(ids)
    return ids


def read_part(path: Path) -> np.ndarray:
    """Where a part mask of CelebAMask-HQ is not zero, `(h, w)` bool."""
    image = upright(decoded(open_header(path, "part"), "part"))
    _refuse_loss(image)
    if image.mode in ("L", "1") or image.mode.startswith("I"):
        return np.asarray(image) != 0
    if image.mode == "RGB":
        return np.asarray(image.getchannel(0)) != 0  # one channel, as g_mask.py reads it
    _refuse_transparency(image)
    return np.asarray(image.convert("L")) != 0


def check_ids(ids: np.ndarray) -> None:
    """Refuse ids outside 0-18 and a mask that shows one class only."""
    _check_range(ids)
    if ids.min() == ids.max():
        raise DataError(f"constant mask (every pixel is {ids.min()})")


def mask_ids(mask: Any) -> np.ndarray:
    """One mask in any form -> class ids `(h, w)` int64.

    Args:
        mask: integers `h w`, `h w 1` or `1 h w`; colours of `PALETTE` as `h w 3` uint8; a PIL
            image or a path, as for `read_mask`, colours included.

    Raises:
        DataError: it is none of these; the message says what is wrong.
        FileNotFoundError: no such file.
    """
    if isinstance(mask, (str, Path)):
        path = Path(mask).expanduser()
        if not path.exists() and not path.is_symlink():
            raise FileNotFoundError(f"mask {path} does not exist")
        try:
            return image_ids(open_header(path, "mask")).astype(np.int64)
        except DataError as error:
            raise DataError(f"mask {path}: {error}") from error
    try:
        if isinstance(mask, Image.Image):
            return image_ids(mask).astype(np.int64)
        return _array_ids(_as_array(mask)).astype(np.int64)
    except DataError as error:
        raise DataError(f"mask: {error}") from error


def split_masks(masks: Tensor | np.ndarray) -> list[np.ndarray]:
    """An array of one mask, or of several along its first axis -> one array per mask.

    Args:
        masks: `h w`, `b h w` or `b 1 h w` integers; `h w 3` or `b h w 3` uint8 colours; `h w 1`.

    Raises:
        DataError: another shape, or one channel per class.
    """
    try:
        array = _as_array(masks)
        if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4)):
            return [array]
        if array.ndim == 4 and array.shape[1] == 1:
            array = array[:, 0]
        if not (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] in (1, 3, 4))):
            raise DataError(
                f"expected integer label ids of shape h w or b h w, got shape {array.shape}"
            )
        channels = array.ndim == 3 and len(array) == NUM_CLASSES and array.dtype.kind in "iu"
        if channels and array.size and (array.max(0) == 1).all() and (array.sum(0) == 1).all():
            raise DataError("one channel per class: give ids, mask.argmax(0)")
        return list(array)
    except DataError as error:
        raise DataError(f"mask: {error}") from error


def image_ids(image: Image.Image, snap_edges: bool = False) -> np.ndarray:
    """Class ids `(h, w)` uint8 of an image: of its palette, its grey values or its colours.

    Raises:
        DataError: a lossy format, transparent pixels, other ids or colours.
    """
    scale = _scale(image)
    _refuse_loss(image)
    image = upright(decoded(image, "mask"))
    if image.mode == "P":
        ids = _palette_ids(image, snap_edges)
    elif image.mode in ("RGB", "RGBA", "RGBX", "PA"):
        _refuse_transparency(image)
        ids = _colour_ids(np.asarray(image.convert("RGB")), snap_edges)
    elif image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16"):
        if image.mode == "LA":
            _refuse_transparency(image)
            image = image.getchannel(0)
        ids = np.asarray(image)
        if scale > 1:
            ids = ids // scale
        if ids.max() >= NUM_CLASSES and image.mode.startswith("I;16") and not (ids % 257).any():
            ids = ids // 257  # 8-bit ids that were stretched to 16 bits
    else:
        raise DataError(f"mask is {image.mode}: ids are a palette or grey image")
    _check_range(ids)
    return ids.astype(np.uint8)  # a copy, which may be written to


def labels_from_palette(
    rgb: np.ndarray,
    palette: tuple[tuple[int, int, int], ...] = PALETTE,
    tolerance: float = TOLERANCE,
    snap_edges: bool = False,
) -> np.ndarray:
    """Nearest palette colour of each pixel.

    Args:
        rgb: `(h, w, 3)` uint8.
        palette: colours of the classes, 0-255.
        tolerance: largest Euclidean distance of a pixel to its colour, in units of 0-255.
        snap_edges: give the pixels of smooth (anti-aliased) edges the class of the neighbour whose
            colour is nearest, instead of refusing them; lines of one pixel may be lost.

    Returns:
        Class ids `(h, w)` uint8.

    Raises:
        DataError: a pixel is too far from every colour: smooth edges, another palette
            (CelebAMask-HQ's own tools use three) or a lossy file.
    """
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
        raise DataError(f"colours are h w 3 uint8, got {rgb.dtype} of shape {rgb.shape}")
    known = np.array(palette)
    seen = np.zeros(2**24, bool)  # tables of all colours: sorting 4096 px takes seconds
    for part in _strips(rgb):
        seen[_packed(part)] = True
    colours = np.flatnonzero(seen)
    nearest = np.zeros(2**24, np.uint8)
    gap = np.zeros(len(colours))
    for part in np.array_split(np.arange(len(colours)), len(colours) // 2**16 + 1):
        values = np.stack([colours[part] >> 16, colours[part] >> 8 & 255, colours[part] & 255], -1)
        distance = np.linalg.norm(values[:, None].astype(float) - known[None], axis=-1)
        nearest[colours[part]] = distance.argmin(1)
        gap[part] = distance.min(1)
    ids = _looked_up(nearest, rgb)
    far = gap > (EDGE_TOLERANCE if snap_edges else tolerance)
    if not far.any():
        return ids
    seen[colours] = far
    edge = _looked_up(seen, rgb)
    numbers, counts = np.unique(_packed(rgb[edge]), return_counts=True)
    most = int(counts.argmax())
    smooth = edge.mean() < SMOOTH and counts[most] < 0.5 * edge.sum()
    smooth = smooth and _areas(rgb, edge).sum() < 0.1 * edge.sum()
    if snap_edges and smooth:
        return _snapped(rgb, ids, edge | ~_solid(ids, edge), known)
    if smooth:
        raise DataError(
            f"{edge.mean():.2%} of the pixels are {len(numbers)} colours between the palette's, as "
            "smooth (anti-aliased) edges have them: export without smoothing, or snap them to "
            "their neighbours (`convert-merged --snap-edges`, labels_from_palette(snap_edges=True))"
        )
    worst = int(numbers[most])
    raise DataError(
        f"colour {(worst >> 16, worst >> 8 & 255, worst & 255)} on {counts[most] / edge.size:.2%} "
        f"of the pixels is {gap[colours == worst][0]:.0f} away from every palette colour (limit "
        f"{tolerance:g}): another palette, or a mask saved as JPEG"
    )


def _strips(rgb: np.ndarray) -> list[np.ndarray]:
    """Views of some rows each, small enough for a processor's cache."""
    return np.array_split(rgb, max(1, rgb.shape[0] * rgb.shape[1] // 2**16))


def _packed(rgb: np.ndarray) -> np.ndarray:
    """Colours `h w 3` as one number each."""
    red, green, blue = (rgb[..., i].astype(np.intp) for i in range(3))
    return red << 16 | green << 8 | blue


def _looked_up(table: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    """The entry of a table of all colours for each pixel."""
    return np.concatenate([table[_packed(part)] for part in _strips(rgb)])


def _areas(rgb: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Which of these pixels have the colour of all their eight neighbours: no edges are so."""
    inside = edge[1:-1, 1:-1].copy()
    centre = rgb[1:-1, 1:-1]
    for dy, dx in NEIGHBOURS:
        moved = rgb[1 + dy : len(rgb) - 1 + dy, 1 + dx : rgb.shape[1] - 1 + dx]
        inside &= (moved == centre).all(-1)
    return inside


def _solid(ids: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Which pixels lie in a square of one class without edge pixels.

    Others may be part of an edge even in a palette colour: from black to hair it passes l_lip. The
    square has a side of 2 pixels, or of 3 where edges are wider than two.
    """
    side = 2 if not _eroded(edge).any() else 3
    labels = np.where(edge, NUM_CLASSES, ids)
    windows = np.lib.stride_tricks.sliding_window_view(labels, (side, side))
    square = (windows == windows[..., :1, :1]).all((-2, -1)) & (windows[..., 0, 0] != NUM_CLASSES)
    solid = np.zeros(ids.shape, bool)
    for dy in range(side):
        for dx in range(side):
            solid[dy : dy + square.shape[0], dx : dx + square.shape[1]] |= square
    return solid


def _eroded(edge: np.ndarray) -> np.ndarray:
    """Without the pixels at its rim; a line of two pixels or fewer is gone."""
    inner = edge.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(edge, step, axis)
    return inner


def _snapped(rgb: np.ndarray, ids: np.ndarray, edge: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Ids in which each edge pixel has the class of the neighbour with the nearest colour."""
    for _ in range(ROUNDS):
        rows, columns = np.nonzero(edge)
        best = np.full(len(rows), np.inf)
        label = ids[rows, columns]
        for dy, dx in NEIGHBOURS:
            y = np.clip(rows + dy, 0, ids.shape[0] - 1)
            x = np.clip(columns + dx, 0, ids.shape[1] - 1)
            gap = np.linalg.norm(rgb[rows, columns].astype(float) - palette[ids[y, x]], axis=-1)
            closer = ~edge[y, x] & (gap < best)
            best[closer] = gap[closer]
            label[closer] = ids[y, x][closer]
        reached = np.isfinite(best)
        ids[rows[reached], columns[reached]] = label[reached]
        edge[rows[reached], columns[reached]] = False
        if not edge.any():
            return ids
    raise DataError(
        f"{edge.mean():.2%} of the pixels have no palette colour and no neighbour within {ROUNDS} "
        "pixels that has one: another palette"
    )


def _palette_ids(image: Image.Image, snap_edges: bool) -> np.ndarray:
    """Ids of a palette image: its indices where its palette is ours or grey, else its colours."""
    indices = np.asarray(image)
    colours = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    used = np.flatnonzero(image.histogram())
    used = used[used < len(colours)]
    shown = colours[used]
    grey = (shown == used[:, None]).all()
    if grey or ((used < NUM_CLASSES).all() and (shown == np.array(PALETTE)[used]).all()):
        return indices
    _refuse_transparency(image)
    rgb = np.asarray(image.convert("RGB"))
    low = shown.max(initial=0) < NUM_CLASSES and len(np.unique(shown[:, 0])) == len(shown)
    if low and (shown == shown[:, :1]).all():
        return rgb[..., 0]  # a grey image of ids that became a palette image
    if snap_edges:
        return labels_from_palette(rgb, snap_edges=True)
    distance = np.linalg.norm(shown[:, None].astype(float) - np.array(PALETTE)[None], axis=-1)
    # two colours for one class would be two classes of another palette
    classes = {tuple(c): int(d.argmin()) for c, d in zip(shown.tolist(), distance, strict=True)}
    unique = len(set(classes.values())) == len(classes) and (len(classes) > 1 or len(used) == 1)
    if unique and distance.min(1).max() <= PALETTE_TOLERANCE:
        return labels_from_palette(rgb)
    raise DataError(
        "another palette: the file's colours are neither ours in any order nor grey, so nobody "
        "knows what its indices mean; save ids as a grey PNG"
    )


def _colour_ids(rgb: np.ndarray, snap_edges: bool = False) -> np.ndarray:
    """Ids of palette colours, or of equal channels that hold ids."""
    low = rgb.max(initial=0) < NUM_CLASSES
    if low and (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return rgb[..., 0]
    return labels_from_palette(rgb, snap_edges=snap_edges)


def _as_array(values: Any) -> np.ndarray:
    """A tensor or array of whatever layout as a plain array."""
    if isinstance(values, Tensor):
        if values.device.type == "meta" or values.layout != torch.strided or values.is_quantized:
            raise DataError(f"a {values.layout} tensor on {values.device} has no plain values")
        kind = values.dtype
        if kind.is_floating_point or kind.is_complex:
            raise DataError(f"expected integer label ids, got {kind}: round them, or give .long()")
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise DataError(
            f"a {type(values).__name__} is not a mask; give a tensor, an array, a PIL image or a "
            "path"
        )
    return values


def _array_ids(array: np.ndarray) -> np.ndarray:
    """Ids of one array `h w`, `h w 1`, `1 h w`, or of `h w 3` colours."""
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise DataError("a masked array has pixels without a class: fill them")
    if array.dtype.kind not in "iu":
        hint = "name the class: mask * 13 is hair" if array.dtype.kind == "b" else "use int64"
        raise DataError(f"expected integer label ids, got {array.dtype}: {hint}")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    elif array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    elif array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8:
        return _colour_ids(np.ascontiguousarray(array))
    if array.ndim != 2 or not array.size:
        raise DataError(f"expected integer label ids of shape h w, got shape {array.shape}")
    _check_range(array)
    return array


def _check_range(ids: np.ndarray) -> None:
    if ids.size == 0:
        raise DataError("the mask has no pixels")
    low = int(ids.min())
    high = int(ids.max())
    last = NUM_CLASSES - 1
    if low < 0 or high > last:
        wrong = f"label {high} above {last}" if high > last else f"label {low} below 0"
        raise DataError(f"{wrong}: label ids must be 0-{last}, found {low}-{high}")


def _scale(image: Image.Image) -> int:
    """By which factor Pillow scales, or has scaled, the grey values of an image."""
    tiles = getattr(image, "tile", ())
    file = getattr(image, "filename", "")
    if not tiles and file and image.format == "PNG" and image.mode == "L":  # decoded already
        try:
            with Image.open(file) as again:
                tiles = again.tile
        except OSError:  # it is gone
            pass
    for tile in tiles:
        mode = tile[3] if isinstance(tile[3], str) else next(iter(tile[3] or ()), "")
        if mode in LEVELS:
            return LEVELS[mode]
        if mode == "LA;16B":
            raise DataError("16-bit grey with transparency: export grey without it")
    return 1


def _refuse_loss(image: Image.Image) -> None:
    compression = image.info.get("compression")
    if image.format in LOSSY or compression == "jpeg" or image.info.get("lossless") is False:
        raise DataError(f"mask is {image.format}: its loss changes ids; export PNG")


def _refuse_transparency(image: Image.Image) -> None:
    if not image.has_transparency_data:
        return
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    if (alpha < 255).any():
        raise DataError(
            f"{(alpha < 255).mean():.2%} of the pixels are transparent, which is no class: export "
            "without transparency"
        )
