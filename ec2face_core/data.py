"""Folders of faces: their files by id, `FaceDataset` and `open_dataset`.

The data contract is `root/{image,mask,text}/{id}.*` and `root/manifest.csv` with the columns
`id,split,caption_index,caption`, one row per face. Images are square RGB (png, jpg or webp), masks
are palette or grey PNGs of the same size with ids 0-18, texts are UTF-8 with one caption per line.
The modules of `io` read single files. `ec2face_lab.prepare` converts downloads to this layout and
validates whole folders. Items are read lazily; with a size, images are resized bicubically with
antialiasing and label maps to the nearest pixel.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .attributes import NUM_CLASSES
from .config import Config
from .io.masks import read_mask
from .io.paths import resolve
from .io.pictures import IMAGE_SUFFIXES, read_image
from .io.procedural import check_recipe, make_faces, recipe
from .io.report import DataError, Report
from .io.texts import read_captions, read_manifest
from .runs import content_key, file_digest, parallel

T = TypeVar("T")

SUFFIXES = {"image": IMAGE_SUFFIXES, "mask": (".png",), "text": (".txt",)}
VALIDATION_SEED = 1000  # added to the procedural faces' seed, so that validation faces differ
RARE_SEED = 2000  # likewise, for the faces that are rich in rare classes
DROPPINGS = ("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r")


def is_dropping(path: PurePath) -> bool:
    """Whether an operating system left this file (relative to a folder of faces), not a person."""
    return any(part.startswith(".") or part in DROPPINGS for part in path.parts)


def file_id(path: Path) -> str:
    """The id that a file is named by; macOS decomposes accents in names, other systems do not."""
    return unicodedata.normalize("NFC", path.stem)


def files_by_id(folder: Path, suffixes: Iterable[str], report: Report) -> dict[str, Path]:
    """Files of a folder with one of these suffixes, by name without suffix; reports duplicates.

    Args:
        folder: a missing one has no files; hidden files and folders in it do not count.
        suffixes: in lower case, with the dot.
        report: duplicates are added to it.
    """
    files: dict[str, Path] = {}
    for path in visible_files(folder):
        if path.suffix.lower() in suffixes and files.setdefault(file_id(path), path) != path:
            report.add(path, f"duplicate id: {files[file_id(path)].name} is there too")
    return files


def visible_files(folder: Path) -> list[Path]:
    """Everything in a folder except folders and what operating systems leave there, sorted."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.is_dir())
    return [folder / name for name in names if not is_dropping(Path(name))]


def without_padding(name: str) -> str:
    """A name whose numbers have no leading zeros: 00012_a and 12_a are alike."""
    return re.sub(r"[0-9]+", lambda number: number[0].lstrip("0") or "0", name)


def report_missing(
    folder: Path, kind: str, names: Iterable[str], report: Report, suffix: str = ""
) -> None:
    """Add the files that these faces lack, with what lies there instead.

    Args:
        folder: where they should be.
        kind: image, mask or text.
        names: ids.
        report: the problems are added to it.
        suffix: of the expected name; the first of the kind if it is not given.
    """
    names = list(names)
    there = {file_id(path): path for path in visible_files(folder)} if names else {}
    padded = {without_padding(name): path for name, path in there.items()}
    for name in names:
        near = there.get(name) or padded.get(without_padding(name))
        hint = ""
        if near is not None and near.suffix.lower() not in SUFFIXES[kind]:
            lossy = kind == "mask" and near.suffix.lower() in (".jpg", ".jpeg")
            names_read = ", ".join(SUFFIXES[kind])
            why = "its loss changes ids; export PNG" if lossy else f"only {names_read} is read"
            hint = f": {near.name} is there, but {why}"
        elif near is not None:
            hint = f": {near.name} is there, whose id has other zeros (a spreadsheet drops them)"
        report.add(folder / f"{name}{suffix or SUFFIXES[kind][0]}", f"missing {kind}{hint}")


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
            missing = [name for name in self.ids if name not in files]
            report_missing(self.root / kind, kind, missing, report)
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

    def _read(self, kind: str, name: str, read: Callable[[Path], T]) -> T:
        path = self._files[kind][name]
        try:
            return read(path)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def open_dataset(config: Config, split: str) -> FaceDataset:
    """The faces a configuration names, at `config.data.size`.

    With `config.data.procedural` a missing folder is first made by `config.data.maker`.

    Args:
        config: data is used.
        split: train, test, zero_shot, validation or rare. Settings are chosen on validation faces.
            Those of split rare show as many hats, eyeglasses, earrings and necklaces as measuring
            their accuracy takes. For photographs, `root/manifest.csv` marks both.

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
        "rare": ("root", {"rare": data.rare}, data.seed + RARE_SEED),
    }
    if split not in known:
        raise DataError(f"split {split!r} does not exist; known: {', '.join(known)}")
    key, counts, seed = known[split]
    if data.procedural and not counts[split]:
        raise DataError(f"split {split} has no faces: set data.{split} to a number of them")
    root = resolve(getattr(data, key))
    if split in ("validation", "rare") and data.procedural:
        root = root.with_name(f"{root.name}-{split}")
    look = {"zero_shot": "second", "rare": "rare"}.get(split, "first")
    wanted = recipe(data, seed, counts, look)
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
