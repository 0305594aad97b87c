"""Faces with label maps and captions: `FaceDataset`, `open_dataset`, and the command line.

Layout, checks and the report live in `validation.py`, converters in `conversion.py`; both are
offered here. Chosen here: items are read lazily and resized when a size is asked for, images
bicubic with antialiasing, label maps nearest. Embedded profiles make their procedural faces when
the folder is absent.

    python -m ec2face_core.datasets validate ROOT
    python -m ec2face_core.datasets convert-celebamask RAW OUT
    python -m ec2face_core.datasets convert-merged SRC OUT
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .attributes import NUM_CLASSES
from .commands import told
from .config import Config, resolve
from .conversion import from_celebamask_hq, from_merged, labels_from_palette
from .validation import (
    IMAGE_SUFFIXES,
    DataError,
    Report,
    files_by_id,
    parallel,
    read_captions,
    read_image,
    read_manifest,
    read_mask,
    validate,
)

__all__ = [
    "DataError",
    "FaceDataset",
    "FaceSample",
    "Report",
    "collate",
    "from_celebamask_hq",
    "from_merged",
    "labels_from_palette",
    "open_dataset",
    "validate",
]

VALIDATION = 1000  # added to the procedural faces' seed: validation faces are faces of their own


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

    Raises DataError naming every missing file, or the split if it is empty. Files are read, and
    checked, when an item is asked for; `validate(root)` checks all of them.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = "train",
        size: int | None = None,
        limit: int = 0,
    ):
        self.root, self.split, self.size = Path(root), split, size
        rows = read_manifest(self.root)
        self._rows = {k: row for k, row in rows.items() if split is None or row.split == split}
        if not self._rows:
            known = dict(Counter(row.split for row in rows.values()))
            raise DataError(f"{self.root}: no face of split {split!r}; faces by split: {known}")
        self.ids: list[str] = list(self._rows)[: limit or None]
        kinds = {"image": IMAGE_SUFFIXES, "mask": (".png",), "text": (".txt",)}
        report = Report(self.root, len(self.ids))
        self._files = {k: files_by_id(self.root / k, kinds[k], report) for k in kinds}
        for kind, files in self._files.items():
            for name in self.ids:
                if name not in files:
                    report.add(self.root / kind / f"{name}{kinds[kind][0]}", f"missing {kind}")
        report.raise_if_bad()
        self._counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> FaceSample:
        name = self.ids[index]
        image, label_map = self.image(name), self.label_map(name)
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

    With `config.data.procedural` a missing folder is first filled with procedural faces, under its
    name only once complete.

    Args:
        split: train, test, zero_shot, or validation: faces of neither training nor test, on which
            settings are chosen. Photographs have these in the same root, marked in manifest.csv.

    Raises:
        DataError: there is no data, or other data than asked for.
    """
    data = config.data
    first = {"train": data.train, "test": data.test}
    known = {
        "train": ("root", first, data.seed),
        "test": ("root", first, data.seed),
        "zero_shot": ("zero_shot_root", {"zero_shot": data.zero_shot}, data.seed),
        "validation": ("root", {"validation": data.validation}, data.seed + VALIDATION),
    }
    if split not in known:
        raise DataError(f"split {split!r} does not exist; known: {', '.join(known)}")
    key, counts, seed = known[split]
    root = resolve(getattr(data, key))
    if split == "validation" and data.procedural:
        root = root.with_name(f"{root.name}-validation")
    if not root.exists():
        if not data.procedural:
            raise DataError(
                f"{root} does not exist. Make it from the downloads (`python -m "
                f"ec2face_core.prepare --help`), or name another folder in the setting data.{key}"
            )
        from .synthetic import write_dataset

        write_dataset(root, seed, counts, data.size, "second" if split == "zero_shot" else "first")
    dataset = FaceDataset(root, None if split == "zero_shot" else split, data.size)
    if data.procedural and len(dataset) != counts[split]:
        raise DataError(
            f"{root} holds {len(dataset)} faces of split {split}, data.{split} asks for "
            f"{counts[split]}: remove the folder, or name another one in data.{key}"
        )
    return dataset


@told
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 after printing the report of bad data."""
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_core.datasets",
        description="Check folders of faces and convert foreign ones into the layout "
        "{image,mask,text}/{id}.* + manifest.csv (id,split,caption_index,caption).",
        epilog="Bad data: one report of every bad file on stderr, exit code 2, no target folder. "
        "An interrupted conversion resumes.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("validate", help="report everything wrong in ROOT")
    command.add_argument("root", type=Path, help="folder with image/ mask/ text/ manifest.csv")
    for name, text, train in (
        (
            "convert-celebamask",
            "raw CelebAMask-HQ (CelebA-HQ-img/, CelebAMask-HQ-mask-anno/)",
            "ids below this are the training split (27000, as in the paper)",
        ),
        (
            "convert-merged",
            "images/*.jpg and masks/*.png (ids, or colours of the palette)",
            "number of training faces (default: nine of ten)",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", type=Path, help=text)
        command.add_argument("out", type=Path, help="new folder")
        command.add_argument("--captions", type=Path, help="folder of {id}.txt, one caption a line")
        command.add_argument("--size", type=int, default=512, help="pixels (512)")
        default = 27000 if name == "convert-celebamask" else None
        command.add_argument("--train", type=int, default=default, help=train)
    options = parser.parse_args(arguments)
    if options.command == "validate":
        report = validate(options.root, progress=True)
        report.raise_if_bad()
        print(report)
    else:
        raw = options.command == "convert-celebamask"
        convert = from_celebamask_hq if raw else from_merged
        convert(options.source, options.out, options.captions, options.size, options.train)
        rows = read_manifest(options.out)
        print(f"{options.out}: {dict(Counter(row.split for row in rows.values()))}")


if __name__ == "__main__":
    sys.exit(main())
