"""Foreign folders of faces -> the layout of `validation.py`.

Chosen here: a converter works in `.{name}.partial` beside the target, writes each file under a
temporary name and renames it, and skips faces that are complete there, so that an interrupted
conversion resumes. The target appears only when every face is good; otherwise one `DataError` lists
every bad file. Masks are resized nearest only, images bicubic with antialiasing.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .attributes import CLASS_ID, CLASSES, PALETTE
from .captions import FaceAttributes, captions_from_mask
from .captions import captions as compose
from .validation import (
    IMAGE_SUFFIXES,
    MANIFEST_COLUMNS,
    DataError,
    Report,
    check_ids,
    files_by_id,
    parallel,
    read_captions,
    read_image,
    read_mask,
    validate,
)

_PART = re.compile(r"(\d+)_(\w+)\.png")


@dataclass(frozen=True)
class _Source:
    """Where one face comes from."""

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
    images = files_by_id(raw / "CelebA-HQ-img", IMAGE_SUFFIXES, report)
    annotation = _first_folder(raw, ("CelebAMask-HQ-mask-anno", "CelebAMaskHQ-mask-anno"))
    parts: dict[str, dict[str, Path]] = {}
    for path in annotation.glob("*/*.png"):
        match = _PART.fullmatch(path.name)
        if match and match[2] in CLASSES[1:]:
            parts.setdefault(str(int(match[1])), {})[match[2]] = path
        else:
            report.add(path, f"is no part: expected {{id}}_{{part}}.png, part in {CLASSES[1:]}")
    texts = _caption_source(raw, captions)
    sources = []
    for name in sorted(images.keys() | parts.keys(), key=_natural):
        own = parts.get(name, {})
        folder = annotation / str(int(name) // 2000) if name.isdigit() else annotation
        sources.append(
            _Source(
                id=name,
                image=images.get(name, raw / "CelebA-HQ-img" / f"{name}.jpg"),
                mask=next(iter(own.values()), folder / f"{name.zfill(5)}_skin.png"),
                ids=lambda own=own: paint_parts(own),
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
            ids=lambda path=masks.get(name, folder / f"{name}.png"): _read_ids_or_colours(path),
            captions=texts(name),
        )
        for name in names
    ]
    train = len(names) * 9 // 10 if train is None else train
    splits = {name: "train" if i < train else "test" for i, name in enumerate(names)}
    _convert(sources, splits, Path(out), size, report, progress)


def paint_parts(parts: Mapping[str, Path]) -> np.ndarray:
    """Paint part masks (nonzero = the part) into ids `(h, w)` uint8, in id order, later on top."""
    ids: np.ndarray | None = None
    for name in CLASSES[1:]:
        if name not in parts:
            continue
        try:
            with Image.open(parts[name]) as file:
                part = np.asarray(file.convert("L")) != 0
        except (OSError, SyntaxError) as error:
            raise DataError(f"unreadable part {parts[name].name} ({error})") from error
        if ids is None:
            ids = np.zeros(part.shape, np.uint8)
        if part.shape != ids.shape:
            raise DataError(f"part {parts[name].name} is {part.shape}, others {ids.shape}")
        ids[part] = CLASS_ID[name]
    if ids is None:
        raise DataError("no mask part of this face")
    return ids


def labels_from_palette(
    rgb: np.ndarray,
    palette: tuple[tuple[int, int, int], ...] = PALETTE,
    tolerance: float = 32.0,
) -> np.ndarray:
    """Nearest palette colour of each pixel: `(h, w, 3)` uint8 -> ids `(h, w)` uint8.

    Raises DataError if any pixel lies further than `tolerance` (Euclidean, 0-255 units) from every
    colour: another palette (CelebAMask-HQ's own tools use three) or a lossy file.
    """
    rgb = np.asarray(rgb)
    colours, index, counts = np.unique(
        rgb.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    distance = np.linalg.norm(colours[:, None].astype(float) - np.array(palette)[None], axis=-1)
    nearest, gap = distance.argmin(1), distance.min(1)
    if (gap > tolerance).any():
        worst = int(np.where(gap > tolerance, counts, 0).argmax())
        raise DataError(
            f"colour {tuple(int(c) for c in colours[worst])} on {counts[worst] / counts.sum():.2%} "
            f"of the pixels is {gap[worst]:.0f} away from every palette colour (limit "
            f"{tolerance:g}): another palette, or a mask saved as JPEG"
        )
    return nearest[index].reshape(rgb.shape[:2]).astype(np.uint8)


def celeba_attributes(path: Path) -> dict[str, FaceAttributes]:
    """`CelebAMask-HQ-attribute-anno.txt` -> attributes in the words of `captions`, by id."""
    _, header, *lines = path.read_text(encoding="utf-8").splitlines()
    names, faces = header.split(), {}
    for line in lines:
        file, *values = line.split()
        has = {name: value == "1" for name, value in zip(names, values, strict=True)}
        colours = [c for c in ("black", "blond", "brown", "gray") if has[f"{c.title()}_Hair"]]
        face: dict[str, bool | str] = {key: has[name] for key, name in _CELEBA.items()}
        face["beard"] = not has["No_Beard"] and not has["5_o_Clock_Shadow"]
        if len(colours) == 1:
            face["hair_colour"] = colours[0]
        if has["Wavy_Hair"] != has["Straight_Hair"]:
            face["hair_style"] = "wavy" if has["Wavy_Hair"] else "straight"
        faces[Path(file).stem] = face
    return faces


_CELEBA = {  # our key -> CelebA's name
    "male": "Male",
    "young": "Young",
    "bald": "Bald",
    "bangs": "Bangs",
    "receding_hairline": "Receding_Hairline",
    "smiling": "Smiling",
    "mouth_open": "Mouth_Slightly_Open",
    "eyeglasses": "Eyeglasses",
    "hat": "Wearing_Hat",
    "earrings": "Wearing_Earrings",
    "necklace": "Wearing_Necklace",
    "lipstick": "Wearing_Lipstick",
    "mustache": "Mustache",
    "heavy_makeup": "Heavy_Makeup",
    "arched_eyebrows": "Arched_Eyebrows",
    "bushy_eyebrows": "Bushy_Eyebrows",
    "big_nose": "Big_Nose",
    "big_lips": "Big_Lips",
    "narrow_eyes": "Narrow_Eyes",
    "bags_under_eyes": "Bags_Under_Eyes",
    "pale_skin": "Pale_Skin",
    "rosy_cheeks": "Rosy_Cheeks",
    "chubby": "Chubby",
    "oval_face": "Oval_Face",
}


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
    partial = out.with_name(f".{out.name}.partial")
    for kind in ("image", "mask", "text"):
        (partial / kind).mkdir(parents=True, exist_ok=True)
    done = set.intersection(
        *({p.stem for p in (partial / kind).iterdir()} for kind in ("image", "mask", "text"))
    )
    todo = [source for source in sources if source.id not in done]
    label = "converting" if progress else None
    for problems in parallel(lambda source: _write_face(source, partial, size), todo, label):
        for where, reason in problems:
            report.add(where, reason)
    report.raise_if_bad()
    with open(partial / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(MANIFEST_COLUMNS)
        for source in sources:
            caption = read_captions(partial / "text" / f"{source.id}.txt")[0]
            writer.writerow([source.id, splits[source.id], 0, caption])
    whole = validate(partial, progress)
    if whole.problems:  # of all faces together, such as exchanged sides: nothing to resume
        shutil.rmtree(partial)
    whole.raise_if_bad()
    partial.rename(out)


def _write_face(source: _Source, root: Path, size: int) -> list[tuple[Path, str]]:
    """Convert one face; returns its problems, and writes nothing if there are any."""
    problems: list[tuple[Path, str]] = []
    image = ids = lines = None
    try:
        image = read_image(source.image)
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
    try:
        if isinstance(source.captions, Path):
            lines = read_captions(source.captions)
    except DataError as error:
        problems.append((source.captions, str(error)))
    if problems:
        return problems
    keep = image.width == size  # then its bytes are copied, JPEG is not compressed again
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    lines = lines or _compose(source, ids, image)
    mask = Image.fromarray(ids)
    mask.putpalette([value for rgb in PALETTE for value in rgb])
    suffix = source.image.suffix.lower() if keep else ".png"
    _write(root / "mask" / f"{source.id}.png", lambda path: mask.save(path, format="png"))
    _write(
        root / "image" / f"{source.id}{suffix}",
        (lambda path: path.write_bytes(source.image.read_bytes()))
        if keep
        else (lambda path: image.save(path, format="png")),
    )
    text = "\n".join(lines) + "\n"
    _write(root / "text" / f"{source.id}.txt", lambda path: path.write_text(text, encoding="utf-8"))
    return []


def _compose(source: _Source, ids: np.ndarray, image: Image.Image) -> list[str]:
    """Captions of a face that has none, from its attributes or else from its mask."""
    if source.captions is not None:
        return compose(source.captions)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    return captions_from_mask(torch.from_numpy(ids.astype(np.int64)), pixels)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name outside the folder's listing, then rename."""
    temporary = path.parent.parent / f".{path.parent.name}-{path.name}"
    write(temporary)
    os.replace(temporary, path)


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
