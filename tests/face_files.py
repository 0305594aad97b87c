"""Schematic faces as files: what tests of data folders, converters and photos are made of."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ec2face_core.attributes import CLASS_ID, FACER_TO_CELEBAMASK, PALETTE
from ec2face_core.io.report import DataError, Report
from ec2face_lab.prepare.convert import from_merged


def label_map(size: int = 16, shift: int = 0) -> np.ndarray:
    """A schematic face, sides as CelebAMask-HQ has them: l_ at image right; uint8 `(size, size)`.

    shift: pixels to the right, of 16.
    """
    boxes = {
        "skin": (slice(4, 14), slice(3, 13)),
        "hair": (slice(0, 4), slice(2, 14)),
        "neck": (slice(14, 16), slice(5, 11)),
        "r_eye": (6, slice(4, 7)),
        "l_eye": (6, slice(9, 12)),
        "r_brow": (5, slice(4, 7)),
        "l_brow": (5, slice(9, 12)),
        "nose": (slice(8, 10), slice(7, 9)),
        "mouth": (11, slice(6, 10)),
    }
    ids = np.zeros((16, 16), np.uint8)
    for name, box in boxes.items():
        ids[box] = CLASS_ID[name]
    return np.roll(ids, shift, axis=1).repeat(size // 16, 0).repeat(size // 16, 1)


def save_mask(path: Path, ids: np.ndarray) -> None:
    """A palette PNG."""
    mask = Image.fromarray(ids)
    mask.putpalette([value for rgb in PALETTE for value in rgb])
    mask.save(path)


def save_image(path: Path, size: int, seed: int) -> None:
    """A square of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def merged(folder: Path, names=("0", "1", "2", "3"), size: int = 16, seed: int = 0) -> Path:
    """Folders of images and masks, as `convert-merged` takes them."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number, name in enumerate(names):
        save_image(folder / "images" / f"{name}.png", size, seed + number)
        save_mask(folder / "masks" / f"{name}.png", label_map(size, number % 2))
    return folder


def convert(source: Path, **options) -> Report:
    """Convert such folders into `out` beside them, at 16 px."""
    settings = {"size": 16, "progress": False, **options}
    return from_merged(source, source.parent / "out", **settings)


def refusal(source: Path, **options) -> str:
    """Why such folders are not converted."""
    with pytest.raises(DataError) as caught:
        convert(source, **options)
    assert not (source.parent / "out").exists()
    return str(caught.value)


def coloured(ids: np.ndarray, scale: int = 2) -> Image.Image:
    """A mask in the palette's colours: a picture that a parser by colours can read."""
    return Image.fromarray(np.array(PALETTE, np.uint8)[ids].repeat(scale, 0).repeat(scale, 1))


def write_root(folder: Path) -> Path:
    """Six faces of 16 px in the data layout: four of train, two of test."""
    for kind in ("image", "mask", "text"):
        (folder / kind).mkdir(parents=True)
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "caption_index", "caption"])
        for i in range(6):
            save_image(folder / "image" / f"{i}.png", 16, i)
            save_mask(folder / "mask" / f"{i}.png", label_map(shift=i % 2))
            (folder / "text" / f"{i}.txt").write_text(f"First, {i}.\nSecond of {i}.\n")
            caption = f"Second of {i}." if i % 2 else f"First, {i}."
            writer.writerow([i, "train" if i < 4 else "test", i % 2, caption])
    return folder


def canonical_points(side: int) -> np.ndarray:
    """The five points whose FFHQ frame is exactly a frame of this side, `(5, 2)` x, y."""
    centre = side / 2 - 0.5
    unit = side / 3.6
    eyes = centre - 0.1 * unit
    points = [(centre - side / 8, eyes), (centre + side / 8, eyes), (centre, eyes + unit / 2)]
    mouth = [(centre - side / 12, eyes + unit), (centre + side / 12, eyes + unit)]
    return np.array(points + mouth)


def detect(images: Tensor) -> dict[str, Tensor]:
    """A detector that sees one face in every photo, which fills it."""
    points = torch.as_tensor(canonical_points(images.shape[-1]), dtype=torch.float32)[None]
    return {"points": points, "rects": torch.cat([points.amin(1), points.amax(1)], 1)}


class ColourParser(nn.Module):
    """FaRL's contract; a pixel's class is its nearest palette colour, by a 1 x 1 product."""

    def __init__(self, colours: Tensor) -> None:
        super().__init__()
        self.register_buffer("colours", colours)
        self.register_buffer("lengths", colours.square().sum(1))

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = 2 * torch.einsum("bchw,kc->bkhw", image, self.colours)
        aux: dict[str, Tensor] = {}
        return 100 * (logits - self.lengths[None, :, None, None]), aux


def save_colour_parser(path: Path, order=None) -> Path:
    """A `ColourParser` as TorchScript.

    order: the class of each channel, facer's by default.
    """
    colours = torch.tensor([PALETTE[i] for i in order or FACER_TO_CELEBAMASK]) / 255
    torch.jit.script(ColourParser(colours)).save(str(path))
    return path
