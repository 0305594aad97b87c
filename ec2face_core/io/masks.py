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
from .paths import user_file
from .pictures import decoded, open_header, raw_mode, upright
from .report import DataError

LOSSY = ("JPEG", "MPO")
TOLERANCE = 32.0  # Euclidean distance of a colour to its palette colour, 0-255
PALETTE_TOLERANCE = 8.0  # the same for the few colours of a palette image
SMOOTH = 0.4  # largest share of edge pixels in a mask with smooth edges
NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
LEVELS = {"L;2": 85, "L;4": 17}  # Pillow scales grey images of few bits by these factors


def read_mask(path: Path, colours: bool = False) -> np.ndarray:
    """Class ids of a mask file, `(h, w)` uint8, of two classes or more.

    Args:
        path: a palette or grey image without loss.
        colours: also read RGB images in the colours of `PALETTE`.

    Raises:
        DataError: it cannot be read, holds other ids, or shows one class only.
    """
    image = open_header(path, "mask")
    _scale(image)  # refuses what Pillow would halve
    if not colours and image.mode in ("RGB", "RGBA"):
        raise DataError(f"mask is {image.mode}, not ids: `convert-merged` turns colours into ids")
    ids = image_ids(image)
    check_ids(ids)
    return ids


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
        FileNotFoundError: no such file, or a path that cannot be one.
    """
    if isinstance(mask, (str, Path)):
        path = user_file(mask, "mask")
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


def image_ids(image: Image.Image) -> np.ndarray:
    """Class ids `(h, w)` uint8 of an image: of its palette, its grey values or its colours.

    Raises:
        DataError: a lossy format, transparent pixels, other ids or colours.
    """
    values = image_values(image)
    if values.ndim == 3 and image.mode == "P":
        _refuse_foreign_palette(image)
    ids = labels_from_palette(values) if values.ndim == 3 else values
    _check_range(ids)
    return ids.astype(np.uint8)  # a copy, which may be written to


def image_values(image: Image.Image) -> np.ndarray:
    """What an image says of each pixel: integers `(h, w)`, or colours `(h, w, 3)` uint8.

    Raises:
        DataError: a lossy format, colours with transparent pixels, or another kind of image.
    """
    if 0 in image.size:
        raise DataError("the mask has no pixels")
    scale = _scale(image)
    refuse_loss(image)
    image = upright(decoded(image, "mask"))
    if image.mode == "P":
        return _palette_values(image)
    if image.mode in ("RGB", "RGBA", "RGBX", "PA"):
        refuse_transparency(image)
        return _colour_values(np.asarray(image.convert("RGB")))
    if image.mode not in ("1", "L", "LA", "I") and not image.mode.startswith("I;16"):
        raise DataError(f"mask is {image.mode}: ids are a palette or grey image")
    if image.mode == "LA":
        refuse_transparency(image)
        image = image.getchannel(0)
    ids = np.asarray(image)
    if scale > 1:
        ids = ids // scale
    if ids.max() >= NUM_CLASSES and image.mode.startswith("I;16") and not (ids % 257).any():
        ids = ids // 257  # 8-bit ids that were stretched to 16 bits
    return ids


def labels_from_palette(rgb: np.ndarray) -> np.ndarray:
    """Class of the palette colour that is nearest to each pixel.

    Args:
        rgb: `(h, w, 3)` uint8.

    Returns:
        Class ids `(h, w)` uint8.

    Raises:
        DataError: a pixel is too far from every colour: smooth edges, another palette
            (CelebAMask-HQ's own tools use three) or a lossy file.
    """
    ids, distance = nearest_colours(rgb)
    far = distance > TOLERANCE
    if not far.any():
        return ids
    if is_smooth(rgb, far):
        raise DataError(
            f"{far.mean():.2%} of the pixels are {len(np.unique(_packed(rgb[far])))} colours "
            "between the palette's, as smooth (anti-aliased) edges have them: export without "
            "smoothing, or snap them to their neighbours (`convert-merged --snap-edges`, "
            "ec2face_lab.prepare.snapping.snap_edges)"
        )
    raise foreign_colour(rgb, distance, far)


def nearest_colours(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The palette colour that is nearest to each pixel.

    Args:
        rgb: `(h, w, 3)` uint8.

    Returns:
        Class ids `(h, w)` uint8, and Euclidean distances `(h, w)` float32, in units of 0-255.

    Raises:
        DataError: an array of another shape or type.
    """
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
        raise DataError(f"colours are h w 3 uint8, got {rgb.dtype} of shape {rgb.shape}")
    known = np.array(PALETTE)
    seen = np.zeros(2**24, bool)  # tables of all colours: sorting 4096 px takes seconds
    for part in _strips(rgb):
        seen[_packed(part)] = True
    colours = np.flatnonzero(seen)
    nearest = np.zeros(2**24, np.uint8)
    gap = np.zeros(2**24, np.float32)
    for part in np.array_split(colours, len(colours) // 2**16 + 1):
        values = np.stack([part >> 16, part >> 8 & 255, part & 255], -1)
        distance = np.linalg.norm(values[:, None].astype(float) - known[None], axis=-1)
        nearest[part] = distance.argmin(1)
        gap[part] = distance.min(1)
    return _looked_up(nearest, rgb), _looked_up(gap, rgb)


def is_smooth(rgb: np.ndarray, edge: np.ndarray) -> bool:
    """Whether the pixels `edge` `(h, w)` bool of another colour are those of smooth edges.

    They are few, of many colours, and do not lie in areas of one colour.
    """
    _, counts = np.unique(_packed(rgb[edge]), return_counts=True)
    few = edge.mean() < SMOOTH and counts.max() < 0.5 * edge.sum()
    return bool(few and _areas(rgb, edge).sum() < 0.1 * edge.sum())


def foreign_colour(rgb: np.ndarray, distance: np.ndarray, far: np.ndarray) -> DataError:
    """An error that names the most frequent colour of the pixels `far` `(h, w)` bool.

    distance: of each pixel to the palette, as `nearest_colours` has it.
    """
    numbers, counts = np.unique(_packed(rgb[far]), return_counts=True)
    most = int(counts.argmax())
    worst = int(numbers[most])
    gap = distance[_packed(rgb) == worst][0]
    return DataError(
        f"colour {(worst >> 16, worst >> 8 & 255, worst & 255)} on {counts[most] / far.size:.2%} "
        f"of the pixels is {gap:.0f} away from every palette colour (limit {TOLERANCE:g}): "
        "another palette, or a mask saved as JPEG"
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


def _palette_values(image: Image.Image) -> np.ndarray:
    """Indices of a palette image where its palette is ours or grey, else its colours."""
    indices = np.asarray(image)
    used, shown = _used_palette(image)
    grey = (shown == used[:, None]).all()
    if grey or ((used < NUM_CLASSES).all() and (shown == np.array(PALETTE)[used]).all()):
        return indices
    refuse_transparency(image)
    rgb = np.asarray(image.convert("RGB"))
    low = shown.max(initial=0) < NUM_CLASSES and len(np.unique(shown[:, 0])) == len(shown)
    if low and (shown == shown[:, :1]).all():
        return rgb[..., 0]  # a grey image of ids that became a palette image
    return rgb


def _used_palette(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Indices that a palette image uses, `(n,)`, and their colours, `(n, 3)`."""
    colours = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    used = np.flatnonzero(image.histogram())
    used = used[used < len(colours)]
    return used, colours[used]


def _refuse_foreign_palette(image: Image.Image) -> None:
    """Refuse a palette image whose colours are not those of `PALETTE`, in whatever order."""
    _, shown = _used_palette(image)
    distance = np.linalg.norm(shown[:, None].astype(float) - np.array(PALETTE)[None], axis=-1)
    # two colours for one class would be two classes of another palette
    classes = {tuple(c): int(d.argmin()) for c, d in zip(shown.tolist(), distance, strict=True)}
    unique = len(set(classes.values())) == len(classes) and (len(classes) > 1 or len(shown) == 1)
    if unique and distance.min(1).max() <= PALETTE_TOLERANCE:
        return
    raise DataError(
        "another palette: the file's colours are neither ours in any order nor grey, so nobody "
        "knows what its indices mean; save ids as a grey PNG"
    )


def _colour_values(rgb: np.ndarray) -> np.ndarray:
    """Equal channels that hold ids, `(h, w)`; other colours as they are."""
    low = rgb.max(initial=0) < NUM_CLASSES
    if low and (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return rgb[..., 0]
    return rgb


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
        values = _colour_values(np.ascontiguousarray(array))
        return labels_from_palette(values) if values.ndim == 3 else values
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
    mode = raw_mode(image)
    if mode == "LA;16B":
        raise DataError("16-bit grey with transparency: export grey without it")
    return LEVELS.get(mode, 1)


def refuse_loss(image: Image.Image) -> None:
    """Refuse an image of a lossy format."""
    compression = image.info.get("compression")
    if image.format in LOSSY or compression == "jpeg" or image.info.get("lossless") is False:
        raise DataError(f"mask is {image.format}: its loss changes ids; export PNG")


def refuse_transparency(image: Image.Image) -> None:
    """Refuse an image with transparent pixels."""
    if not image.has_transparency_data:
        return
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    if (alpha < 255).any():
        raise DataError(
            f"{(alpha < 255).mean():.2%} of the pixels are transparent, which is no class: export "
            "without transparency"
        )
