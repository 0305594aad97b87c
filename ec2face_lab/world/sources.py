"""Data sources: the faces that the miniature's networks are trained on, and its written data sets.

A source is endless procedural faces, or the training split of a folder. It gives `corpus`
(captions for the vocabularies), `scenes` (what autoencoder and transformer see), `faces` (what
perception models see), held-out faces of both, and `condition_shares`: its dense conditions, and
how often each is used. Every face is a function of its number, so a resumed training sees the same
faces. `dense_condition` computes depth, edges and the like; `write_dataset` writes procedural faces
in the layout of the real data.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ec2face_core.attributes import NUM_CLASSES, PALETTE, flip_labels
from ec2face_core.config import DataConfig
from ec2face_core.data import FaceDataset
from ec2face_core.io.paths import resolve
from ec2face_core.io.texts import MANIFEST_COLUMNS
from ec2face_core.runs import content_key, part_name, remove, remove_leftovers

from ..cache import code_digest
from ..prepare.captions import attributes_from_mask, captions
from . import portrait, rendering, scenes
from .portrait import rendering as portrait_rendering
from .portrait import scenes as portrait_scenes
from .rendering import Rendered

SIZE = 64  # pixels of the first miniature

STYLE = {"first": "mm-celeba-hq", "second": "ffhq-text"}  # of the captions, by look

# look, frequencies, share of every batch that perception models see
MIXTURE = (
    ("first", "balanced", 0.4),
    ("second", "balanced", 0.25),
    ("first", "natural", 0.2),
    ("second", "second", 0.15),
)

CODE = (  # that makes faces, conditions and captions
    "ec2face_lab.prepare.captions",
    *(f"ec2face_lab.world.{name}" for name in ("canvas", "rendering", "scenes", "sources")),
    *(f"ec2face_lab.world.portrait.{info.name}" for info in iter_modules(portrait.__path__)),
)

HELD_OUT_SEED = 90_001  # of faces that no perception model is trained on

HELD_OUT = 384  # their number

Description = tuple[str, Any]  # (caption style, attributes), or ("", captions)


def caption_of(description: Description, seed: int) -> str:
    """A caption of a face: composed from its attributes, or one of the face's own captions."""
    style, content = description
    return captions(content, 1, seed, style)[0] if style else content[seed % len(content)]


# ---------------------------------------------------------------------------- dense conditions


@dataclass
class Photographs:
    """What photographs with masks show: image `b 3 h w` in [-1, 1] and label map `b h w`."""

    image: Tensor
    label_map: Tensor


CONDITIONS = ("regions", "albedo", "normals", "depth", "edges", "low resolution")


def dense_condition(kind: str, faces: Rendered | Photographs, generator: torch.Generator) -> Tensor:
    """A dense condition as a picture `b 3 h w` in [-1, 1].

    Args:
        kind: one of CONDITIONS; of photographs regions, edges or low resolution.
        faces: a batch of faces.
        generator: chooses the colours of regions; on the faces' device.
    """
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
    # Regions: every face has other colours, and half of the faces have some classes merged.
    b = len(faces.image)
    options: dict[str, Any] = {"generator": generator, "device": faces.image.device}
    colours = torch.rand(b, NUM_CLASSES, 3, **options) * 2 - 1
    other = torch.randint(NUM_CLASSES, (b, NUM_CLASSES), **options)
    merge = torch.rand(b, NUM_CLASSES, **options) < 0.15
    merge &= torch.rand(b, 1, **options) < 0.5
    merged = torch.gather(colours, 1, other[..., None].expand(-1, -1, 3))
    colours = torch.where(merge[..., None], merged, colours)
    flat = torch.gather(colours, 1, faces.label_map.flatten(1)[..., None].expand(-1, -1, 3))
    return flat.movedim(1, 2).unflatten(2, faces.label_map.shape[1:]).contiguous()


# --------------------------------------------------------------------------------- the sources


@dataclass
class FaceBatch:
    """A batch: image `b 3 h w` in [-1, 1], label map `b h w`, attributes and a caption each."""

    image: Tensor
    label_map: Tensor
    attributes: list[dict[str, bool | str]]
    captions: list[str]

    def split(self, size: int) -> Iterator[FaceBatch]:
        """Batches of `size` faces, shuffled by the global generator."""
        for rows in torch.randperm(len(self.image)).split(size):
            yield FaceBatch(
                self.image[rows],
                self.label_map[rows],
                [self.attributes[i] for i in rows.tolist()],
                [self.captions[i] for i in rows.tolist()],
            )


class ProceduralFaces:
    """Endless procedural faces of the first miniature, in both looks.

    Rare parts lie between their natural and their balanced frequency.

    device: on which faces are rendered.
    """

    name = "procedural faces"
    size = SIZE
    sample = staticmethod(scenes.sample_scenes)
    render = staticmethod(rendering.render)
    styles = tuple(STYLE.values())
    condition_shares: ClassVar = dict(
        zip(CONDITIONS, (0.60, 0.10, 0.08, 0.07, 0.08, 0.07), strict=True)
    )
    mixture = MIXTURE  # of perception models
    batches: ClassVar = (  # look and frequencies of the batches of `scenes`, in turn
        *(("first", ""), ("first", ""), ("second", ""), ("first", "balanced")),
        *(("first", ""), ("second", ""), ("first", ""), ("first", "balanced")),
        *(("second", ""), ("first", ""), ("first", ""), ("second", "balanced")),
    )

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def key(self) -> str:
        """Names the faces and captions: it changes with the code that makes them."""
        return content_key([self.name, code_digest(CODE)])

    def corpus(self, seed: int, start: int) -> list[str]:
        """Captions in both styles of a thousand faces from number `start` on."""
        rows = self.sample(seed, range(start, start + 1000), frequencies="balanced").attributes
        return [
            c for i, row in enumerate(rows) for s in self.styles for c in captions(row, 3, i, s)
        ]

    def descriptions(self, seed: int, start: int, count: int) -> list[Description]:
        """Of the faces that `scenes` gives."""
        return self._describe(self._scenes(seed, start, count))

    def scenes(self, seed: int, start: int, count: int) -> tuple[Rendered, list[Description]]:
        """Faces start ... start + count - 1 with everything that dense conditions show."""
        sampled = self._scenes(seed, start, count)
        return self.render(sampled, self.size, str(self.device)), self._describe(sampled)

    def held_out_scenes(self, seed: int, count: int) -> Rendered:
        """Faces that `scenes` of this seed never gives."""
        return self.render(self.sample(seed + 1, range(count)), self.size, str(self.device))

    def faces(self, seed: int, start: int, count: int, mixture: tuple = ()) -> FaceBatch:
        """Faces start ... start + count - 1 for perception models.

        mixture: (look, frequencies, share) of each part of the batch; by default the source's.
        """
        images = []
        labels = []
        attributes = []
        texts = []
        first = start
        cumulative = 0.0
        for look, frequencies, share in mixture or self.mixture:
            cumulative += share
            indices = range(first, start + round(cumulative * count))
            first = indices.stop
            sampled = self.sample(seed, indices, look=look, frequencies=frequencies)
            rendered = self.render(sampled, self.size, str(self.device))
            images.append(rendered.image)
            labels.append(rendered.label_map)
            numbered = list(zip(indices, sampled.attributes, strict=True))
            attributes += [row for _, row in numbered]
            texts += [captions(row, 1, i, STYLE[look])[0] for i, row in numbered]
        return FaceBatch(torch.cat(images), torch.cat(labels), attributes, texts)

    def held_out(self) -> dict[str, FaceBatch]:
        """Faces of either look that no perception model sees, by the name in reports."""
        looks = {"first look": ("first", "natural", 1.0), "second look": ("second", "second", 1.0)}
        return {k: self.faces(HELD_OUT_SEED, 0, HELD_OUT, (mix,)) for k, mix in looks.items()}

    def _scenes(self, seed: int, start: int, count: int) -> scenes.Scenes:
        look, frequencies = self.batches[start // count % len(self.batches)]
        return self.sample(seed, range(start, start + count), look, frequencies)

    @staticmethod
    def _describe(sampled: scenes.Scenes) -> list[Description]:
        return [(STYLE[sampled.look], row) for row in sampled.attributes]


class Portraits(ProceduralFaces):
    """The procedural faces of the second miniature; only evaluators learn their second look."""

    name = "portraits"
    size = 128
    mixture = (("first", "balanced", 0.6), ("first", "natural", 0.4))
    batches: ClassVar = (("first", ""), ("first", "balanced"))
    sample = staticmethod(portrait_scenes.sample_scenes)
    render = staticmethod(portrait_rendering.render)


class FolderFaces:
    """The training split of a folder, repeated, half of the faces mirrored.

    Every 20th face is held out. Perception models see a face with earrings, a necklace, eyeglasses
    or a hat three times as often as another. Attributes are those that mask and hair colour show.

    Raises:
        DataError: there is no such folder, or it has no training split.
    """

    styles = ("mm-celeba-hq",)
    condition_shares: ClassVar = {"regions": 0.6, "edges": 0.2, "low resolution": 0.2}

    def __init__(self, root: Path, size: int = SIZE, device: torch.device | str = "cpu") -> None:
        self.name = root.name
        self.size = size
        self.device = torch.device(device)
        dataset = FaceDataset(root, "train", size)
        self._dataset = dataset
        samples = [dataset[i] for i in range(len(dataset))]
        self._image = torch.stack([sample.image for sample in samples])
        self._label_map = torch.stack([sample.label_map for sample in samples])
        self._captions = [sample.captions for sample in samples]
        self._attributes = [
            {"hair_colour": "", **attributes_from_mask(sample.label_map, sample.image)}
            for sample in samples
        ]
        self._held_out = list(range(0, len(samples), 20))
        self._training = [i for i in range(len(samples)) if i % 20]
        worn = ("earrings", "necklace", "eyeglasses", "hat")
        rare = [i for i in self._training if any(self._attributes[i][key] for key in worn)]
        self._balanced = self._training + 2 * rare

    def key(self) -> str:
        """Names the faces and captions, and the code that draws them."""
        content = self._dataset.digest("image", "mask", "text", "manifest")
        return content_key([content, code_digest(CODE)])

    def corpus(self, seed: int, start: int) -> list[str]:
        """Every caption of the training faces, whatever the arguments are."""
        return [caption for i in self._training for caption in self._captions[i]]

    def scenes(self, seed: int, start: int, count: int) -> tuple[Photographs, list[Description]]:
        """Faces start ... start + count - 1 of an endless shuffled order."""
        rows, mirrored = _shuffled(self._training, seed, start, count)
        return self._pictures(rows, mirrored), [("", self._captions[i]) for i in rows]

    def descriptions(self, seed: int, start: int, count: int) -> list[Description]:
        """Of the faces that `scenes` gives."""
        rows, _ = _shuffled(self._training, seed, start, count)
        return [("", self._captions[i]) for i in rows]

    def held_out_scenes(self, seed: int, count: int) -> Photographs:
        """The held-out faces, at most `count`."""
        rows = self._held_out[:count]
        return self._pictures(rows, torch.zeros(len(rows)).bool())

    def faces(self, seed: int, start: int, count: int) -> FaceBatch:
        """The same for perception models, with captions and attributes."""
        return self._described(*_shuffled(self._balanced, seed, start, count), start)

    def held_out(self) -> dict[str, FaceBatch]:
        """Faces that nothing is trained on, by the name in reports."""
        mirrored = torch.zeros(len(self._held_out)).bool()
        return {"held-out": self._described(self._held_out, mirrored, 0)}

    def _pictures(self, rows: list[int], mirrored: Tensor) -> Photographs:
        image = self._image[rows]
        label_map = self._label_map[rows]
        flip = mirrored.view(-1, 1, 1)
        return Photographs(
            torch.where(flip[:, None], image.flip(-1), image).to(self.device),
            torch.where(flip, flip_labels(label_map), label_map).to(self.device),
        )

    def _described(self, rows: list[int], mirrored: Tensor, start: int) -> FaceBatch:
        shown = self._pictures(rows, mirrored)
        texts = [caption_of(("", self._captions[i]), start + k) for k, i in enumerate(rows)]
        attributes = [self._attributes[i] for i in rows]
        return FaceBatch(shown.image, shown.label_map, attributes, texts)


def _shuffled(faces: list[int], seed: int, start: int, count: int) -> tuple[list[int], Tensor]:
    """Places start ... start + count - 1 of an endless order, and which of them are mirrored."""
    n = len(faces)
    rows = []
    mirrored = []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(n, generator=generator)
        flips = torch.randint(2, (n,), generator=generator).bool()
        places = slice(max(start - epoch * n, 0), start + count - epoch * n)
        rows += [faces[i] for i in order[places].tolist()]
        mirrored.append(flips[places])
    return rows, torch.cat(mirrored)


DataSource = ProceduralFaces | FolderFaces


def source_of(data: DataConfig) -> DataSource:
    """The faces that a profile's foundation was trained on: its world's, or its training split."""
    if not data.procedural:
        return FolderFaces(resolve(data.root), data.size)
    return Portraits() if data.maker.endswith(":write_portraits") else ProceduralFaces()


# ------------------------------------------------------------------------------ written data sets


def write_dataset(
    root: Path,
    seed: int,
    splits: dict[str, int],
    size: int,
    look: str = "first",
    progress: bool = True,
    source: type[ProceduralFaces] = ProceduralFaces,
) -> None:
    """Write procedural faces in the layout of real data: pictures, masks, captions, manifest.

    The folder appears under its name only when it is complete; if another process has finished one
    first, that is kept.

    Args:
        root: folder of `{image,mask,text}/<id>.*`, `manifest.csv` and `attributes.csv`.
        seed: of the faces.
        splits: split -> number of faces; ids are counted on from one split to the next.
        size: side in pixels.
        look: `first`, with ten captions a face; `second`, with nine; or `rare`: the first
            with frequent hats, eyeglasses, earrings and necklaces.
        progress: whether to show a bar.
        source: samples and renders the faces.
    """
    from tqdm.auto import tqdm

    root = Path(root)
    palette = [value for rgb in PALETTE for value in rgb]
    frequencies = ""
    if look == "rare":
        look, frequencies = "first", "balanced"
    count = 10 if look == "first" else 9
    split_of = [name for name, n in splits.items() for _ in range(n)]
    starts = range(0, len(split_of), 64)
    manifest = []
    table = []
    root.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root.parent)
    folder = part_name(root)
    try:
        for kind in ("image", "mask", "text"):
            (folder / kind).mkdir(parents=True)
        for start in tqdm(starts, f"procedural faces, {look} look", disable=not progress):
            indices = range(start, min(start + 64, len(split_of)))
            sampled = source.sample(seed, indices, look, frequencies)
            faces = source.render(sampled, size)
            pictures = ((faces.image + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            labels = faces.label_map.byte().numpy()
            for i, picture, label, row in zip(
                indices, pictures, labels, sampled.attributes, strict=True
            ):
                Image.fromarray(picture).save(folder / "image" / f"{i}.png", compress_level=1)
                mask = Image.fromarray(label)
                mask.putpalette(palette)
                mask.save(folder / "mask" / f"{i}.png", compress_level=1)
                lines = captions(row, count=count, seed=seed * 1_000_003 + i, style=STYLE[look])
                (folder / "text" / f"{i}.txt").write_text("\n".join(lines) + "\n", "utf-8")
                manifest.append((i, split_of[i], i % count, lines[i % count]))
                table.append((i, *(int(x) if isinstance(x, bool) else x for x in row.values())))
        _write_csv(folder / "manifest.csv", MANIFEST_COLUMNS, manifest)
        _write_csv(folder / "attributes.csv", ["id", *sampled.attributes[0]], table)
        try:
            folder.rename(root)
        except OSError:
            if not root.exists():
                raise
    finally:
        remove(folder)


write_portraits: Callable[..., None] = functools.partial(write_dataset, source=Portraits)


def _write_csv(path: Path, columns: list[str], rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
