"""Frozen, differentiable perception models: a face parser through facer, a CLIP through open_clip.

The same two classes serve FaRL and OpenAI's CLIP at paper scale and the miniature's own networks,
both as guides of training and as evaluators. Images are `b 3 h w` in [-1, 1]; gradients reach the
image; weights are frozen. facer's own call runs in `inference_mode` and aligns faces by landmarks.
Faces here are aligned already, so that this reduces to a resize, and `.net` is called.
"""

from __future__ import annotations

import functools
import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import FACER_TO_CELEBAMASK
from .config import PerceptionConfig, UserError
from .fast.transfer import send
from .io.hub import HubError, answering_hub
from .io.paths import resolve
from .io.sums import DamagedError, check_sums
from .io.texts import lost_texts

# our channel c = facer channel FACER_CHANNEL[c]: the inverse of FACER_TO_CELEBAMASK
FACER_CHANNEL = torch.tensor(FACER_TO_CELEBAMASK).argsort()
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LOCAL_DIR = "local-dir:"
HUB = "hf-hub:"
TOUCHES_FILES = re.compile(  # in a TorchScript archive's code
    rb"\b(?:torch|ops\.aten)\.(?:from_file|save|load)\b"
    rb"|\bops\.(?!aten\b|prim\b|quantized\b|torchvision\b)\w+\.\w+"
    rb"|\btorch\.classes\.(?!quantized\b)\w+"
)


class FaceParser:
    """Pixels -> 19 classes in our order, through `facer.face_parser("farl/celebm/448")`.

    Args:
        path: TorchScript file, absolute or relative to the repository root.
        size: side in pixels of the square frame that the network expects (448 for FaRL).
        device: where the network runs.

    Raises:
        FileNotFoundError: there is no file, or (WeightsError) a truncated file or a pickle that is
            not TorchScript. The message names the setting and where the file comes from.
    """

    def __init__(self, path: str | Path, size: int, device: torch.device | str = "cpu") -> None:
        file = resolve(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"face parser {file} does not exist. It is named by perception.parser and "
                "perception.scoring_parser. Paper scale: face_parsing.farl.celebm.main_ema_181500_"
                "jit.pt of the release `models-v1` of FacePerceiver/facer on GitHub. Miniature: it "
                "is part of the clone (`git checkout data/mini`) or trained by `make foundation`."
            )
        check_sums(file)
        check_torchscript(file)
        self.size = size
        self.device = torch.device(device)
        if self.device.type == "cuda":  # the script fuser fails on CUDA after a few calls
            torch._C._jit_set_texpr_fuser_enabled(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # facer imports timm in an old manner
            import facer

            # a str: facer iterates over a Path; float(): the miniature's file is half precision
            parser = facer.face_parser("farl/celebm/448", self.device, model_path=str(file)).float()
        self.net = parser.requires_grad_(False).eval().net

    @classmethod
    def from_config(
        cls, config: PerceptionConfig, scoring: bool = False, device: torch.device | str = "cpu"
    ) -> FaceParser:
        """The guide of training, or with `scoring` the evaluator."""
        path = config.scoring_parser if scoring else config.parser
        return cls(path, config.parser_size, device)

    def logits(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> float32 logits `b 19 h w`, differentiable."""
        x = _resize(_unit(images), self.size, "bilinear")
        # TorchScript would optimise the graph after its first calls and round differently from
        # then on, so that a resumed training would differ from an uninterrupted one.
        with torch.jit.optimized_execution(False):
            logits = self.net(x)[0].float()[:, _facer_channel(x.device)]
        return _resize(logits, images.shape[-2:], "bilinear")

    def probabilities(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> class probabilities `b 19 h w`, differentiable."""
        return self.logits(images).softmax(1)

    @torch.no_grad()
    def parse(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> label map `b h w`, int64."""
        return self.logits(images).argmax(1)


class ClipScorer:
    """Image and text features on the unit sphere, through open_clip.

    Args:
        name: `local-dir:<folder>` (absolute or relative to the repository root),
            `hf-hub:<owner/model>`, or `<architecture>/<pretrained tag>`.
        device: where the network runs.

    Raises:
        FileNotFoundError: it cannot be loaded; the message names the setting and where the weights
            come from.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        import open_clip

        self.device = torch.device(device)
        self.name, pretrained = _clip_name(name)
        try:
            if name.startswith(LOCAL_DIR):
                weights = Path(self.name.removeprefix(LOCAL_DIR)) / "open_clip_model.safetensors"
                if not weights.is_file():  # open_clip would take a pickle
                    raise OSError(f"{weights} is missing, and pickled weights are refused")
                check_sums(weights.parent)
            with _hub_of(self.name, pretrained):
                self.model = open_clip.create_model(
                    self.name, pretrained, device=self.device, require_pretrained=True
                )
                self.tokenizer = open_clip.get_tokenizer(self.name)
        except (DamagedError, HubError):
            raise
        except Exception as error:  # open_clip and tokenizers raise whatever they meet first
            raise FileNotFoundError(
                f"CLIP {name!r} cannot be opened: {error}. It is named by perception.clip and "
                "perception.scoring_clip. Paper scale: downloaded from the hub at first use; "
                "when offline, give a folder that holds it, local-dir:<folder>. Miniature: it "
                "is part of the clone (`git checkout data/mini`) or trained by `make foundation`."
            ) from error
        self.model.requires_grad_(False).eval()
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess.get("size", 224)
        self.size = size if isinstance(size, int) else size[0]
        self.mode = preprocess.get("interpolation", "bicubic")
        self.mean = self._per_channel(preprocess.get("mean", CLIP_MEAN))
        self.std = self._per_channel(preprocess.get("std", CLIP_STD))

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device).view(1, 3, 1, 1)

    @classmethod
    def from_config(
        cls, config: PerceptionConfig, scoring: bool = False, device: torch.device | str = "cpu"
    ) -> ClipScorer:
        """The guide of training, or with `scoring` the evaluator."""
        return cls(config.scoring_clip if scoring else config.clip, device)

    def image_features(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> unit features `(b, d)`, differentiable."""
        x = _resize(_unit(images), self.size, self.mode)
        x = ((x - self.mean) / self.std).to(self.model.logit_scale.dtype)
        return F.normalize(self.model.encode_image(x).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> unit features `(b, d)`; no gradient, the texts are given."""
        tokens = send(self.tokenizer(list(texts)), self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def lost_texts(self, texts: Sequence[str]) -> dict[str, str]:
        """The texts that are longer than CLIP reads, each with the words that are lost."""
        length = self.tokenizer.context_length
        inner = getattr(self.tokenizer, "tokenizer", None)  # of transformers
        if inner is not None:
            return lost_texts(inner, texts, length)
        lost = {}
        for text in texts:
            rest = self.tokenizer.encode(text)[length - 2 :]  # start and end take two tokens
            if rest:
                lost[text] = self.tokenizer.decode(rest).strip()
        return lost

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of each image and its text in percent, `(b,)` in [-100, 100]."""
        return 100 * (self.image_features(images) * self.text_features(texts)).sum(-1)


@functools.cache
def _facer_channel(device: torch.device) -> Tensor:
    """`FACER_CHANNEL` on the device, copied once."""
    with torch.inference_mode(False):  # an inference tensor in the cache would break training
        return FACER_CHANNEL.to(device)


def _unit(images: Tensor) -> Tensor:
    """[-1, 1] of any float type -> float32 in [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _resize(x: Tensor, size: int | Sequence[int], mode: str) -> Tensor:
    """Resize with antialiasing when shrinking; returned unchanged if the size matches."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode=mode, align_corners=False, antialias=x.shape[-1] > size[-1])


def _clip_name(name: str) -> tuple[str, str | None]:
    """A configured name -> (open_clip model name, pretrained tag or None)."""
    if name.startswith(LOCAL_DIR):
        return f"{LOCAL_DIR}{resolve(name.removeprefix(LOCAL_DIR))}", None
    if ":" in name:
        return name, None
    architecture, _, tag = name.partition("/")
    return architecture, tag or None


def _hub_of(name: str, pretrained: str | None) -> AbstractContextManager[None]:
    """`answering_hub` for the repository that holds a CLIP; nothing for a folder."""
    import open_clip

    if name.startswith(HUB):
        return answering_hub(name.removeprefix(HUB), "open_clip_config.json")
    repo = open_clip.get_pretrained_cfg(name, pretrained or "").get("hf_hub", "").strip("/")
    return answering_hub(repo, "open_clip_model.safetensors") if repo else nullcontext()


class WeightsError(UserError, FileNotFoundError):
    """Weights that are missing, incomplete or refused; the message names the file and why."""


def check_torchscript(path: Path) -> None:
    """Accept a whole TorchScript archive only, whose code names no operation on files.

    TorchScript is a program: it runs when the network runs, and torch.save or torch.from_file in it
    would write to any file of the user. Torch does not compare the archive's checksums.

    Raises:
        WeightsError: no such file, an archive without its end or with damaged content, another kind
            of pickle, or code that may touch files.
    """
    start = first_bytes(path)
    names: list[str] = []
    code: list[bytes] = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
            code = [archive.read(name) for name in names if "/code/" in name]
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} in it has another checksum")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):
            size = path.stat().st_size
            raise WeightsError(
                f"{path}: half-downloaded, the archive's end is missing after {size:,} bytes"
            ) from error
        if start.startswith(b"PK"):
            raise WeightsError(f"{path} is damaged: {error}") from error
    for text in code:
        if call := TOUCHES_FILES.search(text):
            raise WeightsError(
                f"{path}: its code has {call[0].decode()}, which may read or write files. Such "
                "networks are refused: export it without"
            )
    if not any("/code/" in name for name in names):
        raise WeightsError(
            f"{path}: is no TorchScript file. Pickled weights run code when they are opened and "
            "are refused: export the network with torch.jit.script or torch.jit.trace"
        )


def first_bytes(path: Path, count: int = 32) -> bytes:
    """The beginning of a weight file.

    Raises:
        WeightsError: no such file, or a Git LFS pointer instead of it.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: missing")
    with open(path, "rb") as file:
        start = file.read(count)
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull`")
    return start
