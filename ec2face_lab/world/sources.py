"""The faces that a foundation is trained on: procedural ones, or the training split of a folder.

A world gives `condition_shares` (dense conditions and how often each is drawn), `corpus`
(captions for the vocabularies), `scenes` (what autoencoder and transformer see), `faces` (what
critics see) and held-out faces of both. Any face is drawn from its number, so that a training
which was stopped sees the same faces when it resumes.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ec2face_core.attributes import NUM_CLASSES, flip_labels
from ec2face_core.config import resolve
from ec2face_core.data import DataError, FaceDataset

from ..prepare.captions import attributes_from_mask, captions
from .rendering import Rendered, render
from .scenes import sample_scenes


@dataclass
class Photographs:
    """What photographs with masks show: image `b 3 h w` in [-1, 1] and label map `b h w`."""

    image: Tensor
    label_map: Tensor


CONDITIONS = ("regions", "albedo", "normals", "depth", "edges", "low resolution")


def dense_condition(kind: str, faces: Rendered | Photographs, generator: torch.Generator) -> Tensor:
    """One of CONDITIONS as a picture `b 3 h w` in [-1, 1]; photographs have the last two and the
    first only."""
    if kind == "albedo":
        return faces.albedo
    if kind == "normals":
        return faces.normals
    if kind == "depth":
        return faces.depth.expand(-1, 3, -1, -1)
    if kind == "low resolution":
        small = F.avg_pool2d(faces.image, 8)
        return F.interpolate(small, scale_factor=8, mode="nearest")
    if kind == "edges":
        grey = F.pad(faces.image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        dx = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
        dy = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
        return ((dx**2 + dy**2).sqrt().clamp(0, 1) * 2 - 1).expand(-1, 3, -1, -1)
    # Regions: every face has its own colours, and half of the faces have some classes merged.
    b = len(faces.image)
    colours = torch.rand(b, NUM_CLASSES, 3, generator=generator) * 2 - 1
    other = torch.randint(NUM_CLASSES, (b, NUM_CLASSES), generator=generator)
    merge = torch.rand(b, NUM_CLASSES, generator=generator) < 0.15
    merge &= torch.rand(b, 1, generator=generator) < 0.5
    merged = torch.gather(colours, 1, other[..., None].expand(-1, -1, 3))
    colours = torch.where(merge[..., None], merged, colours)
    flat = torch.gather(colours, 1, faces.label_map.flatten(1)[..., None].expand(-1, -1, 3))
    return flat.movedim(1, 2).unflatten(2, faces.label_map.shape[1:]).contiguous()


SIZE = 64

STYLE = {"first": "mm-celeba-hq", "second": "ffhq-text"}

# look, frequencies, share of every batch that critics see
MIXTURE = (
    ("first", "balanced", 0.4),
    ("second", "balanced", 0.25),
    ("first", "natural", 0.2),
    ("second", "second", 0.15),
)

HELD_OUT_SEED, HELD_OUT = 90_001, 384  # faces of a world that no critic is trained on

Telling = tuple[str, Any]  # (caption style, attributes), or ("", captions)


def sentence(telling: Telling, seed: int) -> str:
    """A caption of a face: composed from its attributes, or one of those that it came with."""
    style, what = telling
    return captions(what, 1, seed, style)[0] if style else what[seed % len(what)]


@dataclass
class Faces:
    """A batch: image `b 3 h w` in [-1, 1], label map `b h w`, attributes and a caption each."""

    image: Tensor
    label_map: Tensor
    attributes: list[dict[str, bool | str]]
    captions: list[str]

    def split(self, size: int) -> Iterator[Faces]:
        """Batches of `size` faces, each with the looks mixed."""
        for rows in torch.randperm(len(self.image)).split(size):
            yield Faces(
                self.image[rows],
                self.label_map[rows],
                [self.attributes[i] for i in rows.tolist()],
                [self.captions[i] for i in rows.tolist()],
            )


class ProceduralWorld:
    """Procedural faces without end; rare parts between their natural and balanced frequency."""

    name = "procedural faces"
    styles = tuple(STYLE.values())
    condition_shares: ClassVar = dict(
        zip(CONDITIONS, (0.40, 0.15, 0.15, 0.10, 0.10, 0.10), strict=True)
    )

    def corpus(self, seed: int, start: int) -> list[str]:
        """Captions of both wordings of a thousand faces from number `start` on."""
        rows = sample_scenes(seed, range(start, start + 1000), frequencies="balanced").attributes
        return [
            c for i, row in enumerate(rows) for s in STYLE.values() for c in captions(row, 3, i, s)
        ]

    def scenes(self, seed: int, start: int, count: int) -> tuple[Rendered, list[Telling]]:
        """Faces start ... start + count - 1 with everything that dense conditions show."""
        batch = start // count
        look = "second" if batch % 3 == 2 else "first"
        frequencies = "balanced" if batch % 4 == 3 else ""
        scenes = sample_scenes(seed, range(start, start + count), look, frequencies)
        return render(scenes, SIZE), [(STYLE[look], row) for row in scenes.attributes]

    def held_out_scenes(self, seed: int, count: int) -> Rendered:
        """Faces that `scenes` of this seed never gives."""
        return render(sample_scenes(seed + 1, range(count)), SIZE)

    def faces(self, seed: int, start: int, count: int, mixture: tuple = MIXTURE) -> Faces:
        """Faces start ... start + count - 1, the looks mixed as `mixture` says."""
        images, labels, attributes, texts = [], [], [], []
        first, cumulative = start, 0.0
        for look, frequencies, share in mixture:
            cumulative += share
            indices = range(first, start + round(cumulative * count))
            first = indices.stop
            scenes = sample_scenes(seed, indices, look=look, frequencies=frequencies)
            drawn, rows = render(scenes, SIZE), scenes.attributes
            images.append(drawn.image)
            labels.append(drawn.label_map)
            attributes += rows
            numbered = zip(indices, rows, strict=True)
            texts += [captions(row, 1, i, STYLE[look])[0] for i, row in numbered]
        return Faces(torch.cat(images), torch.cat(labels), attributes, texts)

    def held_out(self) -> dict[str, Faces]:
        """Faces of either look that no critic sees, by the name under which they are reported."""
        looks = {"first look": ("first", "natural", 1.0), "second look": ("second", "second", 1.0)}
        return {k: self.faces(HELD_OUT_SEED, 0, HELD_OUT, (mix,)) for k, mix in looks.items()}


class FolderWorld:
    """The training split of a folder at 64 px, again and again, half of the faces mirrored.

    Every 20th face is held out. Critics see a face with earrings, a necklace, eyeglasses or a hat
    three times as often as another. Attributes are what mask and hair colour make certain.

    Raises:
        DataError: no such folder, or one without a training split.
    """

    styles = ("mm-celeba-hq",)
    condition_shares: ClassVar = {"regions": 0.6, "edges": 0.2, "low resolution": 0.2}

    def __init__(self, root: Path):
        self.name = root.name
        dataset = FaceDataset(root, "train", SIZE)
        samples = [dataset[i] for i in range(len(dataset))]
        self._image = torch.stack([sample.image for sample in samples])
        self._label_map = torch.stack([sample.label_map for sample in samples])
        self._captions = [sample.captions for sample in samples]
        self._attributes = [
            {"hair_colour": "", **attributes_from_mask(sample.label_map, sample.image)}
            for sample in samples
        ]
        self._held = list(range(0, len(samples), 20))
        self._seen = [i for i in range(len(samples)) if i % 20]
        worn = ("earrings", "necklace", "eyeglasses", "hat")
        rare = [i for i in self._seen if any(self._attributes[i][key] for key in worn)]
        self._balanced = self._seen + 2 * rare

    def corpus(self, seed: int, start: int) -> list[str]:
        """Every caption of the faces; there are no others."""
        return [caption for i in self._seen for caption in self._captions[i]]

    def scenes(self, seed: int, start: int, count: int) -> tuple[Photographs, list[Telling]]:
        """The faces with numbers start ... start + count - 1 in an endless shuffled order."""
        rows, mirrored = _shuffled(self._seen, seed, start, count)
        return self._pictures(rows, mirrored), [("", self._captions[i]) for i in rows]

    def held_out_scenes(self, seed: int, count: int) -> Photographs:
        """The held-out faces, at most `count`."""
        return self._pictures(self._held[:count], torch.zeros(len(self._held[:count])).bool())

    def faces(self, seed: int, start: int, count: int) -> Faces:
        """The same for critics, with captions and attributes."""
        return self._described(*_shuffled(self._balanced, seed, start, count), start)

    def held_out(self) -> dict[str, Faces]:
        """Faces that nothing is trained on, by the name under which they are reported."""
        return {"held-out": self._described(self._held, torch.zeros(len(self._held)).bool(), 0)}

    def _pictures(self, rows: list[int], mirrored: Tensor) -> Photographs:
        image, label_map = self._image[rows], self._label_map[rows]
        flip = mirrored.view(-1, 1, 1)
        return Photographs(
            torch.where(flip[:, None], image.flip(-1), image),
            torch.where(flip, flip_labels(label_map), label_map),
        )

    def _described(self, rows: list[int], mirrored: Tensor, start: int) -> Faces:
        shown = self._pictures(rows, mirrored)
        texts = [
            self._captions[i][(start + k) % len(self._captions[i])] for k, i in enumerate(rows)
        ]
        return Faces(shown.image, shown.label_map, [self._attributes[i] for i in rows], texts)


def _shuffled(faces: list[int], seed: int, start: int, count: int) -> tuple[list[int], Tensor]:
    """Places start ... start + count - 1 of an endless order, and which of them are mirrored."""
    n, rows, mirrored = len(faces), [], []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(n, generator=generator)
        flips = torch.randint(2, (n,), generator=generator).bool()
        places = slice(max(start - epoch * n, 0), start + count - epoch * n)
        rows += [faces[i] for i in order[places].tolist()]
        mirrored.append(flips[places])
    return rows, torch.cat(mirrored)


World = ProceduralWorld | FolderWorld


def add_world_arguments(parser: argparse.ArgumentParser) -> None:
    """`--data` and `--out`, which every training of a foundation takes."""
    parser.add_argument(
        "--data", type=Path, metavar="ROOT",
        help="train on the training split of this folder (layout of `datasets.py`), at 64 px, "
        "instead of procedural faces",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("data/mini"), metavar="DIR",
        help="folder of the bundle (data/mini)",
    )  # fmt: skip


def chosen_world(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[World, Path]:
    """The world and the folder of the bundle; ends the command with an error if they clash."""
    out = resolve(options.out)
    if options.data is None:
        return ProceduralWorld(), out
    if out == resolve("data/mini"):
        parser.error("--data needs --out: data/mini is trained on procedural faces alone")
    try:
        return FolderWorld(resolve(options.data)), out
    except DataError as error:
        parser.error(str(error))


def write_dataset(
    root: Path,
    seed: int,
    splits: dict[str, int],
    size: int,
    look: str = "first",
    progress: bool = True,
) -> None:
    """Write faces in the real layout: `root/{image,mask,text}/{id}.*`, manifest and attributes.

    splits: split name -> number of faces, ids counted on from one split to the next, as
    CelebA-HQ's are. Ten captions a face (nine for the second look). The folder appears under its
    name only when it is complete.
    """
    import csv

    from PIL import Image
    from tqdm.auto import tqdm

    from ec2face_core.attributes import PALETTE

    from ..prepare.captions import captions
    from .rendering import render

    root = Path(root)
    temporary = root.with_name(f".{root.name}.{os.getpid()}")
    for folder in ("image", "mask", "text"):
        (temporary / folder).mkdir(parents=True)
    palette = [value for rgb in PALETTE for value in rgb]
    style, count = ("mm-celeba-hq", 10) if look == "first" else ("ffhq-text", 9)
    split_of = [name for name, n in splits.items() for _ in range(n)]
    manifest, table = [], []
    for start in tqdm(
        range(0, len(split_of), 64), desc=f"procedural faces, {look} look", disable=not progress
    ):
        indices = range(start, min(start + 64, len(split_of)))
        scenes = sample_scenes(seed, indices, look)
        faces = render(scenes, size)
        pictures = ((faces.image + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for i, picture, label, attributes in zip(
            indices, pictures, faces.label_map.byte().numpy(), scenes.attributes, strict=True
        ):
            Image.fromarray(picture).save(temporary / "image" / f"{i}.png", compress_level=1)
            mask = Image.fromarray(label)
            mask.putpalette(palette)
            mask.save(temporary / "mask" / f"{i}.png", compress_level=1)
            lines = captions(attributes, count=count, seed=seed * 1_000_003 + i, style=style)
            (temporary / "text" / f"{i}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            chosen = i % count
            manifest.append(
                {"id": i, "split": split_of[i], "caption_index": chosen, "caption": lines[chosen]}
            )
            table.append(
                {
                    "id": i,
                    **{k: int(x) if isinstance(x, bool) else x for k, x in attributes.items()},
                }
            )
    for name, rows in (("manifest.csv", manifest), ("attributes.csv", table)):
        with open(temporary / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.rename(root)
    except OSError:  # another process finished first
        shutil.rmtree(temporary)
        if not root.exists():
            raise
