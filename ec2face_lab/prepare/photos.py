"""Convert photos without masks to the data layout through facer: detection, alignment, parsing.

Parsers expect FFHQ's frame, which `facer.transform.get_quad` computes from five points. Photos of
FFHQ and CelebA-HQ fill that frame already. They are parsed whole and kept as they are, because
another crop would lose their border; this includes square photos in which the detector misses the
face but the parser sees a nose. Every other photo is cropped to the frame of its largest face.

Left and right are checked twice on every photo: the detector's first eye has to lie left in the
picture, and the parser's `l_eye` (the subject's left) right of `r_eye`. `check_class_order`
compares a parser with known masks.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, CLASSES, FLIP_PAIRS, NUM_CLASSES
from ec2face_core.io.masks import read_mask
from ec2face_core.io.pictures import open_picture, to_rgb
from ec2face_core.io.report import DataError, Report
from ec2face_core.perception import FaceParser, WeightsError
from ec2face_core.runs import tensors_sha256, whole_file

from . import origins
from .convert import clear_others, from_merged
from .downloads import is_plain
from .validate import eye_order
from .weights import check_tensors

Detector = Callable[[Tensor], Mapping[str, Tensor]]  # uint8 `b 3 h w` -> facer's rects and points

SIDE = 1024  # pixels of the longer side of the photo that the detector gets
TOLERANCE = 0.15  # of the side: how far a frame's corner may be from the photo's

# Classes that parsers recognise reliably (FaRL's F1 above 0.85 on CelebAMask-HQ).
STABLE = (
    "skin", "nose", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
    "l_lip", "hair", "neck",
)  # fmt: skip


def face_detector(path: Path, device: torch.device | str = "cpu") -> Detector:
    """The RetinaFace of facer from its weight file `mobilenet0.25_Final.pth`.

    Raises:
        WeightsError: the file is missing or incomplete, or holds more than tensors.
    """
    check_tensors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import facer

        # our own path, because facer opens its download without torch's restrictions
        detector = facer.face_detector("retinaface/mobilenet", device, model_path=str(path))
    return torch.no_grad()(lambda images: detector(images.to(device)))


def from_photos(
    photos: Mapping[str, Path],
    captions: Mapping[str, Path],
    out: Path,
    parser: FaceParser,
    detect: Detector,
    size: int = 512,
    progress: bool = True,
) -> None:
    """Parse photos and write them as faces of the split `test`; resumable, all or nothing.

    Args:
        photos: id -> photo.
        captions: id -> text file, one caption per line.
        out: new folder; `.{out.name}.parsed` beside it holds the parsed photos until all are done.
        parser: gives the masks.
        detect: finds the faces.
        size: side of images and masks in pixels.
        progress: show a progress bar.

    Raises:
        DataError: one report of every photo without a face, without its frame, or with left and
            right exchanged.
        OSError: the disk is full; parsed photos stay.
    """
    from tqdm.auto import tqdm

    if out.exists():
        raise DataError(f"{out} exists already: remove it to parse again")
    parsed = out.with_name(f".{out.name}.parsed")
    clear_others(parsed, ("images", "masks", "text", origins.FOLDER), photos)
    report = Report(out, len(photos))
    tensors = {name: x.cpu().contiguous() for name, x in parser.net.state_dict().items()}
    weights = tensors_sha256(tensors)
    for name, path in tqdm(photos.items(), "parsing", mininterval=1.0, disable=not progress):
        if name not in captions:
            report.add(path, "no captions")
            continue
        try:
            _parse_photo(name, path, parsed, parser, detect, size, weights)
        except DataError as error:
            report.add(path, error)
        with whole_file(parsed / "text" / f"{name}.txt") as part:
            shutil.copyfile(captions[name], part)
    report.raise_if_bad()
    from_merged(parsed, out, size=size, train=0, progress=progress)
    shutil.rmtree(parsed)


def align(photo: Image.Image, points: np.ndarray) -> Image.Image:
    """The FFHQ frame around a face; the photo itself where it fills that frame already.

    Args:
        photo: RGB.
        points: `(5, 2)` x, y in pixels: the eyes, the nose, the corners of the mouth, image left
            first.

    Raises:
        DataError: the frame leaves the photo, or the points are those of a mirrored face.
    """
    from facer.transform import get_quad

    if points[[0, 3], 0].sum() >= points[[1, 4], 0].sum():
        raise DataError("the detector's points are mirrored: its first eye lies right of the other")
    corners = get_quad(torch.as_tensor(points)).numpy()  # clockwise from the top left
    width, height = photo.size
    frame = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    side = float(np.linalg.norm(corners[1] - corners[0]))
    if width == height and np.abs(corners - frame).max() <= TOLERANCE * width:
        return photo
    outside = np.maximum(-corners, corners - (width, height)).max()
    if outside > TOLERANCE * side:
        raise DataError(f"the face is cut off: its frame leaves the photo by {outside:.0f} pixels")
    quad = corners[[0, 3, 2, 1]].ravel().tolist()  # PIL goes anticlockwise
    size = (round(side), round(side))
    return photo.transform(size, Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)


def check_class_order(parser: FaceParser, images: Tensor, label_maps: Tensor) -> None:
    """Compare a parser with known masks; refuse one whose classes are exchanged.

    An exchange moves two classes, so a single class that is mostly taken for another one is only
    weak and passes.

    Args:
        parser: the parser to check.
        images: a few faces `b 3 h w` in [-1, 1].
        label_maps: their ids `b h w`.

    Raises:
        WeightsError: it names each exchanged class and what the parser takes it for.
    """
    parsed = parser.parse(images.to(parser.device)).cpu()
    pairs = label_maps.long().flatten() * NUM_CLASSES + parsed.flatten()
    confusion = torch.bincount(pairs, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)
    enough = confusion.sum(1) > label_maps.numel() // 10_000
    taken = {name: CLASSES[int(confusion[CLASS_ID[name]].argmax())] for name in STABLE}
    wrong = [name for name in STABLE if enough[CLASS_ID[name]] and taken[name] != name]
    if len(wrong) > 1:
        raise WeightsError(
            f"wrong class order: it takes {', '.join(f'{n} for {taken[n]}' for n in wrong)}. Its "
            "channels have to be in the order of facer's farl/celebm/448 "
            "(attributes.FACER_TO_CELEBAMASK); facer's own names exchange left and right"
        )


def _parse_photo(
    name: str,
    path: Path,
    parsed: Path,
    parser: FaceParser,
    detect: Detector,
    size: int,
    weights: str,
) -> None:
    """Write the aligned image and the mask of one photo, unless both are there and its own."""
    image_path = parsed / "images" / f"{name}.png"
    mask_path = parsed / "masks" / f"{name}.png"
    made_of = origins.origin([path], int(size), weights)
    try:
        known = origins.is_of(parsed, name, made_of) and image_path.exists()
        if known and read_mask(mask_path).shape == (size, size):
            return
    except DataError:
        pass
    origins.forget(parsed, name)
    photo = to_rgb(open_picture(path))
    aligned, ids = parse_face(photo, parser, size, detect)
    if aligned is photo and is_plain(path, photo.width) and path.suffix.lower() == ".png":
        image_path.unlink(missing_ok=True)
        os.symlink(path.resolve(), image_path)
    else:
        with whole_file(image_path) as part:
            aligned.save(part, format="png")
    with whole_file(mask_path) as part:
        Image.fromarray(ids).save(part, format="png")
    origins.note(parsed, name, made_of)


def parse_face(
    photo: Image.Image, parser: FaceParser, size: int, detect: Detector | None = None
) -> tuple[Image.Image, np.ndarray]:
    """The frame around the largest face of a photo, and its class ids.

    Args:
        photo: RGB.
        parser: gives the mask.
        size: side of the mask in pixels.
        detect: finds the faces; None: the photo is square and filled by a face, as FFHQ's are.

    Returns:
        The aligned photo, which is `photo` itself where nothing was cut, and ids `(size, size)`
        uint8.

    Raises:
        DataError: no face, without its frame, or with left and right exchanged.
    """
    points = _largest_face(photo, detect) if detect else None
    if points is None and photo.width != photo.height:
        raise DataError("no face is found in this photo")
    aligned = photo if points is None else align(photo, points)
    pixels = aligned.resize((size, size), Image.Resampling.BICUBIC)
    batch = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 127.5 - 1
    ids = parser.parse(batch.to(parser.device))[0].to(torch.uint8).cpu().numpy()
    if not (ids == CLASS_ID["nose"]).any():
        raise DataError("no face is found in this photo")
    order = eye_order(ids)
    if order is not None and order <= 0:
        raise DataError(
            "left and right are exchanged: the parser's l_eye lies left of its r_eye in the "
            f"picture; its channels have to swap {FLIP_PAIRS}"
        )
    return aligned, ids


def _largest_face(photo: Image.Image, detect: Detector) -> np.ndarray | None:
    """The five points of the largest face, `(5, 2)` x, y in pixels of the photo; None without."""
    scale = max(1.0, max(photo.size) / SIDE)
    small = photo.resize((round(photo.width / scale), round(photo.height / scale)))
    faces = detect(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None])
    rects = faces["rects"]
    if not len(rects):
        return None
    largest = int(((rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1])).argmax())
    return faces["points"][largest].cpu().numpy().astype(np.float64) * scale
