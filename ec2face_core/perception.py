"""Frozen, differentiable critics: a face parser opened by facer and a CLIP opened by open_clip.

The same two classes serve FaRL and OpenAI's CLIP at paper scale and the miniature's own networks:
`MiniParserNet` saved as TorchScript (`save_parser`), and a small open_clip model in a folder
(`save_mini_clip`). Images are [-1, 1], `b 3 h w`, everywhere outside this module; both networks
want [0, 1] inside. Gradients reach the image; weights are frozen.

facer's own call is wrapped in `inference_mode` and aligns faces by landmarks. Faces here fill an
aligned frame, for which that alignment is exactly a resize, so `.net` is called directly.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attributes import FACER_TO_CELEBAMASK, NUM_CLASSES
from .config import PerceptionConfig, resolve
from .weights import check_torchscript, clip_problems

# our channel c = facer channel FACER_CHANNEL[c]: the inverse of FACER_TO_CELEBAMASK
FACER_CHANNEL = torch.tensor(FACER_TO_CELEBAMASK).argsort()
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LOCAL_DIR = "local-dir:"


class FaceParser:
    """Pixels -> 19 classes in our order, through `facer.face_parser("farl/celebm/448")`.

    Args:
        path: TorchScript file, absolute or relative to the repository root.
        size: side in pixels of the square frame that the network wants (448 for FaRL).
        device: where the network runs.

    Raises:
        FileNotFoundError: naming the setting and where the file comes from; a WeightsError for half
            a file or another pickle than TorchScript.
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
        check_torchscript(file)
        _quiet()
        import facer

        self.size = size
        self.device = torch.device(device)
        if self.device.type == "cuda":  # the script fuser fails on CUDA after a few calls
            torch._C._jit_set_texpr_fuser_enabled(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a str: facer iterates over a Path; float(): the miniature's file is half precision
            parser = facer.face_parser("farl/celebm/448", self.device, model_path=str(file)).float()
        self.net = parser.requires_grad_(False).eval().net

    @classmethod
    def from_config(
        cls, config: PerceptionConfig, scoring: bool = False, device: torch.device | str = "cpu"
    ) -> FaceParser:
        """The parser that guides training, or with `scoring` the independent one that scores."""
        path = config.scoring_parser if scoring else config.parser
        return cls(path, config.parser_size, device)

    def logits(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> float32 logits `b 19 h w`, differentiable."""
        x = _resize(_unit(images), self.size, "bilinear")
        # TorchScript would rewrite the graph after its first calls and round differently from then
        # on: a resumed training, whose calls are counted anew, would leave the uninterrupted one.
        with torch.jit.optimized_execution(False):
            logits = self.net(x)[0].float()[:, FACER_CHANNEL.to(x.device)]
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
        FileNotFoundError: naming the setting and where the weights come from.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        _quiet()
        import open_clip

        self.device = torch.device(device)
        self.name, pretrained = _clip_name(name)
        try:
            if name.startswith(LOCAL_DIR):
                folder = Path(self.name.removeprefix(LOCAL_DIR))
                if problems := clip_problems(folder):  # open_clip would take a pickle
                    raise OSError("; ".join(problems))
            self.model = open_clip.create_model(
                self.name, pretrained, device=self.device, require_pretrained=True
            )
            self.tokenizer = open_clip.get_tokenizer(self.name)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"CLIP {name!r} cannot be opened: {error}. It is named by perception.clip and "
                "perception.scoring_clip. Paper scale: downloaded from the hub at first use; "
                "without network name a folder that holds it, local-dir:<folder>. Miniature: it "
                "is part of the clone (`git checkout data/mini`) or trained by `make foundation`."
            ) from error
        self.model.requires_grad_(False).eval()
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess.get("size", 224)
        self.size = size if isinstance(size, int) else size[0]
        self.mode = preprocess.get("interpolation", "bicubic")
        mean, std = preprocess.get("mean", CLIP_MEAN), preprocess.get("std", CLIP_STD)
        self.mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)

    @classmethod
    def from_config(
        cls, config: PerceptionConfig, scoring: bool = False, device: torch.device | str = "cpu"
    ) -> ClipScorer:
        """The CLIP that guides training, or with `scoring` the independent one that scores."""
        return cls(config.scoring_clip if scoring else config.clip, device)

    def image_features(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> unit features `(b, d)`, differentiable."""
        x = _resize(_unit(images), self.size, self.mode)
        return F.normalize(self.model.encode_image((x - self.mean) / self.std).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> unit features `(b, d)`; no gradient, the texts are given."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of each image and its text in percent, `(b,)` in [-100, 100]."""
        return 100 * (self.image_features(images) * self.text_features(texts)).sum(-1)


class MiniParserNet(nn.Module):
    """The miniature's FaRL: a small U-Net with FaRL's contract and facer's class order.

    [0, 1] images `b 3 h w` -> (logits `b 19 size size`, {}). Resizing and normalisation are inside.
    Pixels are folded into channels at the door (2 x 2), so the widest maps have half the side: full
    resolution costs twice as much time and wins nothing that the folded channels do not hold.

    Args:
        widths: channels at 1/2, 1/4, 1/8 ... of the side; multiples of 8.
        size: side in pixels, a multiple of 2 ** len(widths).
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 96), size: int = 64) -> None:
        super().__init__()
        self.widths, self.size = tuple(widths), size
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        self.down = nn.ModuleList(
            _block(12 if i == 0 else widths[i - 1], width) for i, width in enumerate(widths)
        )
        self.up = nn.ModuleList(
            _block(widths[i] + widths[i + 1], widths[i]) for i in reversed(range(len(widths) - 1))
        )
        self.head = nn.Conv2d(widths[0], 4 * NUM_CLASSES, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        image = image.to(self.mean.dtype)
        if image.shape[-1] != self.size or image.shape[-2] != self.size:
            image = F.interpolate(
                image, size=[self.size, self.size], mode="bilinear", align_corners=False
            )
        x = F.pixel_unshuffle((image - self.mean) / self.std, 2)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.avg_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        aux: dict[str, Tensor] = {}
        return F.pixel_shuffle(self.head(x), 2), aux


def save_parser(net: MiniParserNet, path: Path) -> None:
    """Write the net as a half-precision TorchScript file that facer opens, atomically."""
    half = MiniParserNet(net.widths, net.size)
    half.load_state_dict(net.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript once a submodule
        torch.jit.script(half.eval().half()).save(str(part))
    part.replace(path)


def clip_tokenizer(corpus: Iterable[str], vocab_size: int = 1024, length: int = 32):
    """A transformers `CLIPTokenizer` of `vocab_size` tokens at most, trained on `corpus`.

    CLIP's own pre-tokeniser and byte alphabet, so any text can be read; only the merges are fewer.
    The end token has the highest id, as in the original: text towers pool where the id is highest.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    end = "<|endoftext|>"
    bpe = Tokenizer(
        models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=end)
    )
    original = CLIPTokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = original.normalizer, original.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        # Bytes that end a word would else be numbered in hash order: other merges in every process.
        special_tokens=[byte + "</w>" for byte in alphabet],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    for token in ("<|startoftext|>", end):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def mini_clip_config(
    vocab_size: int,
    width: int = 12,
    layers: Sequence[int] | int = (2, 2, 2, 1),
    text_width: int = 96,
    text_layers: int = 2,
    embed_dim: int = 96,
    size: int = 64,
    length: int = 32,
) -> dict:
    """open_clip's `model_cfg` for a small CLIP: a ResNet (four `layers`) or a ViT (one number)."""
    vision = {"image_size": size, "layers": layers, "width": width, "head_width": 32}
    if isinstance(layers, int):
        vision["patch_size"] = 8
    return {
        "embed_dim": embed_dim,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": length,
            "vocab_size": vocab_size,
            "width": text_width,
            "heads": text_width // 32,
            "layers": text_layers,
            "hf_tokenizer_name": "local",  # any name: local-dir reads the tokenizer of its folder
            "tokenizer_kwargs": {"clean": "lower"},
        },
    }


def build_mini_clip(model_config: dict) -> nn.Module:
    """The randomly initialised open_clip model of a `model_cfg`."""
    import open_clip

    text = {k: v for k, v in model_config["text_cfg"].items() if k != "tokenizer_kwargs"}
    return open_clip.CLIP(**{**model_config, "text_cfg": open_clip.CLIPTextCfg(**text)})


def save_mini_clip(folder: Path, model: nn.Module, model_config: dict, tokenizer) -> None:
    """Write an open_clip `local-dir` folder: config, half-precision weights, tokenizer."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    size = model_config["vision_cfg"]["image_size"]
    preprocess = {
        "size": [size, size], "mode": "RGB", "mean": list(CLIP_MEAN), "std": list(CLIP_STD),
        "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    state = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    part = folder / "open_clip_model.part"
    part.write_bytes(save(state))
    part.replace(folder / "open_clip_model.safetensors")


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions; GroupNorm, so that training and evaluation compute the same."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def _unit(images: Tensor) -> Tensor:
    """[-1, 1] of any float type -> float32 in [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _resize(x: Tensor, size: int | Sequence[int], mode: str) -> Tensor:
    """To `size`, with antialiasing when shrinking; nothing to do costs nothing."""
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


def _quiet() -> None:
    """bitsandbytes, which comes with other packages, reports missing CPU kernels as an error."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
