"""Foreign folders of faces -> the layout of `validation.py`.

Chosen here: a converter works in `.{name}.partial` beside the target, one process a core, writes
each file under a temporary name and renames it, and skips faces that are valid there, so that an
interrupted conversion resumes. The target appears only when every face is good; otherwise one
`DataError` lists every bad file. Masks are resized nearest only, images bicubic with antialiasing
(after `read_image`'s halving of JPEGs).
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ec2face_core.attributes import CLASS_ID, CLASSES, PALETTE
from ec2face_core.data import (
    IMAGE_SUFFIXES,
    MANIFEST_COLUMNS,
    DataError,
    Report,
    check_ids,
    files_by_id,
    labels_from_palette,
    read_captions,
    read_image,
    read_mask,
)
from ec2face_core.runs import parallel, whole_file

from .captions import FaceAttributes, captions_from_mask, celeba_attributes
from .captions import captions as compose
from .validate import validate

PART_FOLDERS = ("CelebAMask-HQ-mask-anno", "CelebAMaskHQ-mask-anno")

_PART = re.compile(r"(\d+)_(\w+)\.png")

# Of PNG images: run lengths alone, as zlib has them for PNG. Five times faster, 4 % larger.
_FAST = {"compress_level": 1, "compress_type": Image.RLE}


@dataclass(frozen=True)
class _Source:
    """Where one face comes from; picklable, for it travels to another process."""

    id: str
    image: Path | None
    mask: Path | None  # the file that reports about the mask name
    ids: Callable[[], np.ndarray]  # paints or reads the `(h, w)` ids
    captions: Path | FaceAttributes | None  # a text file, attributes, or None: from the mask


def from_celebamask_hq(
    raw: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    size: int = 512,
    train: int = 27000,
    progress: bool = True,
) -> None:
    """Convert the CelebAMask-HQ download, its part masks painted in `g_mask.py` order.

    raw holds `CelebA-HQ-img/{k}.jpg` and `CelebAMask-HQ-mask-anno/{k//2000}/{k:05d}_{part}.png`;
    later classes are painted over earlier ones. captions: folder of MM-CelebA-HQ's `{k}.txt`, by
    default `raw/text` where it exists, else captions are composed from
    `CelebAMask-HQ-attribute-anno.txt`, else from the masks. Ids below `train` are the training
    split, the others the test split (27000: the split of the paper).
    """
    raw = Path(raw)
    report = Report(raw)
    images, parts = celebamask_files(raw, report)
    texts = _caption_source(raw, captions)
    sources = []
    for name in sorted(images.keys() | parts.keys(), key=_natural):
        own = parts.get(name, {})
        folder = raw / PART_FOLDERS[0] / (str(int(name) // 2000) if name.isdigit() else "")
        sources.append(
            _Source(
                id=name,
                image=images.get(name, raw / "CelebA-HQ-img" / f"{name}.jpg"),
                mask=next(iter(own.values()), folder / f"{name.zfill(5)}_skin.png"),
                ids=partial(paint_parts, own),
                captions=texts(name),
            )
        )
    splits = {s.id: "train" if _natural(s.id)[0] < train else "test" for s in sources}
    _convert(sources, splits, Path(out), size, report, progress)


def from_merged(
    source: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    size: int = 512,
    train: int | None = None,
    progress: bool = True,
) -> None:
    """Convert folders of images and merged masks: `images/*.jpg` and `masks/*.png`.

    Folders may be called images, image or face; masks or mask; captions or text. Masks hold ids
    (palette or grey) or colours of `PALETTE`. Without a captions folder, captions are composed from
    the masks. The first `train` faces in natural order of their ids (default: nine of ten) are the
    training split, the others the test split.
    """
    source = Path(source)
    report = Report(source)
    pictures = _first_folder(source, ("images", "image", "face"))
    folder = _first_folder(source, ("masks", "mask"))
    images = files_by_id(pictures, IMAGE_SUFFIXES, report)
    masks = files_by_id(folder, (".png",), report)
    texts = _caption_source(source, captions)
    names = sorted(images.keys() | masks.keys(), key=_natural)
    sources = [
        _Source(
            id=name,
            image=images.get(name, pictures / f"{name}.jpg"),
            mask=masks.get(name, folder / f"{name}.png"),
            ids=partial(_read_ids_or_colours, masks.get(name, folder / f"{name}.png")),
            captions=texts(name),
        )
        for name in names
    ]
    train = len(names) * 9 // 10 if train is None else train
    splits = {name: "train" if i < train else "test" for i, name in enumerate(names)}
    _convert(sources, splits, Path(out), size, report, progress)


def celebamask_files(
    raw: Path, report: Report
) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Images and part files of the CelebAMask-HQ download by id: `{k: jpg}`, `{k: {part: png}}`.

    What is no part file is added to `report`.
    """
    parts: dict[str, dict[str, Path]] = {}
    for path in _first_folder(raw, PART_FOLDERS).glob("*/*.png"):
        match = _PART.fullmatch(path.name)
        if match and match[2] in CLASSES[1:]:
            parts.setdefault(str(int(match[1])), {})[match[2]] = path
        else:
            report.add(path, f"is no part: expected {{id}}_{{part}}.png, part in {CLASSES[1:]}")
    return files_by_id(raw / "CelebA-HQ-img", IMAGE_SUFFIXES, report), parts


def paint_parts(parts: Mapping[str, Path]) -> np.ndarray:
    """Paint part masks (nonzero = the part) into ids `(h, w)` uint8, in id order, later on top."""
    ids: np.ndarray | None = None
    for name in CLASSES[1:]:
        if name not in parts:
            continue
        try:
            with Image.open(parts[name]) as file:  # g_mask.py reads one channel, too
                part = np.asarray(file.getchannel(0) if file.mode == "RGB" else file.convert("L"))
        except (OSError, SyntaxError) as error:
            raise DataError(f"unreadable part {parts[name].name} ({error})") from error
        if ids is None:
            ids = np.zeros(part.shape, np.uint8)
        if part.shape != ids.shape:
            raise DataError(f"part {parts[name].name} is {part.shape}, others {ids.shape}")
        np.copyto(ids, CLASS_ID[name], where=part != 0)
    if ids is None:
        raise DataError("no mask part of this face")
    return ids


def _convert(
    sources: list[_Source],
    splits: Mapping[str, str],
    out: Path,
    size: int,
    report: Report,
    progress: bool,
) -> None:
    """Write all faces, then the manifest, check the whole folder and give it its name."""
    if out.exists():
        raise DataError(f"{out} exists already: remove it to convert again")
    if not sources:
        raise DataError(f"{report.root}: no faces found")
    report.faces = len(sources)
    part = out.with_name(f".{out.name}.partial")
    names = {source.id for source in sources}
    for kind in ("image", "mask", "text"):
        (part / kind).mkdir(parents=True, exist_ok=True)
        for path in (part / kind).iterdir():
            if path.stem not in names:  # of a face that the source does not have any more
                path.unlink()
    write = partial(_write_face, root=part, size=size)
    label = "converting" if progress else None
    for problems in parallel(write, sources, label, processes=True):
        for where, reason in problems:
            report.add(where, reason)
    report.raise_if_bad()
    with open(part / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(MANIFEST_COLUMNS)
        for source in sources:
            caption = read_captions(part / "text" / f"{source.id}.txt")[0]
            writer.writerow([source.id, splits[source.id], 0, caption])
    whole = validate(part, progress)
    if whole.problems:  # of all faces together, such as exchanged sides: nothing to resume
        shutil.rmtree(part)
    whole.raise_if_bad()
    part.rename(out)


def _write_face(source: _Source, root: Path, size: int) -> list[tuple[Path, str]]:
    """Convert one face unless it is there; returns its problems, and writes nothing if any."""
    problems: list[tuple[Path, str]] = []
    image = ids = lines = None
    try:
        if isinstance(source.captions, Path):
            lines = read_captions(source.captions)
    except DataError as error:
        problems.append((source.captions, str(error)))
    if not problems and _is_written(source.id, root, size, lines):
        return []
    try:
        image = read_image(source.image, size)
    except DataError as error:
        problems.append((source.image, str(error)))
    try:
        ids = source.ids()
        if ids.shape[0] != ids.shape[1]:
            raise DataError(f"wrong size {ids.shape[1]}x{ids.shape[0]}: faces are square")
        ids = np.asarray(Image.fromarray(ids).resize((size, size), Image.Resampling.NEAREST))
        check_ids(ids)
    except DataError as error:
        problems.append((source.mask, str(error)))
    if problems:
        return problems
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    text = "\n".join(lines or _compose(source, ids, image)) + "\n"
    mask = Image.fromarray(ids)
    mask.putpalette([value for rgb in PALETTE for value in rgb])
    with Image.open(source.image) as file:
        keep = file.width == size  # then its bytes are copied, JPEG is not compressed again
    suffix = source.image.suffix.lower() if keep else ".png"

    with whole_file(root / "mask" / f"{source.id}.png") as part:
        mask.save(part, format="png")
    with whole_file(root / "image" / f"{source.id}{suffix}") as part:
        if keep:
            part.write_bytes(source.image.read_bytes())
        else:
            image.save(part, format="png", **_FAST)
    for other in set(IMAGE_SUFFIXES) - {suffix}:  # of an earlier conversion at another size
        (root / "image" / f"{source.id}{other}").unlink(missing_ok=True)
    with whole_file(root / "text" / f"{source.id}.txt") as part:
        part.write_text(text, "utf-8")
    return []


def _is_written(name: str, root: Path, size: int, lines: tuple[str, ...] | None) -> bool:
    """Is this face in `root`, readable, of this size and with these captions (None: any)?"""
    image = [p for s in IMAGE_SUFFIXES if (p := root / "image" / f"{name}{s}").exists()]
    try:
        found = read_captions(root / "text" / f"{name}.txt")
        return (
            len(image) == 1
            and read_image(image[0]).width == size
            and read_mask(root / "mask" / f"{name}.png").shape == (size, size)
            and lines in (None, found)
        )
    except DataError:
        return False


def _compose(source: _Source, ids: np.ndarray, image: Image.Image) -> list[str]:
    """Captions of a face that has none, from its attributes or else from its mask."""
    if source.captions is not None:
        return compose(source.captions)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    return captions_from_mask(torch.from_numpy(ids.astype(np.int64)), pixels)


def _caption_source(
    root: Path, folder: str | Path | None
) -> Callable[[str], Path | FaceAttributes | None]:
    """Where captions come from: a folder, else CelebA attributes, else None (the masks)."""
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"{folder}: no such captions folder")
    found = [Path(folder)] if folder else [root / n for n in ("captions", "text")]
    for path in found:
        if path.is_dir():
            return lambda name: path / f"{name}.txt"
    table = root / "CelebAMask-HQ-attribute-anno.txt"
    faces = celeba_attributes(table) if table.exists() else {}
    return faces.get


def _read_ids_or_colours(path: Path) -> np.ndarray:
    """Ids of a palette, grey or colour mask."""
    try:
        with Image.open(path) as file:
            colours = np.array(file.convert("RGB")) if file.mode in ("RGB", "RGBA") else None
    except (OSError, SyntaxError) as error:
        raise DataError(f"unreadable mask ({error})") from error
    return read_mask(path) if colours is None else labels_from_palette(colours)


def _first_folder(root: Path, names: tuple[str, ...]) -> Path:
    """The first of these folders that exists."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: has none of the folders {', '.join(names)}")


def _natural(name: str) -> tuple[float, str]:
    """Sort key: numbers by value, other names after them."""
    return (int(name), name) if name.isdigit() else (float("inf"), name)
