"""Converters from other folders of faces to the layout of `ec2face_core.data`.

A converter works in `.{name}.partial` beside the target, with one process per core. It writes each
file under a temporary name, renames it, and skips faces that are valid already and were made of the
same files (`origins.py`), so that an interrupted conversion resumes. The target appears only when
every face is good; otherwise one `DataError` lists every bad file. With `skip_bad` it appears
without the faces that are not, which `left_out.csv` lists. Names of images, masks and captions may
differ by zero padding. Masks are resized to the nearest pixel, images bicubically with antialiasing
(after `read_reduced` has halved large JPEGs).
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
    file_id,
    files_by_id,
    is_dropping,
    report_missing,
)
from ec2face_core.guards.checks import check_number
from ec2face_core.io.masks import check_ids, read_mask
from ec2face_core.io.pictures import IMAGE_SUFFIXES, read_image
from ec2face_core.io.report import DataError, Report, printable
from ec2face_core.io.texts import MANIFEST_COLUMNS, check_id, read_captions
from ec2face_core.runs import whole_file

from ..workers import in_processes
from . import origins
from .caption_files import Captions, find_captions
from .captions import FaceAttributes, captions_from_mask
from .captions import captions as compose
from .downloads import is_plain, read_part, read_reduced
from .pairs import paired
from .snapping import read_snapped
from .validate import Problems, check_folder, try_read, validate

PART_FOLDERS = ("CelebAMask-HQ-mask-anno", "CelebAMaskHQ-mask-anno")
PART_NAME = re.compile(r"(\d+)_(\w+)\.png")

# Of PNG images: run lengths alone, as zlib has them for PNG. Five times faster, 4 % larger.
FAST_PNG = {"compress_level": 1, "compress_type": Image.RLE}


@dataclass(frozen=True)
class _Source:
    """Where one face comes from. Picklable, because another process converts it."""

    id: str
    image: Path
    mask: Path  # the file that reports name for problems of the mask
    ids: Callable[[], np.ndarray]  # paints or reads the `(h, w)` ids
    parts: tuple[Path, ...]  # what it reads
    way: str  # how it does so
    captions: Path | FaceAttributes | None  # a text file, attributes, or None: from the mask
    missing: tuple[tuple[Path, str], ...] = ()  # files that are not there, and why


SMALLEST = 16  # pixels of the side, as data.size has it
LARGEST = 65_536
KINDS = ("image", "mask", "text", origins.FOLDER)
LEFT_OUT = "left_out.csv"  # where, reason: what `skip_bad` left out


def from_celebamask_hq(
    raw: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    size: int = 512,
    train: int = 27000,
    progress: bool = True,
    skip_bad: bool = False,
) -> Report:
    """Convert the CelebAMask-HQ download; part masks are painted in the order of `g_mask.py`.

    Args:
        raw: folder with `CelebA-HQ-img/{k}.jpg` and
            `CelebAMask-HQ-mask-anno/{k//2000}/{k:05d}_{part}.png`.
        out: new folder.
        captions: folder of MM-CelebA-HQ's `{k}.txt`, by default `raw/text`. Where it does not
            exist, captions are composed from `CelebAMask-HQ-attribute-anno.txt`, else from masks.
        size: side of images and masks in pixels.
        train: ids below this are the training split, the others the test split (27000 is the
            paper's split).
        progress: show a progress bar.
        skip_bad: leave out the faces that cannot be used instead of refusing them all.

    Returns:
        What was left out, if anything, and notes.

    Raises:
        DataError: one report of every bad file, or `out` exists already.
        TypeError, ValueError: `size` or `train` is no whole number of its range.
        OSError: the disk is full; the same call resumes.
    """
    raw = check_folder(raw)
    _check_numbers(size, train)
    report = Report(raw)
    images, parts = celebamask_files(raw, report)
    parts = paired(images, parts)
    names = sorted(images.keys() | parts.keys(), key=_natural)
    texts = find_captions(raw, captions, names, [raw / "CelebA-HQ-img"], report)
    sources = []
    for name in names:
        masks = parts.get(name, {})
        folder = raw / PART_FOLDERS[0] / (str(int(name) // 2000) if name.isdecimal() else "")
        sources.append(
            _Source(
                id=name,
                image=images.get(name, raw / "CelebA-HQ-img" / f"{name}.jpg"),
                mask=next(iter(masks.values()), folder / f"{name.zfill(5)}_skin.png"),
                ids=partial(paint_parts, masks),
                parts=tuple(sorted(masks.values())),
                way="parts",
                captions=texts.found.get(name),
                missing=_without_text(texts, name),
            )
        )
    splits = {s.id: "train" if _natural(s.id)[0] < train else "test" for s in sources}
    return _convert(sources, splits, Path(out), size, report, progress, skip_bad, texts.note)


def from_merged(
    source: str | Path,
    out: str | Path,
    captions: str | Path | None = None,
    size: int = 512,
    train: int | None = None,
    progress: bool = True,
    skip_bad: bool = False,
    snap_edges: bool = False,
) -> Report:
    """Convert folders of images and merged masks: `images/*.jpg` and `masks/*.png`.

    Args:
        source: its folders may be called images, image or face; masks or mask; captions or text.
            Masks hold ids (palette or grey) or colours of `PALETTE`.
        out: new folder.
        captions: folder of `{id}.txt`, by default `captions` or `text`. Without one, captions are
            composed from the masks, and a note says so.
        size: side of images and masks in pixels.
        train: the first so many faces in natural order of their ids (default: nine of ten) are the
            training split, the others the test split.
        progress: show a progress bar.
        skip_bad: leave out the faces that cannot be used instead of refusing them all.
        snap_edges: of colour masks, give smooth edges to their neighbours instead of refusing them.

    Returns:
        What was left out, if anything, and notes.

    Raises:
        DataError: one report of every bad file, or `out` exists already.
        TypeError, ValueError: `size` or `train` is no whole number of its range.
        OSError: the disk is full; the same call resumes.
    """
    source = check_folder(source)
    _check_numbers(size, train)
    report = Report(source)
    image_folder = _first_folder(source, ("images", "image", "face"))
    mask_folder = _first_folder(source, ("masks", "mask"))
    images = files_by_id(image_folder, IMAGE_SUFFIXES, report)
    masks = files_by_id(mask_folder, (".png",), report)
    masks = paired(images, masks)
    _refuse_other_names(report.root, images, masks)
    names = sorted(images.keys() | masks.keys(), key=_natural)
    if train is not None and train > len(names):
        raise DataError(
            f"train {train}: {source} has {len(names)} faces; give fewer, so that some are left to "
            "test"
        )
    texts = find_captions(source, captions, names, [image_folder, mask_folder], report)
    absent = Report(source)
    report_missing(image_folder, "image", masks.keys() - images.keys(), absent, ".jpg")
    report_missing(mask_folder, "mask", images.keys() - masks.keys(), absent)
    reasons = dict(absent.problems)
    sources = []
    for name in names:
        image = images.get(name, image_folder / f"{name}.jpg")
        mask = masks.get(name, mask_folder / f"{name}.png")
        missing = tuple(
            (path, reasons[str(path.relative_to(source))])
            for path, known in ((image, images), (mask, masks))
            if name not in known
        )
        ids = partial(read_snapped, mask) if snap_edges else partial(read_mask, mask, colours=True)
        way = "snapped" if snap_edges else "read"
        text = texts.found.get(name)
        missing += _without_text(texts, name)
        sources.append(_Source(name, image, mask, ids, (mask,), way, text, missing))
    train = len(names) * 9 // 10 if train is None else train
    splits = {name: "train" if i < train else "test" for i, name in enumerate(names)}
    return _convert(sources, splits, Path(out), size, report, progress, skip_bad, texts.note)


def celebamask_files(
    raw: Path, report: Report
) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Images and part files of the CelebAMask-HQ download by id: `{k: jpg}`, `{k: {part: png}}`.

    Other files among the parts are added to `report`.
    """
    parts: dict[str, dict[str, Path]] = {}
    folder = _first_folder(raw, PART_FOLDERS)
    for path in folder.glob("*/*.png"):
        if is_dropping(path.relative_to(folder)):
            continue
        match = PART_NAME.fullmatch(path.name)
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
            part = read_part(parts[name])
        except DataError as error:
            raise DataError(f"{parts[name].name}: {error}") from error
        if ids is None:
            ids = np.zeros(part.shape, np.uint8)
        if part.shape != ids.shape:
            raise DataError(f"part {parts[name].name} is {part.shape}, others {ids.shape}")
        np.copyto(ids, CLASS_ID[name], where=part)
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
    skip_bad: bool,
    note: str,
) -> Report:
    """Write all faces, then the manifest, check the whole folder and give it its name."""
    _check_out(out)
    if not sources:
        raise DataError(f"{report.root}: no faces found")
    report.faces = len(sources)
    part = out.with_name(f".{out.name}.partial")
    bad = _bad_ids(sources, report)
    named = [source for source in sources if source.id not in bad]
    clear_others(part, KINDS, {source.id: None for source in named})
    write = partial(_write_face, root=part, size=size)
    label = "converting" if progress else None
    for source, problems in zip(named, in_processes(write, named, label), strict=True):
        for path, reason in problems:
            report.add(path, reason)
            bad.add(source.id)
    good = [source for source in sources if source.id not in bad]
    if not (skip_bad and good):
        report.raise_if_bad()
    if bad:
        clear_others(part, KINDS, {source.id: None for source in good})
    (part / LEFT_OUT).unlink(missing_ok=True)  # of an earlier attempt
    if report.problems:
        with open(part / LEFT_OUT, "w", newline="", encoding="utf-8") as file:
            rows = [(printable(where), printable(why)) for where, why in sorted(report.problems)]
            csv.writer(file).writerows([("where", "reason"), *rows])
    with open(part / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(MANIFEST_COLUMNS)
        for source in good:
            caption = read_captions(part / "text" / f"{source.id}.txt")[0]
            writer.writerow([source.id, splits[source.id], 0, caption])
    whole = validate(part, progress)
    whole.raise_if_bad()  # of all faces together, such as exchanged sides: what is there may stay
    shutil.rmtree(part / origins.FOLDER)
    part.rename(out)
    report.faces = len(good)
    report.notes = whole.notes
    if note:
        report.notes.append(note)
    if all(splits[source.id] == "train" for source in good):
        report.notes.append(f"every face ({len(good)}) is of the split train: none is left to test")
    return report


def _check_out(out: Path) -> None:
    """Refuse a target that is there, or whose place is in a file."""
    if out.exists() or out.is_symlink():
        raise DataError(f"{out} exists already: remove it to convert again")
    check_folder(next(parent for parent in out.absolute().parents if parent.exists()))


def _check_numbers(size: int, train: int | None) -> None:
    check_number(size, "size", whole=True)
    if size < SMALLEST:
        raise DataError(f"size {size}: faces have {SMALLEST} pixels or more")
    check_number(size, "size", SMALLEST, LARGEST, whole=True)
    if train is not None:
        check_number(train, "train", 0, whole=True)


def _without_text(texts: Captions, name: str) -> tuple[tuple[Path, str], ...]:
    """The missing text file of a face, as `_Source.missing` has it."""
    return (texts.missing[name],) if name in texts.missing else ()


def _bad_ids(sources: list[_Source], report: Report) -> set[str]:
    """Faces whose names a manifest cannot hold; they are added to `report`."""
    bad = set()
    for source in sources:
        try:
            check_id(source.id)
        except DataError as error:
            report.add(source.image, error)
            bad.add(source.id)
    return bad


def clear_others(root: Path, kinds: tuple[str, ...], ids: Mapping[str, object]) -> None:
    """Make the folders `root/{kind}` and delete files in them that belong to none of these ids."""
    for kind in kinds:
        (root / kind).mkdir(parents=True, exist_ok=True)
        for path in (root / kind).iterdir():
            if file_id(path) not in ids:
                path.unlink()


def _write_face(source: _Source, root: Path, size: int) -> Problems:
    """Convert one face unless it is there; returns its problems, and writes nothing if any."""
    problems: Problems = list(source.missing)
    absent = {path for path, _ in problems}
    text = source.captions if isinstance(source.captions, Path) else None
    lines = try_read(problems, text, read_captions)
    files = (source.image, *source.parts, *([] if text is None else [text]))
    facts = None if text else source.captions  # attributes
    made_of = None if problems else origins.origin(files, int(size), source.way, facts)
    if origins.is_of(root, source.id, made_of) and _is_written(source.id, root, size):
        return []
    image_file = None if source.image in absent else source.image
    mask_file = None if source.mask in absent else source.mask
    image = try_read(problems, image_file, read_reduced, size)
    ids = try_read(problems, mask_file, lambda _: _resized_ids(source.ids(), size))
    if image is not None and image.width < SMALLEST:
        reason = f"{image.width}x{image.height}: faces have {SMALLEST} pixels or more"
        problems.append((source.image, reason))
    if problems:
        return problems
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    lines = lines or _compose(source, ids, image)
    mask = Image.fromarray(ids)
    mask.putpalette([value for rgb in PALETTE for value in rgb])
    keep = is_plain(source.image, size)  # its bytes are copied: no JPEG is compressed twice
    suffix = source.image.suffix.lower() if keep else ".png"

    origins.forget(root, source.id)
    with whole_file(root / "mask" / f"{source.id}.png") as part:
        mask.save(part, format="png")
    with whole_file(root / "image" / f"{source.id}{suffix}") as part:
        if keep:
            shutil.copyfile(source.image, part)
        else:
            image.save(part, format="png", **FAST_PNG)
    for other in set(IMAGE_SUFFIXES) - {suffix}:  # of an earlier conversion at another size
        (root / "image" / f"{source.id}{other}").unlink(missing_ok=True)
    with whole_file(root / "text" / f"{source.id}.txt") as part:
        part.write_text("\n".join(lines) + "\n", "utf-8")
    origins.note(root, source.id, made_of)
    return []


def _is_written(name: str, root: Path, size: int) -> bool:
    """Whether `root` holds this face, readable and of this size."""
    images = [p for s in IMAGE_SUFFIXES if (p := root / "image" / f"{name}{s}").exists()]
    try:
        read_captions(root / "text" / f"{name}.txt")
        return (
            len(images) == 1
            and read_image(images[0]).width == size
            and read_mask(root / "mask" / f"{name}.png").shape == (size, size)
        )
    except DataError:
        return False


def _resized_ids(ids: np.ndarray, size: int) -> np.ndarray:
    """Checked ids `(size, size)`; DataError unless they are square."""
    if ids.shape[0] != ids.shape[1]:
        raise DataError(f"wrong size {ids.shape[1]}x{ids.shape[0]}: faces are square")
    ids = np.asarray(Image.fromarray(ids).resize((size, size), Image.Resampling.NEAREST))
    check_ids(ids)
    return ids


def _compose(source: _Source, ids: np.ndarray, image: Image.Image) -> list[str]:
    """Captions of a face that has none, from its attributes or else from its mask."""
    if source.captions is not None:
        return compose(source.captions)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    return captions_from_mask(torch.from_numpy(ids.astype(np.int64)), pixels)


def _refuse_other_names(root: Path, images: Mapping[str, Path], masks: Mapping[str, Path]) -> None:
    """Say in one line that all masks are named as their images, with something added."""
    alone = sorted(images.keys() - masks.keys())
    others = masks.keys() - images.keys()
    for name in others if alone else ():
        before, found, after = name.partition(alone[0])
        fits = {other.removeprefix(before).removesuffix(after) for other in others}
        if found and len(fits & set(alone)) == len(others):
            raise DataError(
                f"{root}: masks are named {before}{{id}}{after}.png, images {{id}}"
                f"{images[alone[0]].suffix}: rename them alike"
            )


def _first_folder(root: Path, names: tuple[str, ...]) -> Path:
    """The first of these folders that exists."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: has none of the folders {', '.join(names)}")


def _natural(name: str) -> tuple[float, str]:
    """Sort key: numbers by value, other names after them."""
    return (int(name), name) if name.isdecimal() else (float("inf"), name)
