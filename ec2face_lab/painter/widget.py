"""`MaskPainter`: paint a mask of 19 classes in the notebook and see the face that it gives.

    painter = MaskPainter("mini")
    painter                    # in JupyterLab, VS Code or Colab
    painter.mask               # class ids (h, w) uint8; may also be set
    painter.drawing.image      # the picture

It has no server and sends nothing anywhere but to the notebook's own kernel.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import anywidget
import numpy as np
import traitlets
from PIL import Image

from ec2face_core.attributes import CLASSES, FLIP_PAIRS, PALETTE, display_name
from ec2face_core.config import Config, UserError, load_profile
from ec2face_core.io.masks import image_ids, mask_ids
from ec2face_core.io.paths import user_path
from ec2face_core.io.pictures import open_header, open_picture
from ec2face_core.io.report import DataError
from ec2face_core.runs import whole_file

from ..study.png import png_bytes
from .artist import Artist, Drawing, Wish
from .stamps import STAMPS, stamp
from .starts import STARTS, Start, Starts
from .worker import Stop, Superseded, Worker, on_this_loop

T = TypeVar("T")

STATIC = Path(__file__).parent / "static"
KEYS = "0123456789qwrtyuopa"  # of the classes, in the order of their ids
LIVE_SIZE = 128  # pixels of the side up to which every pen-up draws
LIVE_STEPS = 4  # of the sampling while the user paints
REST = 1.0  # seconds without a change after which the picture is drawn with all steps
STRIP = 24  # earlier pictures that are kept


class LabelMapTrait(traitlets.TraitType):
    """Class ids `(h, w)` uint8 of the widget's shape, read-only; set from what `mask_ids` reads.

    On the wire they are bytes, row by row.
    """

    def validate(self, obj: Any, value: Any) -> np.ndarray:
        """A read-only copy; DataError says what is wrong."""
        ids = mask_ids(value).astype(np.uint8)
        shape = tuple(obj._shape)
        if ids.shape != shape:
            raise DataError(
                f"the mask is {ids.shape[1]}x{ids.shape[0]}, the painter's canvas "
                f"{shape[1]}x{shape[0]}: resize it to the nearest pixel"
            )
        ids.setflags(write=False)
        return ids


def _to_wire(value: np.ndarray, widget: Any) -> bytes:
    return value.tobytes()


def _from_wire(value: Any, widget: Any) -> np.ndarray:
    return np.frombuffer(bytes(value), np.uint8).reshape(widget._shape)


class MaskPainter(anywidget.AnyWidget):
    """A mask painter with a generator beside it.

    Args:
        profile: name of a profile or a configuration, which gives size, weights and data; None:
            paint only.
        mask: what to begin with, as for `mask_ids`; None: an empty head.
        size: side of the canvas without a profile.
        method: variant of EC²Face, one of `VARIANTS`.
        starts: makes the starts; give one with a face detector for photos that no face fills.
        traits: values of the traits below.

    Attributes:
        mask: the label map, `(h, w)` uint8.
        caption, seed, text_scale, mask_scale, strength: what a picture is drawn from.
        live: draw whenever the user lifts the pen.
        keep: with a photo, sample only where the mask was changed.
        drawing: the newest picture (`artist.Drawing`), or None.
        photo, photo_opacity: PNG below the mask, and how much of it shows through.
        agreement: recall and F1 of each class of the mask in the parser's reading.
        status: one sentence on what happened last.
    """

    _esm = STATIC / "painter.js"
    _css = STATIC / "painter.css"

    mask = LabelMapTrait().tag(sync=True, to_json=_to_wire, from_json=_from_wire)
    caption = traitlets.Unicode().tag(sync=True)
    seed = traitlets.Int(42, min=0, max=2**53).tag(sync=True)
    text_scale = traitlets.Float(1.0, min=0.0, max=100.0).tag(sync=True)
    mask_scale = traitlets.Float(1.0, min=0.0, max=100.0).tag(sync=True)
    strength = traitlets.Float(1.0, min=0.0, max=100.0).tag(sync=True)
    live = traitlets.Bool(False).tag(sync=True)
    keep = traitlets.Bool(True).tag(sync=True)
    photo = traitlets.Bytes().tag(sync=True)
    photo_opacity = traitlets.Float(0.5, min=0.0, max=1.0).tag(sync=True)
    picture = traitlets.Bytes().tag(sync=True)
    reading = traitlets.Bytes().tag(sync=True)
    agreement = traitlets.List().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    busy = traitlets.Bool(False).tag(sync=True)
    strip = traitlets.List().tag(sync=True)
    _shape = traitlets.Tuple(traitlets.Int(), traitlets.Int()).tag(sync=True)
    _classes = traitlets.List().tag(sync=True)
    _stamps = traitlets.List(list(STAMPS)).tag(sync=True)
    _starts = traitlets.List(["empty"]).tag(sync=True)
    _draws = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        profile: str | Config | None = "mini",
        mask: Any = None,
        size: int = 64,
        method: str = "both",
        starts: Starts | None = None,
        **traits: Any,
    ) -> None:
        config = load_profile(profile) if isinstance(profile, str) else profile
        side = config.data.size if config else size
        own = starts or Starts(config or load_profile("mini", data={"size": side}))
        values: dict[str, Any] = {"_shape": (side, side), "_classes": _class_rows()}
        values["mask"] = own.empty().mask if mask is None else mask
        if config:
            values["text_scale"] = config.sampling.text_guidance
            values["mask_scale"] = config.sampling.mask_guidance
            values["live"] = side <= LIVE_SIZE
            values |= {"_starts": list(STARTS), "_draws": True}
        self._artist = Artist(config, method) if config else None
        self._steps = config.sampling.steps if config else 0
        self._given: Start | None = None
        self._drawings: dict[int, Drawing] = {}
        self._worker = Worker()
        self._warm = False
        self._here = on_this_loop()
        self.starts = own
        self.drawing: Drawing | None = None
        super().__init__(**(values | traits))
        self.on_msg(self._receive)

    # ------------------------------------------------------------------------------- for notebooks

    def stamp(self, name: str) -> None:
        """Add earrings, necklace, glasses or hat to the mask (`stamps.stamp`)."""
        self.mask = stamp(self.mask, name)

    def start(self, kind: str | Start) -> None:
        """Begin with one of `STARTS`, by the caption and the seed, or with a start that you made.

        Raises:
            ValueError: there is no such start.
            DataError: it cannot be made; the message says why.
        """
        if isinstance(kind, str):
            if kind not in STARTS:
                raise ValueError(f"start {kind!r} does not exist; known: {', '.join(STARTS)}")
            kind = STARTS[kind](self.starts, self.caption, self.seed)
        self._begin(kind)

    def load(self, path: str | Path) -> None:
        """Read a mask (`io/masks.py` says which files); DataError if it cannot be used."""
        self.mask = path

    def save(self, path: str | Path) -> None:
        """Write the mask as a PNG in our palette."""
        with whole_file(user_path(path)) as part:
            part.write_bytes(mask_png(self.mask))

    def draw(self, steps: int | None = None) -> Drawing:
        """Draw the mask and wait for the picture; steps: of the sampling, default the profile's.

        Raises:
            UserError: this painter only paints, or its weights are missing.
        """
        artist = self._required_artist()
        drawing = artist.draw(self._wish(), steps or self._steps)
        self._show(drawing)
        return drawing

    def request(self, live: bool = False) -> None:
        """Draw in the background; a newer request takes its place.

        live: first with few steps, and with all of them once no newer request comes.
        """
        artist = self._required_artist()
        wish = self._wish()

        def job(stop: Stop) -> None:
            if live:
                self._later(
                    self._show, artist.draw(wish, min(LIVE_STEPS, self._steps), stop), False
                )
                if self._worker.pause(REST):
                    raise Superseded
            self._later(self._show, artist.draw(wish, self._steps, stop))

        self._submit(job, "drawing")

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything requested is drawn; False if it takes longer.

        In a notebook the pictures are shown after the cell that waits.
        """
        return self._worker.join(seconds)

    # ------------------------------------------------------------------------------------ inside

    def _wish(self) -> Wish:
        photo = self._given.image if self._given is not None and self.keep else None
        photo_mask = None if photo is None or self._given is None else self._given.mask
        settings = (self.caption, self.seed, self.text_scale, self.mask_scale, self.strength)
        return Wish(self.mask, *settings, photo, photo_mask)

    def _warm_up(self) -> None:
        """Load the weights in the background, when the first browser shows the painter."""
        artist = self._artist
        if artist is None or self._warm:
            return
        self._warm = True

        def job(_: Stop) -> None:
            seconds = artist.load()
            self._later(setattr, self, "status", f"ready: loading took {seconds:.0f} s")

        self._submit(job, "loading the weights")

    def _required_artist(self) -> Artist:
        if self._artist is None:
            raise UserError("this painter only paints: make one with a profile, as 'mini'")
        return self._artist

    def _begin(self, start: Start) -> None:
        """Show a start: its mask, its picture below, and its caption."""
        self.mask = start.mask
        self._given = start if start.image is not None else None
        self.keep = True
        overlay = start.image if start.overlay is None else start.overlay
        self.photo = b"" if overlay is None else png_bytes(overlay, {})
        if start.caption:
            self.caption = start.caption
        self.status = ""

    def _show(self, drawing: Drawing, keep: bool = True) -> None:
        """Show a picture; keep: also in the strip."""
        self.drawing = drawing
        accuracy = drawing.accuracy
        with self.hold_sync():
            self.picture = drawing.png
            self.reading = drawing.reading.tobytes()
            self.agreement = drawing.agreement()
            self.status = (
                f"{drawing.steps} steps, {drawing.seconds:.2f} s; mean recall {accuracy.OAA:.1f}, "
                f"F1 {accuracy.F1:.1f}. {drawing.notice['Disclaimer']}"
            )
            if keep:
                number = max(self._drawings, default=0) + 1
                self._drawings[number] = drawing
                item = {"number": number, "picture": drawing.png, "about": str(drawing.wish)}
                self.strip = [item, *self.strip][:STRIP]
        shown = {item["number"] for item in self.strip}
        self._drawings = {k: kept for k, kept in self._drawings.items() if k in shown}

    def _restore(self, number: int) -> None:
        """Take an earlier picture's mask and settings back."""
        drawing = self._drawings.get(number)
        if drawing is None:
            raise DataError("this picture is no longer kept")
        wish = drawing.wish
        self.mask = wish.mask
        for name in ("caption", "seed", "text_scale", "mask_scale", "strength"):
            setattr(self, name, getattr(wish, name))
        self.keep = wish.photo is not None or self._given is None
        if wish.photo is not None and wish.photo_mask is not None:
            self._given = Start(wish.photo_mask, wish.photo)
            self.photo = png_bytes(wish.photo, {})
        self._show(drawing, keep=False)

    def _submit(self, job: Callable[[Stop], None], doing: str) -> None:
        """Run a job in the background; its errors become the status."""

        def guarded(stop: Stop) -> None:
            try:
                job(stop)
            except Superseded:
                return
            except Exception as error:
                self._later(setattr, self, "status", _sentence(error))
            self._later(setattr, self, "busy", False)

        self.status = doing
        self.busy = True
        self._worker.submit(guarded)

    def _later(self, act: Callable[..., None], *arguments: Any) -> None:
        self._here(lambda: act(*arguments))

    def _receive(self, _: Any, message: dict[str, Any], buffers: list[Any]) -> None:
        """A request of the browser; what is wrong with it becomes the status."""
        try:
            self._answer(message, [bytes(part) for part in buffers or []])
        except (UserError, ValueError, TypeError, OSError) as error:
            self.status = _sentence(error)

    def _answer(self, message: dict[str, Any], files: list[bytes]) -> None:
        kind = message.get("type")
        if kind == "ready":  # a browser shows the painter
            self._warm_up()
        elif kind == "draw":
            self.request(bool(message.get("live")))
        elif kind == "stamp":
            self.stamp(message["name"])
            self.status = f"added: {message['name']}"
            if self.live and self._draws:
                self.request(live=True)
        elif kind == "start":
            self._submit(self._start_job(message["kind"]), "starting")
        elif kind == "photo":
            photo = _uploaded(files[0], open_picture)
            self._submit(lambda _: self._later(self._begin, self.starts.photo(photo)), "reading")
        elif kind == "open":
            self.mask = _uploaded(files[0], _read_ids)
        elif kind == "restore":
            self._restore(int(message["number"]))
        elif kind == "save":
            self._send_file(message["what"])

    def _start_job(self, kind: str) -> Callable[[Stop], None]:
        make = STARTS[kind]
        caption = self.caption
        seed = self.seed
        return lambda _: self._later(self._begin, make(self.starts, caption, seed))

    def _send_file(self, what: str) -> None:
        """Have the browser save the mask or the picture."""
        if what == "picture" and not self.picture:
            raise DataError("there is no picture yet: draw one first")
        content = self.picture if what == "picture" else mask_png(self.mask)
        self.send({"type": "file", "name": f"{what}.png"}, buffers=[content])


def mask_png(ids: np.ndarray) -> bytes:
    """Class ids `(h, w)` uint8 as a PNG whose palette is CelebAMask-HQ's."""
    image = Image.fromarray(np.ascontiguousarray(ids))
    image.putpalette([value for colour in PALETTE for value in colour])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _class_rows() -> list[dict[str, Any]]:
    """What the browser knows of each class; `opposite` is the class of the other side."""
    opposite = {a: b for pair in FLIP_PAIRS for a, b in (pair, pair[::-1])}
    return [
        {
            "id": i,
            "name": display_name(i),
            "colour": list(PALETTE[i]),
            "key": KEYS[i],
            "opposite": opposite.get(i, i),
        }
        for i in range(len(CLASSES))
    ]


def _uploaded(content: bytes, read: Callable[[Path], T]) -> T:
    """What a reader of files finds in the content of one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(content)
        return read(path)


def _read_ids(path: Path) -> np.ndarray:
    return image_ids(open_header(path, "mask"))


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
