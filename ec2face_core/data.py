"""Folders of faces: readers of single files, the manifest, `FaceDataset` and `open_dataset`.

The data contract is `root/{image,mask,text}/{id}.*` and `root/manifest.csv` with the columns
`id,split,caption_index,caption`, one row per face. Images are square RGB (png or jpg), masks are
palette or grey PNGs of the same size with ids 0-18, texts are UTF-8 with one caption per line.
Readers raise `DataError` with the reason. `ec2face_lab.prepare` converts downloads to this layout
and validates whole folders. Items are read lazily; with a size, images are resized bicubically with
antialiasing and label maps to the nearest pixel.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .attributes import NUM_CLASSES, PALETTE
from .config import Config, UserError, resolve
from .procedural import check_recipe, make_faces, recipe
from .runs import content_key, file_digest, parallel

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
SUFFIXES = {"image": IMAGE_SUFFIXES, "mask": (".png",), "text": (".txt",)}
MANIFEST_COLUMNS = ["id", "split", "caption_index", "caption"]
VALIDATION_SEED = 1000  # added to the procedural faces' seed, so that validation faces differ


@dataclass
class Report:
    """What is wrong with a folder of faces: `problems` are (file or row, reason)."""

    root: Path
    faces: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: Path | str, reason: object) -> None:
        """Note a problem with a file (named relative to the root) or a row."""
        where = Path(where)
        inside = where.is_relative_to(self.root)
        self.problems.append((str(where.relative_to(self.root) if inside else where), str(reason)))

    def raise_if_bad(self) -> None:
        """Raise `DataError` carrying this report if anything is wrong."""
        if self.problems:
            raise DataError(str(self), self)

    def __str__(self) -> str:
        if not self.problems:
            return f"{self.root}: {self.faces} faces, nothing wrong"
        lines = [f"  {where}: {reason}" for where, reason in sorted(self.problems)]
        return "\n".join([f"{self.root}: {len(lines)} problem(s), {self.faces} faces", *lines])


class DataError(UserError, ValueError):
    """Data that cannot be used. `report` lists every bad file."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class Row(NamedTuple):
    """One line of the manifest: the split of a face and the caption that evaluation uses."""

    split: str
    caption_index: int
    caption: str


def read_image(path: Path, size: int | None = None) -> Image.Image:
    """Square RGB picture; DataError with the reason otherwise.

    With a size, a JPEG of twice that size or more is halved (quartered ...) while it is decoded, to
    no less than `size`: six times faster, and as close to bicubic as Lanczos is (47 dB, measured).
    """
    try:
        with Image.open(path) as file:
            if size:
                file.draft("RGB", (size, size))  # other formats than JPEG ignore it
            picture = file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable image ({error})") from error
    if picture.width != picture.height:
        raise DataError(f"wrong size {picture.width}x{picture.height}: faces are square")
    return picture


def read_mask(path: Path) -> np.ndarray:
    """Class ids of a palette or grey PNG, `(h, w)` uint8, checked; DataError otherwise."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            ids = np.array(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable mask ({error})") from error
    if mode not in ("P", "L"):
        raise DataError(f"mask is {mode}, not ids: `convert-merged` turns colours into ids")
    check_ids(ids)
    return ids


def check_ids(ids: np.ndarray) -> None:
    """Refuse ids above 18 and a mask that shows one class only."""
    if ids.max() >= NUM_CLASSES:
        raise DataError(f"label {ids.max()} above {NUM_CLASSES - 1}")
    if ids.min() == ids.max():
        raise DataError(f"constant mask (every pixel is {ids.min()})")


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions of one face, one per line without blank lines; DataError if none or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"caption is not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"unreadable caption ({error.strerror})") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise DataError("empty caption file")
    return lines


def read_manifest(root: Path, report: Report | None = None) -> dict[str, Row]:
    """Rows of `root/manifest.csv`, or of the file `root`, by id, in file order.

    Bad rows are added to `report` and left out; without a report they raise DataError together.
    """
    own = report or Report(root)
    path = root if root.is_file() else root / "manifest.csv"
    rows: dict[str, Row] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: unreadable ({error}); the converters write it, see "
            "`python -m ec2face_lab prepare --help`"
        ) from error
    if reader.fieldnames != MANIFEST_COLUMNS:
        raise DataError(f"{path}: columns {reader.fieldnames}, expected {MANIFEST_COLUMNS}")
    for number, line in enumerate(lines, start=2):
        where = f"manifest.csv row {number}"
        name = line["id"]
        index = line["caption_index"] or ""
        if not name or not line["split"] or not index.isdigit():
            own.add(where, f"id {name!r}, split {line['split']!r}, caption_index {index!r}")
        elif name in rows and rows[name].split != line["split"]:
            own.add(where, f"overlapping splits: id {name} is {rows[name].split} and here again")
        elif name in rows:
            own.add(where, f"duplicate id {name}")
        else:
            rows[name] = Row(line["split"], int(index), line["caption"] or "")
    own.faces = len(rows)
    if report is None:
        own.raise_if_bad()
    return rows


def files_by_id(folder: Path, suffixes: Iterable[str], report: Report) -> dict[str, Path]:
    """Files of a folder with one of these suffixes, by name without suffix; reports duplicates.

    Args:
        folder: a missing one has no files.
        suffixes: in lower case, with the dot.
        report: duplicates are added to it.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and files.setdefault(path.stem, path) != path:
            report.add(path, f"duplicate id: {files[path.stem].name} is there too")
    return files


def labels_from_palette(
    rgb: np.ndarray,
    palette: tuple[tuple[int, int, int], ...] = PALETTE,
    tolerance: float = 32.0,
) -> np.ndarray:
    """Nearest palette colour of each pixel.

    Args:
        rgb: `(h, w, 3)` uint8.
        palette: colours of the classes, 0-255.
        tolerance: largest Euclidean distance of a pixel to its colour, in units of 0-255.

    Returns:
        Class ids `(h, w)` uint8.

    Raises:
        DataError: a pixel is too far from every colour: another palette (CelebAMask-HQ's own tools
            use three) or a lossy file.
    """
    rgb = np.asarray(rgb)
    colours, index, counts = np.unique(
        rgb.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    distance = np.linalg.norm(colours[:, None].astype(float) - np.array(palette)[None], axis=-1)
    nearest = distance.argmin(1)
    gap = distance.min(1)
    if (gap > tolerance).any():
        worst = int(np.where(gap > tolerance, counts, 0).argmax())
        raise DataError(
            f"colour {tuple(int(c) for c in colours[worst])} on {counts[worst] / counts.sum():.2%} "
            f"of the pixels is {gap[worst]:.0f} away from every palette colour (limit "
            f"{tolerance:g}): another palette, or a mask saved as JPEG"
        )
    return nearest[index].reshape(rgb.shape[:2]).astype(np.uint8)


@dataclass(frozen=True)
class FaceSample:
    """One face: `image (3, h, w)` in [-1, 1], `label_map (h, w)` int64 ids 0-18, its captions."""

    id: str
    image: Tensor
    label_map: Tensor
    captions: tuple[str, ...]


class FaceDataset(Dataset[FaceSample]):
    """The faces of one split of a folder, in manifest order.

    Args:
        root: folder with `image/ mask/ text/ manifest.csv`.
        split: name in the manifest (train, test, ...); None for all faces.
        size: side in pixels; None keeps the files' own.
        limit: use the first faces only; 0 for all.

    Files are read and checked when an item is requested.

    Raises:
        DataError: files are missing (it names all of them), or the split is empty.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = "train",
        size: int | None = None,
        limit: int = 0,
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.size = size
        rows = read_manifest(self.root)
        self._rows = {k: row for k, row in rows.items() if split is None or row.split == split}
        if not self._rows:
            known = dict(Counter(row.split for row in rows.values()))
            raise DataError(f"{self.root}: no face of split {split!r}; faces by split: {known}")
        self.ids: list[str] = list(self._rows)[: limit or None]
        report = Report(self.root, len(self.ids))
        self._files = {k: files_by_id(self.root / k, SUFFIXES[k], report) for k in SUFFIXES}
        for kind, files in self._files.items():
            for name in self.ids:
                if name not in files:
                    report.add(self.root / kind / f"{name}{SUFFIXES[kind][0]}", f"missing {kind}")
        report.raise_if_bad()
        self._counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> FaceSample:
        name = self.ids[index]
        image = self.image(name)
        label_map = self.label_map(name)
        if image.shape[1:] != label_map.shape:
            raise DataError(
                f"{self._files['mask'][name]}: mask {tuple(label_map.shape)}, image "
                f"{tuple(image.shape[1:])}; open the dataset with a size, or convert it"
            )
        return FaceSample(name, image, label_map, self.captions(name))

    def image(self, name: str) -> Tensor:
        """Picture of a face, `(3, h, w)` in [-1, 1]."""
        picture = self._read("image", name, read_image)
        if self.size and picture.width != self.size:
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1

    def label_map(self, name: str) -> Tensor:
        """Class ids of a face, `(h, w)` int64."""
        ids = self._read("mask", name, read_mask)
        if self.size and ids.shape != (self.size, self.size):
            resized = Image.fromarray(ids).resize((self.size, self.size), Image.Resampling.NEAREST)
            ids = np.array(resized)
        return torch.from_numpy(ids.astype(np.int64))

    def captions(self, name: str) -> tuple[str, ...]:
        """All captions of a face."""
        return self._read("text", name, read_captions)

    def caption(self, name: str, index: int) -> str:
        """One caption of a face."""
        return self.captions(name)[index]

    def manifest_caption(self, name: str) -> str:
        """The caption that the manifest assigns to a face for evaluation."""
        return self._rows[name].caption

    def label_counts(self) -> Tensor:
        """Pixels of each class over all faces of this dataset, `(19,)` int64 (Eq. 10's T)."""
        if self._counts is None:

            def count(name: str) -> Tensor:
                return torch.bincount(self.label_map(name).flatten(), minlength=NUM_CLASSES)

            self._counts = sum(parallel(count, self.ids), torch.zeros(NUM_CLASSES).long())
        return self._counts.clone()

    def digest(self, *kinds: str) -> str:
        """Sixteen hex digits of these faces' content.

        kinds: of `image`, `mask`, `text` (the files) and `manifest` (splits and captions).
        """
        content: list[Any] = [self.size, self.ids]
        for kind in kinds:
            if kind == "manifest":
                content.append([self._rows[name] for name in self.ids])
            else:
                files = [self._files[kind][name] for name in self.ids]
                content.append([digest.hex() for digest in parallel(file_digest, files)])
        return content_key(content, digits=16)

    def _read(self, kind: str, name: str, read: Any) -> Any:
        path = self._files[kind][name]
        try:
            return read(path)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def collate(samples: Sequence[FaceSample]) -> dict[str, Any]:
    """Batch: `id` list, `image (b, 3, h, w)`, `label_map (b, h, w)`, `captions` list of tuples."""
    return {
        "id": [sample.id for sample in samples],
        "image": torch.stack([sample.image for sample in samples]),
        "label_map": torch.stack([sample.label_map for sample in samples]),
        "captions": [sample.captions for sample in samples],
    }


def open_dataset(config: Config, split: str) -> FaceDataset:
    """The faces a configuration names, at `config.data.size`.

    With `config.data.procedural` a missing folder is first made by `config.data.maker`.

    Args:
        config: data is used.
        split: train, test, zero_shot, or validation: faces of neither training nor test, on which
            settings are chosen. For photographs they are in `root`, marked in manifest.csv.

    Raises:
        DataError: there is no data, or procedural faces of another number than configured.
        ConfigError: the procedural faces there are of another recipe.
    """
    data = config.data
    first = {"train": data.train, "test": data.test}
    known = {
        "train": ("root", first, data.seed),
        "test": ("root", first, data.seed),
        "zero_shot": ("zero_shot_root", {"zero_shot": data.zero_shot}, data.seed),
        "validation": ("root", {"validation": data.validation}, data.seed + VALIDATION_SEED),
    }
    if split not in known:
        raise DataError(f"split {split!r} does not exist; known: {', '.join(known)}")
    key, counts, seed = known[split]
    root = resolve(getattr(data, key))
    if split == "validation" and data.procedural:
        root = root.with_name(f"{root.name}-validation")
    wanted = recipe(data, seed, counts, "second" if split == "zero_shot" else "first")
    if not root.exists():
        if not data.procedural:
            raise DataError(
                f"{root} does not exist. Make it from the downloads (`python -m "
                f"ec2face_lab prepare --help`), or name another folder in the setting data.{key}"
            )
        make_faces(root, wanted)
    if data.procedural:
        check_recipe(root, wanted)
    dataset = FaceDataset(root, None if split == "zero_shot" else split, data.size)
    if data.procedural and len(dataset) != counts[split]:
        raise DataError(
            f"{root} holds {len(dataset)} faces of split {split}, data.{split} asks for "
            f"{counts[split]}: remove the folder, or name another one in data.{key}"
        )
    return dataset
