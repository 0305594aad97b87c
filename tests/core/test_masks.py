"""Every label map that people bring gives the right ids, or is refused with the reason."""

from __future__ import annotations

import struct
import time
import zlib

import numpy as np
import pytest
import torch
from face_files import label_map
from PIL import Image

from ec2face_core.attributes import NUM_CLASSES, PALETTE
from ec2face_core.io import pictures
from ec2face_core.io.masks import (
    image_ids,
    labels_from_palette,
    mask_ids,
    read_mask,
    split_masks,
)
from ec2face_core.io.report import DataError

FLAT = [value for rgb in PALETTE for value in rgb]
COLOURS = np.array(PALETTE, np.uint8)


@pytest.fixture
def ids() -> np.ndarray:
    """Every class, in blocks of 4 x 4 pixels; not symmetric."""
    blocks = np.arange(64, dtype=np.uint8).reshape(8, 8) % NUM_CLASSES
    return blocks.repeat(4, 0).repeat(4, 1)


def palette_image(indices: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(palette)
    return image


def written(tmp_path, image: Image.Image, name: str = "0.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def both(path) -> np.ndarray:
    """The ids of a file, equal through the data sets' reader, the pipeline's, and an open image."""
    ids = read_mask(path, colours=True)
    assert (mask_ids(path) == ids).all() and (mask_ids(str(path)) == ids).all()
    with Image.open(path) as image:
        assert (mask_ids(image) == ids).all()
    return ids


# --------------------------------------------------------------------------------- ids in files


def test_our_palette_and_grey_images(ids, tmp_path):
    assert (both(written(tmp_path, palette_image(ids, FLAT))) == ids).all()
    assert (both(written(tmp_path, Image.fromarray(ids))) == ids).all()
    assert (both(written(tmp_path, Image.fromarray(COLOURS[ids]))) == ids).all()
    assert (both(written(tmp_path, Image.fromarray(COLOURS[ids]).convert("RGBA"))) == ids).all()


@pytest.mark.parametrize("name", ["0.bmp", "0.tif", "0.gif", "0.webp"])
def test_other_formats_without_loss(ids, tmp_path, name):
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    assert (both(written(tmp_path, Image.fromarray(COLOURS[ids]), name, **options)) == ids).all()


def test_our_colours_in_another_order(ids, tmp_path):
    order = np.random.default_rng(0).permutation(NUM_CLASSES)
    shuffled = COLOURS[order]
    indices = np.argsort(order)[ids]
    assert (COLOURS[ids] == shuffled[indices]).all() and (indices != ids).any()
    path = written(tmp_path, palette_image(indices, shuffled.ravel().tolist()))
    assert (both(path) == ids).all()
    quantized = Image.fromarray(COLOURS[ids]).quantize(NUM_CLASSES)  # what an editor does
    assert (both(written(tmp_path, quantized)) == ids).all()
    assert (image_ids(quantized) == ids).all()


def test_our_colours_beyond_index_18(ids, tmp_path):
    palette = [0] * (3 * 200) + FLAT
    assert (both(written(tmp_path, palette_image(ids + 200, palette))) == ids).all()


def test_a_grey_palette_holds_ids(ids, tmp_path):
    ramp = np.arange(256).repeat(3).tolist()
    assert (both(written(tmp_path, palette_image(ids, ramp))) == ids).all()


def test_grey_ids_in_a_palette_of_any_order(ids, tmp_path):
    quantized = Image.fromarray(ids).quantize(NUM_CLASSES)
    assert (both(written(tmp_path, quantized)) == ids).all()


def test_a_palette_that_ends_before_the_ids(ids):
    bare = Image.new("P", ids.shape)
    bare.frombytes(ids.tobytes())
    assert (image_ids(bare) == ids).all()


VOC = [  # the colour map of Pascal VOC and labelme
    sum(((i >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
    for i in range(256)
    for channel in range(3)
]


@pytest.mark.parametrize(
    "palette",
    [VOC, [0] * 768, (np.arange(256) * 5 % 256).repeat(3).tolist(), [*range(256)] * 3],
    ids=["voc", "black", "scaled-grey", "odd"],
)
def test_foreign_palettes_are_refused(ids, tmp_path, palette):
    path = written(tmp_path, palette_image(ids, palette))
    for read in (read_mask, mask_ids):
        with pytest.raises(DataError, match="another palette"):
            read(path)


def test_a_palette_that_is_slightly_off(ids, tmp_path):
    near = (np.array(FLAT) + 3).clip(0, 255).tolist()
    assert (both(written(tmp_path, palette_image(ids, near))) == ids).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_and_palette_pngs_of_few_bits(tmp_path, bits):
    small = label_map() % 2**bits
    (tmp_path / "0.png").write_bytes(small_png(small, bits))
    assert (both(tmp_path / "0.png") == small).all()
    with Image.open(tmp_path / "0.png") as image:
        image.load()  # Pillow has scaled its values by now
        assert (mask_ids(image) == small).all()
    assert (both(written(tmp_path, palette_image(small, FLAT), bits=bits)) == small).all()


def whole_png(header: bytes, rows: bytes) -> bytes:
    """A PNG of a kind that Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return pictures.PNG_START + body


def small_png(levels: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits."""
    shifts = np.arange(8 // bits - 1, -1, -1) * bits
    packed = (levels.reshape(len(levels), -1, 8 // bits).astype(int) << shifts).sum(-1)
    rows = b"".join(b"\0" + bytes(row) for row in packed.astype(np.uint8))
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, 0, 0, 0, 0)
    return whole_png(header, rows)


def test_sixteen_and_thirty_two_bits(ids, tmp_path):
    assert (both(written(tmp_path, Image.fromarray(ids.astype(np.uint16)))) == ids).all()
    assert (both(written(tmp_path, Image.fromarray(ids.astype(np.uint16) * 257))) == ids).all()
    assert (both(written(tmp_path, Image.fromarray(ids.astype(np.int32)), "0.tif")) == ids).all()
    with pytest.raises(DataError, match="label 300 above 18"):
        mask_ids(Image.fromarray(np.array([[0, 300]], np.uint16)))


def test_ids_in_three_equal_channels(ids, tmp_path):
    path = written(tmp_path, Image.fromarray(np.dstack([ids] * 3)))  # cv2.imwrite of a colour array
    assert (both(path) == ids).all()


def test_grey_with_transparency(ids, tmp_path):
    layer = Image.fromarray(ids)
    layer.putalpha(255)
    assert layer.mode == "LA" and (both(written(tmp_path, layer)) == ids).all()
    layer.putalpha(Image.fromarray((ids > 0).astype(np.uint8) * 255))
    with pytest.raises(DataError, match="transparent"):
        read_mask(written(tmp_path, layer))


def test_sixteen_bit_grey_with_transparency_is_refused(ids, tmp_path):
    """Pillow would keep the upper halves of the values, that is, background everywhere."""
    pairs = np.dstack([ids, np.full_like(ids, 255)]).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pairs)
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], 16, 4, 0, 0, 0)
    (tmp_path / "0.png").write_bytes(whole_png(header, rows))
    for read in (read_mask, mask_ids):
        with pytest.raises(DataError, match="16-bit grey with transparency"):
            read(tmp_path / "0.png")


def deep_png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of 2 (grey and alpha), 3 or 4 channels."""
    kind = {2: 4, 3: 2, 4: 6}[values.shape[-1]]
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    return whole_png(header, rows)


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours_that_hold_ids_are_refused(ids, tmp_path, channels):
    """Pillow keeps the upper halves of the values, that is, background everywhere."""
    layers = [ids] * 3 + [np.full_like(ids, 255)] * (channels - 3)
    path = tmp_path / "0.png"
    path.write_bytes(deep_png(np.dstack(layers)))
    for read in (lambda p: read_mask(p, colours=True), mask_ids):
        with pytest.raises(DataError, match="16-bit values that are all below 256"):
            read(path)
    with Image.open(path) as image:
        image.load()  # nothing but the file tells by now
        with pytest.raises(DataError, match="16-bit values"):
            mask_ids(image)


def test_sixteen_bit_colours_of_the_palette_are_read(ids, tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(deep_png(COLOURS[ids].astype(np.uint16) * 257))
    assert (both(path) == ids).all()
    path.write_bytes(deep_png(np.dstack([ids.astype(np.uint16) * 257] * 3)))
    assert (both(path) == ids).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16", "1", "RGBA"])
def test_an_image_without_pixels_is_refused(mode):
    with pytest.raises(DataError, match="mask: the mask has no pixels"):
        mask_ids(Image.new(mode, (0, 0)))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~nobody-of-this-name/x.png", "mask: ~nobody-of-this-name/x.png: Could not determine"),
        ("", "mask: an empty path"),
        ("a" * 5000, r"mask a{60}\.\.\.a{60}: File name too long"),
        ("a\0b.png", "null"),
        ("/dev/null/x.png", "mask /dev/null/x.png: Not a directory"),
    ],
)
def test_what_can_be_no_path_is_refused(path, reason):
    with pytest.raises(FileNotFoundError, match=reason) as caught:
        mask_ids(path)
    assert len(str(caught.value)) < 300


def test_transparent_pixels_of_colour_masks_are_refused(ids, tmp_path):
    layer = Image.fromarray(COLOURS[ids]).convert("RGBA")
    layer.putalpha(0)
    for mask in (layer, written(tmp_path, layer)):
        with pytest.raises(DataError, match=r"100\.00% of the pixels are transparent"):
            mask_ids(mask)
    marked = written(tmp_path, palette_image(ids, FLAT), transparency=0)  # ids stay known
    assert (both(marked) == ids).all()


@pytest.mark.parametrize("name", ["0.jpg", "0.png"])
def test_jpegs_are_refused_whatever_their_name(ids, tmp_path, name):
    for picture in (Image.fromarray(ids), Image.fromarray(COLOURS[ids])):
        path = written(tmp_path, picture, name, format="JPEG", quality=95)
        for read in (read_mask, mask_ids):
            with pytest.raises(DataError, match=r"JPEG: its loss changes ids; export PNG|not ids"):
                read(path)
        with Image.open(path) as image, pytest.raises(DataError, match="JPEG"):
            mask_ids(image)


def test_lossy_webp_is_refused(ids, tmp_path):
    path = written(tmp_path, Image.fromarray(COLOURS[ids]), "0.webp", quality=90)
    with pytest.raises(DataError, match="WEBP: its loss"):
        mask_ids(path)


def test_masks_are_turned_as_pictures_are(ids, tmp_path):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    stored = palette_image(ids, FLAT).transpose(Image.Transpose.ROTATE_90)
    assert (both(written(tmp_path, stored, exif=exif)) == ids).all()


def test_what_is_no_mask_is_refused(ids, tmp_path):
    with pytest.raises(DataError, match="mask is F"):
        mask_ids(Image.fromarray(ids.astype(np.float32)))
    with pytest.raises(DataError, match="mask is CMYK"):
        mask_ids(Image.fromarray(COLOURS[ids]).convert("CMYK"))
    with pytest.raises(DataError, match="label 255 above 18"):
        mask_ids(Image.fromarray((ids > 3).astype(np.uint8) * 255))
    with pytest.raises(DataError, match="constant mask"):
        read_mask(written(tmp_path, Image.fromarray(np.full((8, 8), 3, np.uint8))))
    with pytest.raises(DataError, match="mask is RGB, not ids"):
        read_mask(written(tmp_path, Image.fromarray(COLOURS[ids])))
    path = tmp_path / "0.png"
    path.write_bytes(path.read_bytes()[:-20])
    for read in (read_mask, mask_ids):
        with pytest.raises(DataError, match="unreadable mask"):
            read(path)
    with pytest.raises(DataError, match=r"0\.png: unreadable"):
        mask_ids(path)  # this one names the file, its caller cannot
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        mask_ids(tmp_path / "gone.png")


def test_home_is_expanded(ids, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, Image.fromarray(ids))
    assert (mask_ids("~/0.png") == ids).all()


# -------------------------------------------------------------------------------------- colours


def test_4096_pixels_take_less_than_a_second():
    ids = np.random.default_rng(0).integers(0, NUM_CLASSES, (512, 512)).repeat(8, 0).repeat(8, 1)
    rgb = COLOURS[ids]
    start = time.process_time()
    labels = labels_from_palette(rgb)
    assert time.process_time() - start < 1
    assert (labels == ids).all()


def test_smooth_edges_are_told(tmp_path):
    large = Image.fromarray(COLOURS[label_map(128)]).resize((512, 512), Image.Resampling.BICUBIC)
    with pytest.raises(DataError, match=r"smooth .*edges.*snap"):
        labels_from_palette(np.asarray(large))
    with pytest.raises(DataError, match="smooth"):
        mask_ids(written(tmp_path, large))


def test_another_palette_is_no_smooth_edge(ids):
    rgb = COLOURS[ids].copy()
    rgb[ids == 4] = (128, 128, 128)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for colours in (rgb, noise):
        with pytest.raises(DataError, match="another palette"):
            labels_from_palette(colours)


def test_a_mask_that_was_a_jpeg_is_told(ids, tmp_path):
    path = written(tmp_path, Image.fromarray(COLOURS[ids]), "0.jpg", quality=75)
    with Image.open(path) as image, pytest.raises(DataError, match=r"another palette|smooth"):
        labels_from_palette(np.asarray(image))


@pytest.mark.parametrize(
    "rgb", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_colours_are_uint8_triples(rgb):
    with pytest.raises(DataError, match="h w 3 uint8"):
        labels_from_palette(rgb)


# --------------------------------------------------------------------------------------- arrays


INTEGERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, ">u2"]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_any_type_and_layout(ids, kind):
    array = ids.astype(kind)
    forms = [
        array, np.asfortranarray(array), array[::-1, ::-1][::-1, ::-1], array[..., None],
        array[None], np.ma.masked_array(array),
    ]  # fmt: skip
    for form in forms:
        assert (mask_ids(form) == ids).all() and mask_ids(form).dtype == np.int64
    assert (mask_ids(array[:, ::-1]) == ids[:, ::-1]).all()
    array.flags.writeable = False
    assert (mask_ids(array) == ids).all()


@pytest.mark.parametrize(
    "kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
def test_tensors_of_any_integer_type(ids, kind):
    tensor = torch.from_numpy(ids.astype(np.int64)).to(kind)
    assert (mask_ids(tensor) == ids).all()
    if kind != torch.uint16:
        assert (mask_ids(tensor.T.contiguous().T) == ids).all()


def test_colours_as_an_array(ids):
    assert (mask_ids(COLOURS[ids]) == ids).all()
    assert [m.shape for m in split_masks(COLOURS[ids])] == [(32, 32, 3)]
    assert [m.shape for m in split_masks(np.stack([COLOURS[ids]] * 2))] == [(32, 32, 3)] * 2


@pytest.mark.parametrize(
    ("shape", "count"),
    [((32, 32), 1), ((32, 32, 1), 1), ((1, 32, 32), 1), ((5, 32, 32), 5), ((5, 1, 32, 32), 5)],
)
def test_arrays_of_several_masks(ids, shape, count):
    masks = split_masks(np.stack([ids] * count).reshape(shape))
    assert len(masks) == count and all((mask_ids(mask) == ids).all() for mask in masks)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((4, 4), np.float32), "expected integer label ids, got float32"),
        (np.zeros((4, 4), np.float16), "expected integer label ids, got float16"),
        (np.zeros((4, 4), bool), "got bool: name the class"),
        (np.zeros((4, 4), complex), "expected integer label ids"),
        (np.zeros((4, 4), object), "expected integer label ids, got object"),
        (np.zeros((4, 4), "U1"), "expected integer label ids"),
        (np.zeros((0, 4), np.uint8), "shape h w"),
        (np.zeros(4, np.uint8), "shape h w"),
        (np.uint8(3), "a uint8 is not a mask"),
        (np.array(3), "shape h w"),
        (np.full((4, 4), 19), "label 19 above 18"),
        (np.full((4, 4), -1), "label -1 below 0"),
        (np.full((4, 4), 2**63, np.uint64), "above 18"),
        (np.ma.masked_equal(np.eye(4, dtype=int), 1), "masked array"),
        (torch.zeros(4, 4), r"expected integer label ids, got torch\.float32"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), "expected integer label ids"),
        (torch.zeros(4, 4, dtype=torch.bool), "got bool"),
        (torch.zeros(4, 4, dtype=torch.int64, device="meta"), "meta has no plain values"),
        (torch.eye(4).long().to_sparse(), "has no plain values"),
        ([[0, 1], [2, 3]], "a list is not a mask"),
        (1.5, "a float is not a mask"),
        ({}, "a dict is not a mask"),
    ],
)
def test_other_arrays_are_refused_in_a_sentence(mask, reason):
    with pytest.raises(DataError, match=f"mask: .*{reason}"):
        mask_ids(mask)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_one_channel_per_class_is_refused(ids, dtype):
    channels = (ids == np.arange(NUM_CLASSES)[:, None, None]).astype(dtype)
    with pytest.raises(DataError, match=r"mask\.argmax\(0\)"):
        split_masks(channels)
    with pytest.raises(DataError, match="got shape"):
        split_masks(np.zeros((2, 3, 4, 5), np.uint8))
    assert len(split_masks(np.stack([ids] * NUM_CLASSES))) == NUM_CLASSES  # that many masks
