"""Where a painting begins: a photo, a face of the data set, a procedural face, an empty head.

start = Starts(load_profile("mini")).photo("me.png")
start.mask, start.image, start.caption
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ec2face_core.attributes import CLASS_ID
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.io.paths import user_path
from ec2face_core.io.pictures import open_picture, to_rgb, upright
from ec2face_core.io.report import DataError
from ec2face_core.io.texts import clean
from ec2face_core.perception import ClipScorer, FaceParser

from ..prepare.captions import caption_facts, fact_name
from ..prepare.photos import Detector, parse_face
from ..world.sources import Portraits, ProceduralFaces

# The mean probability of a pixel's class. Both parsers of the first miniature give faces of either
# look 0.963 or more, and turned faces, two faces side by side and noise at most 0.958.
SURE = 0.96
RIVAL = 0.25  # a face of this share of the largest one's area is not taken for background
OVERLAY = 512  # pixels of the side of a photo that is shown below the mask
POOL = 512  # procedural faces among which one is chosen
TURNS = ("", "a quarter turn clockwise", "half a turn", "a quarter turn anticlockwise")


@dataclass(frozen=True)
class Start:
    """A face to begin with.

    mask: class ids `(h, w)` uint8. image: `3 h w` in [0, 1] as the mask shows it, if there is one.
    caption: may be empty. overlay: the same picture, larger, if there is one.
    """

    mask: np.ndarray
    image: Tensor | None = None
    caption: str = ""
    overlay: Tensor | None = None


class Starts:
    """Makes starts for one configuration; data and networks are opened when they are needed.

    Args:
        config: data and perception models; masks have `config.data.size`.
        detect: finds the faces of photos (`prepare.photos.face_detector`); without it a photo has
            to be square and filled by one upright face, as those of FFHQ and CelebA-HQ are.
    """

    def __init__(self, config: Config, detect: Detector | None = None) -> None:
        self.config = config
        self.detect = detect

    def empty(self) -> Start:
        """A head without features: skin, neck and cloth."""
        size = self.config.data.size
        y, x = (np.indices((size, size)) + 0.5) / size
        ids = np.zeros((size, size), np.uint8)
        neck = (np.abs(x - 0.5) < 0.15) & (y > 0.7)
        cloth = ((x - 0.5) / 0.55) ** 2 + ((y - 1.19) / 0.25) ** 2 < 1
        head = ((x - 0.5) / 0.25) ** 2 + ((y - 0.48) / 0.38) ** 2 < 1
        for where, name in ((neck, "neck"), (cloth, "cloth"), (head, "skin")):
            ids[where] = CLASS_ID[name]
        return Start(ids)

    def dataset(self, name: str | int = 0, split: str = "test") -> Start:
        """A face of the data set, by its id or its number in the split.

        Raises:
            DataError: there is no such face.
        """
        faces = open_dataset(self.config, split)
        if isinstance(name, int):
            name = faces.ids[name % len(faces)]
        if name not in faces.ids:
            raise DataError(
                f"split {split} has no face {name!r}: its ids are like {faces.ids[0]!r}"
            )
        return _face(faces, name)

    def procedural(self, caption: str, seed: int = 0) -> Start:
        """The procedural face that fits a caption best, of `POOL` that a seed gives.

        A face fits by the facts of the caption that hold for it, then by having few rare things
        that the caption does not mention.
        """
        portraits = self.config.data.maker.endswith("write_portraits")
        source = (Portraits if portraits else ProceduralFaces)()
        scenes = source.sample(seed, range(POOL), "first", "balanced")
        asked = set(caption_facts(clean(caption)))
        worn = {"earrings", "necklace", "eyeglasses", "hat"}
        scores = []
        for row in scenes.attributes:
            facts = {fact_name(key, value) for key, value in row.items() if value is not False}
            facts |= {fact_name(key, row[key]) for key in ("male", "young")}
            scores.append(len(asked & facts) - 0.1 * len((facts & worn) - asked))
        best = int(np.argmax(scores))
        scene = source.sample(seed, [best], "first", "balanced")
        face = source.render(scene, self.config.data.size)
        ids = face.label_map[0].to(torch.uint8).numpy()
        return Start(ids, face.image[0] / 2 + 0.5, caption)

    def nearest(self, caption: str) -> Start:
        """The mask of the training face whose caption is nearest, by the guiding CLIP's features.

        Raises:
            DataError: an empty caption.
        """
        text = clean(caption)
        if not text:
            raise DataError("the caption is empty: write what the face should look like")
        similar = self._caption_features @ self._clip.text_features([text])[0]
        face = _face(self._train, self._train.ids[int(similar.argmax())])
        return Start(face.mask, None, caption)

    def photo(self, photo: Image.Image | str | Path) -> Start:
        """A photo, aligned and parsed.

        Args:
            photo: an RGB picture or a file.

        Raises:
            DataError: it cannot be read, shows no face or several, or lies on its side; the message
                says what to do.
        """
        given = isinstance(photo, Image.Image)
        picture = to_rgb(upright(photo) if given else open_picture(user_path(photo)))
        if self.detect is None:
            self._refuse_doubtful(picture)
        size = self.config.data.size
        detect = one_face(self.detect) if self.detect else None
        aligned, ids = parse_face(picture, self._parser, size, detect)
        image = _pixels(aligned.resize((size, size), Image.Resampling.BICUBIC))
        overlay = aligned.copy()
        overlay.thumbnail((OVERLAY, OVERLAY))
        return Start(ids, image, overlay=_pixels(overlay))

    def _refuse_doubtful(self, picture: Image.Image) -> None:
        """Refuse a photo that no single upright face fills, by how sure the parser is."""
        if picture.width != picture.height:
            raise DataError(
                f"the photo is {picture.width}x{picture.height}: crop it to a square that a face "
                "fills, as in CelebA-HQ, or give Starts a face detector, which does so"
            )
        size = (self.config.data.size, self.config.data.size)
        pixels = _pixels(picture.resize(size, Image.Resampling.BICUBIC)) * 2 - 1
        turned = torch.stack([torch.rot90(pixels, -turn, (1, 2)) for turn in range(4)])
        with torch.no_grad():
            probabilities = self._parser.probabilities(turned.to(self._parser.device))
        sure = probabilities.amax(1).flatten(1).mean(1)
        turn = int(sure.argmax())
        if sure[turn] < SURE:
            raise DataError(
                "the photo shows no face or several, or one that does not fill it: crop it to a "
                "square around one face, as in CelebA-HQ"
            )
        if turn:
            raise DataError(f"the photo does not stand upright: give it {TURNS[turn]}")

    @functools.cached_property
    def _parser(self) -> FaceParser:
        return FaceParser.from_config(self.config.perception)

    @functools.cached_property
    def _clip(self) -> ClipScorer:
        return ClipScorer.from_config(self.config.perception)

    @functools.cached_property
    def _train(self) -> FaceDataset:
        return open_dataset(self.config, "train")

    @functools.cached_property
    def _caption_features(self) -> Tensor:
        texts = [self._train.manifest_caption(name) for name in self._train.ids]
        parts = [self._clip.text_features(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        return torch.cat(parts)


def one_face(detect: Detector) -> Detector:
    """A detector that refuses photos of several faces; small ones in the background do not count.

    Raises:
        DataError: from the detector that is returned.
    """

    def checked(images: Tensor) -> dict[str, Tensor]:
        faces = dict(detect(images))
        rects = faces["rects"]
        areas = (rects[:, 2] - rects[:, 0]) * (rects[:, 3] - rects[:, 1])
        count = int((areas > RIVAL * areas.max()).sum()) if len(areas) else 0
        if count > 1:
            raise DataError(f"{count} faces are found in this photo: crop it to one of them")
        return faces

    return checked


STARTS: dict[str, Callable[[Starts, str, int], Start]] = {
    "empty": lambda starts, caption, seed: starts.empty(),
    "dataset": lambda starts, caption, seed: starts.dataset(seed),
    "procedural": lambda starts, caption, seed: starts.procedural(caption, seed),
    "nearest": lambda starts, caption, seed: starts.nearest(caption),
}
"""Name -> the start that a caption and a seed give."""


def _face(faces: FaceDataset, name: str) -> Start:
    ids = faces.label_map(name).to(torch.uint8).numpy()
    return Start(ids, faces.image(name) / 2 + 0.5, faces.manifest_caption(name))


def _pixels(picture: Image.Image) -> Tensor:
    """A picture as `3 h w` in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
