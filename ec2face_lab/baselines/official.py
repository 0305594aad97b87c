"""Pictures written by the comparison systems' official repositories, mapped to ids and checked.

    folder = adopt(Path("results/inference_results"), "tedigan", rows, ids, size=512, work=work)

Each repository names its pictures in its own way (read in its code):

    tedigan      {id}.png: the input's name; its loader drops the last partial batch
    uac          {caption}/{n}.png: n counts the faces of equal captions, in order of file names
    pixelface    {key}_{count}.png: key / 10 is the place of the id in the *alphabetical* order of
                 all ids, key % 10 the caption
    codiffusion  {mask file}/{caption}/000000_x_{k}.png: the first of each batch counts
    controlnext, mm2latent, face-mogle, mditface, plain    {id}.png or .jpg

Chosen here: everything is mapped and checked before anything is scored, and one report lists all
problems. Files that an official script writes beside its pictures (codes, masks, further samples,
pictures of other captions) are known by name and left out; any other file is reported. Pictures of
another size than the profile's are resized once, all alike, bicubic.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from ec2face_core.data import is_dropping, without_padding
from ec2face_core.io.pictures import IMAGE_SUFFIXES, open_picture, read_image
from ec2face_core.io.report import DataError, Report
from ec2face_core.io.texts import Row
from ec2face_core.runs import content_key, parallel, path_digest, whole_file

CAPTIONS = 10  # of a face in MM-CelebA-HQ; the keys of PixelFace+ count them


class UnknownFaceError(ValueError):
    """A picture that belongs to no face; the message says why."""


class Naming:
    """Pictures named by id; the other namings differ in the methods.

    Args:
        rows: the manifest in full.
        split: of the faces that the repository was given.
    """

    others = r"about\.json"  # files that are no pictures to score

    def __init__(self, rows: Mapping[str, Row], split: str) -> None:
        self.rows = rows
        self.fed = {name: row for name, row in rows.items() if row.split == split}
        self.padded: dict[str, list[str]] = {}  # names by what they are without leading zeros
        for name in self.fed:
            self.padded.setdefault(without_padding(name), []).append(name)

    def identify(self, path: PurePosixPath) -> str | None:
        """Id of a file; "" for a picture that is left out; None for no picture.

        Raises:
            UnknownFaceError: the picture belongs to no face.
        """
        if path.suffix.lower() not in IMAGE_SUFFIXES or len(path.parts) > 1:
            return None
        return self.known(path.stem)

    def expected(self, name: str) -> str:
        """Where the picture of a face should lie."""
        return f"{name}.png"

    def cause(self, missing: Sequence[str], ids: Sequence[str], left_out: int) -> str:
        """Why pictures may be missing, if it is a known trap of the repository; else "".

        Args:
            missing: faces without a picture.
            ids: the faces to score.
            left_out: number of pictures that were left out.
        """
        return ""

    def known(self, name: str) -> str:
        """The id itself, if it is of the split, or the only one that differs by leading zeros."""
        name = unicodedata.normalize("NFC", name)
        near = self.padded.get(without_padding(name), [])
        if name not in self.fed and len(near) == 1:
            return near[0]
        if name not in self.fed:
            raise UnknownFaceError(f"no face {name} of this split")
        return name


class TediGAN(Naming):
    """By id; the loader may drop the last batch."""

    others = r"inverted_codes\.(pt|npy)"

    def cause(self, missing: Sequence[str], ids: Sequence[str], left_out: int) -> str:
        """The known trap of this repository, or ""."""
        if list(missing) != sorted(ids)[-len(missing) :]:
            return ""
        return (
            "inference.py drops the last partial batch: make the number of its inputs a multiple "
            "of --test_batch_size"
        )


class UaC(Naming):
    """By caption, cut at a colon as its text.txt is read; equal captions are counted.

    In `results/face` they lie in `non_grid/<modality>/`, which may be left out.
    """

    others = r"grid/.+"

    def __init__(self, rows: Mapping[str, Row], split: str) -> None:
        super().__init__(rows, split)
        self.same: dict[str, list[str]] = {}
        for name in sorted(self.fed, key=lambda name: f"{name}.jpg"):  # as it lists its input
            self.same.setdefault(self.text(name), []).append(name)

    def text(self, name: str) -> str:
        """The caption as a folder name."""
        return self.rows[name].caption.split(":")[0].strip()

    def identify(self, path: PurePosixPath) -> str | None:
        """As in `Naming`."""
        if path.suffix != ".png" or not path.stem.isdecimal() or len(path.parts) < 2:
            return None
        folder = re.sub(r"^non_grid/[^/]+/", "", path.parent.as_posix())
        if folder.startswith("grid/"):  # the same faces beside their conditions
            return None
        same = self.same.get(folder.strip())
        if same is None:
            raise UnknownFaceError("no face of this split has this caption")
        if int(path.stem) >= len(same):
            raise UnknownFaceError(f"only {len(same)} face(s) of this split have this caption")
        return same[int(path.stem)]

    def expected(self, name: str) -> str:
        """Where the picture of a face should lie."""
        text = self.text(name)
        return f"{text}/{self.same[text].index(name)}.png"


class PixelFace(Naming):
    """By a key that counts captions; other captions than the manifest's are left out."""

    others = r"text/[^/]+\.txt"

    def __init__(self, rows: Mapping[str, Row], split: str) -> None:
        super().__init__(rows, split)
        whole = {str(i) for i in range(len(rows))} == set(rows)
        self.order = sorted(rows) if whole else []

    def identify(self, path: PurePosixPath) -> str | None:
        """As in `Naming`."""
        match = re.fullmatch(r"(\d+)_\d{6}\.png", str(path))
        if not match:
            return None
        place, index = divmod(int(match[1]), CAPTIONS)
        if not self.order:
            raise UnknownFaceError("keys count all faces 0 ... n - 1, but the manifest has gaps")
        if place >= len(self.order):
            raise UnknownFaceError(f"key {match[1]} lies beyond {len(self.order)} faces")
        name = self.order[place]
        return name if name in self.fed and self.rows[name].caption_index == index else ""

    def expected(self, name: str) -> str:
        """Where the picture of a face should lie."""
        if not self.order:
            return name
        return f"{self.order.index(name) * CAPTIONS + self.rows[name].caption_index}_*.png"

    def cause(self, missing: Sequence[str], ids: Sequence[str], left_out: int) -> str:
        """The known trap of this repository, or ""."""
        if not left_out:
            return ""
        return (
            f"{left_out} pictures are of other captions or faces: datasets.py draws one caption of "
            "ten at random, calculate_fid.py saves half of each batch. Fix the caption to the "
            "manifest's caption_index and save the whole batch"
        )


class CoDiffusion(Naming):
    """By the mask's file name; the folder below it has to be the manifest's caption."""

    # a copy of the mask, and what its options write
    others = r"([^/]+)/.+/(\1|\d{6}_(x_inter|pred_x0|z_0|mixed|\w+_influence_function)\.png)"

    def identify(self, path: PurePosixPath) -> str | None:
        """As in `Naming`."""
        if not re.fullmatch(r"\d{6}_x_0\.png", path.name) or len(path.parts) < 3:
            return None
        name = self.known(PurePosixPath(path.parts[0]).stem)
        caption = "/".join(path.parts[1:-1])
        if caption.strip().casefold() != self.rows[name].caption.strip().casefold():
            raise UnknownFaceError(f"the caption of face {name} is {self.rows[name].caption!r}")
        return name if path.name.startswith("000000_") else ""

    def expected(self, name: str) -> str:
        """Where the picture of a face should lie."""
        return f"{name}.png/{self.rows[name].caption}/000000_x_0.png"


LAYOUTS: dict[str, type[Naming]] = {
    "tedigan": TediGAN,
    "uac": UaC,
    "pixelface": PixelFace,
    "codiffusion": CoDiffusion,
    "controlnext": Naming,
    "mm2latent": Naming,
    "face-mogle": Naming,
    "mditface": Naming,
    "plain": Naming,
}

# Rows of Tables 1 and 2.
SYSTEM_OF: dict[str, str] = {
    "tedigan": "TediGAN", "uac": "UaC", "pixelface": "PixelFace+",
    "codiffusion": "CoDiffusion", "controlnext": "ControlNeXt", "mm2latent": "MM2Latent",
    "face-mogle": "Face-MoGLE", "mditface": "MDiTFace",
}  # fmt: skip


def adopt(
    folder: Path, layout: str, rows: Mapping[str, Row], ids: Sequence[str], size: int, work: Path
) -> Path:
    """A folder of `{id}.png`, `size` pixels wide, from what an official repository wrote.

    Args:
        folder: its pictures.
        layout: how they are named, one of LAYOUTS.
        rows: the whole manifest that the repository worked on.
        ids: the faces to score; pictures of other faces of `rows` may be there.
        size: side of the new pictures in pixels.
        work: where the renamed pictures go, in a folder named by their content.

    Returns:
        `folder` itself where nothing is to be renamed or resized, else the new folder.

    Raises:
        DataError: pictures are missing, unreadable, grey, transparent, not square, of mixed sizes,
            of no face, or there twice; other files lie there. One report names them all.
    """
    files, report = find_pictures(folder, layout, rows, ids)
    sizes = _check(files, report)
    report.raise_if_bad()
    plain = {name: folder / f"{name}.png" for name in ids}
    if files == plain and sizes == {size}:
        return folder
    digests = sorted((name, path_digest(path)) for name, path in files.items())
    target = work / f"{layout}-{content_key([size, digests])}"

    def write(name: str) -> None:
        path = target / f"{name}.png"
        if not path.is_file():
            picture = read_image(files[name])
            if picture.width != size:
                picture = picture.resize((size, size), Image.Resampling.BICUBIC)
            with whole_file(path) as part:
                picture.save(part, "PNG")

    list(parallel(write, ids))
    return target


def find_pictures(
    folder: Path, layout: str, rows: Mapping[str, Row], ids: Sequence[str]
) -> tuple[dict[str, Path], Report]:
    """The picture of each id that has one, in the order of `ids`, and a report of all problems.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of pictures")
    naming = LAYOUTS[layout](rows, rows[ids[0]].split)
    report = Report(folder, len(ids))
    found: dict[str, Path] = {}
    left_out = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = PurePosixPath(path.relative_to(folder).as_posix())
        if is_dropping(inside):
            continue
        try:
            name = naming.identify(inside)
        except UnknownFaceError as error:
            report.add(path, error)
            continue
        if name is None and not re.fullmatch(naming.others, str(inside)):
            report.add(path, f"no file that {layout} writes: take it out of the folder")
        left_out += name == ""
        if name and found.setdefault(name, path) != path:
            report.add(path, f"duplicate of face {name}: {found[name].relative_to(folder)}")
    missing = [name for name in ids if name not in found]
    for name in missing:
        report.add(naming.expected(name), f"missing: the picture of face {name}")
    if missing and (cause := naming.cause(missing, ids, left_out)):
        report.add(naming.expected(missing[-1]), cause)
    return {name: found[name] for name in ids if name in found}, report


def _check(files: Mapping[str, Path], report: Report) -> set[int]:
    """Report every picture that is unreadable, not RGB, not square or unlike the others in size."""

    def check(path: Path) -> tuple[str, int]:
        try:
            file = open_picture(path)
        except DataError as error:
            return str(error), 0
        if file.mode != "RGB" or file.has_transparency_data:
            kind = {"L": "grey", "LA": "grey", "1": "grey", "I;16": "grey", "P": "palette"}
            return f"{kind.get(file.mode, 'transparent')} image ({file.mode}): pictures are RGB", 0
        if file.width != file.height:
            return f"wrong size {file.width}x{file.height}: pictures are square", 0
        return "", file.width

    seen = dict(zip(files.values(), parallel(check, files.values()), strict=True))
    usual = Counter(size for _, size in seen.values() if size).most_common(1)
    for path, (reason, size) in seen.items():
        if reason or size != usual[0][0]:
            report.add(path, reason or f"wrong size {size}, the others {usual[0][0]}")
    return {size for _, size in seen.values()}
