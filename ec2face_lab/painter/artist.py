"""From a painted mask to a picture, what a parser reads in it, and how well the two agree."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ec2face_core.attributes import CLASSES, display_name
from ec2face_core.config import Config
from ec2face_core.metrics import MaskAccuracy, mask_accuracy

from ..study.png import png_bytes
from .worker import Stop, Superseded

if TYPE_CHECKING:
    from ec2face_core.perception import FaceParser
    from ec2face_core.pipeline import EC2FacePipeline

EDITED = "Edited picture: a part of it is synthetic."


@dataclass(frozen=True)
class Wish:
    """What a picture is drawn from.

    mask: class ids `(h, w)` uint8. photo, photo_mask: an image `3 h w` in [0, 1] and its mask, of
    which only what differs from `mask` is sampled; None: everything is.
    """

    mask: np.ndarray
    caption: str = ""
    seed: int = 42
    text_scale: float = 1.0
    mask_scale: float = 1.0
    strength: float = 1.0
    photo: Tensor | None = None
    photo_mask: np.ndarray | None = None

    def __str__(self) -> str:
        scales = f"text {self.text_scale:g}, mask {self.mask_scale:g}, strength {self.strength:g}"
        return f"{self.caption or 'no caption'}; seed {self.seed}, {scales}"


@dataclass(frozen=True)
class Drawing:
    """A picture and its reading.

    image: `3 h w` in [0, 1]. reading: class ids `(h, w)` uint8. notice: the text chunks of its
    file, which say that it is synthetic. seconds: of the sampling and the parsing.
    """

    wish: Wish
    image: Tensor
    reading: np.ndarray
    notice: dict[str, str]
    steps: int
    seconds: float

    @functools.cached_property
    def accuracy(self) -> MaskAccuracy:
        """How well the reading agrees with the mask."""
        return mask_accuracy(*(torch.tensor(ids).long()[None] for ids in (self.reading, self.mask)))

    @property
    def png(self) -> bytes:
        """The picture as a file."""
        return png_bytes(self.image, self.notice)

    @property
    def mask(self) -> np.ndarray:
        """The mask that it was drawn from."""
        return self.wish.mask

    def agreement(self) -> list[dict[str, Any]]:
        """Class by class of the mask: id, name, recall and F1 in percent."""
        rows = []
        for i in range(len(CLASSES)):
            if self.accuracy.support[i]:
                recall = round(float(self.accuracy.per_class[i]), 1)
                f1 = round(float(self.accuracy.f1[i]), 1)
                rows.append({"id": i, "name": display_name(i), "recall": recall, "f1": f1})
        return rows


class Artist:
    """Draws wishes with one variant of EC²Face; the weights are loaded at the first one.

    Args:
        config: weights and sampling.
        method: one of `VARIANTS`.
    """

    def __init__(self, config: Config, method: str = "both") -> None:
        self.config = config
        self.method = method
        self._lock = threading.Lock()  # the scheduler is one for all threads

    def load(self) -> float:
        """Load the weights, unless that was done; returns the seconds that it took."""
        with self._lock:
            started = time.perf_counter()
            _ = (self._pipe, self._parser)
            return time.perf_counter() - started

    def draw(self, wish: Wish, steps: int, stop: Stop = lambda: False) -> Drawing:
        """Draw a wish.

        Args:
            wish: mask, caption and settings.
            steps: of the sampling.
            stop: asked after every step.

        Raises:
            Superseded: `stop` said so.
        """
        self.load()
        with self._lock:
            started = time.perf_counter()
            image = self._sample(wish, steps, stop)
            reading = self._parser.parse(image[None].to(self._parser.device) * 2 - 1)[0]
            seconds = time.perf_counter() - started
        from ..study.painters import EC2Face  # here and below: diffusers takes many seconds

        notice = EC2Face(self.config, self.method).notice(wish.caption, wish.seed)
        if wish.photo is not None:
            notice["Disclaimer"] = EDITED
        ids = reading.to(torch.uint8).cpu().numpy()
        return Drawing(wish, image, ids, notice, steps, seconds)

    def _sample(self, wish: Wish, steps: int, stop: Stop) -> Tensor:
        def step_end(*_: Any) -> None:
            if stop():
                raise Superseded

        settings: dict[str, Any] = {
            "num_inference_steps": steps,
            "text_guidance": wish.text_scale,
            "mask_guidance": wish.mask_scale,
            "mask_strength": wish.strength,
            "generator": torch.Generator().manual_seed(wish.seed),
            "output_type": "pt",
            "callback_on_step_end": step_end,
        }
        if wish.photo is not None and wish.photo_mask is not None:
            from .edits import edit

            given = (wish.photo, wish.photo_mask, wish.mask, wish.caption)
            return edit(self._pipe, *given, **settings).images[0].float().cpu()
        return self._pipe(wish.caption, wish.mask, **settings).images[0].float().cpu()

    @functools.cached_property
    def _pipe(self) -> EC2FacePipeline:
        from ec2face_core.pipeline import EC2FacePipeline

        pipe = EC2FacePipeline.from_config(self.config, self.method)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @functools.cached_property
    def _parser(self) -> FaceParser:
        from ec2face_core.perception import FaceParser

        return FaceParser.from_config(self.config.perception, scoring=True)
