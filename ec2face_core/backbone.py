"""The FLUX backbone: the same code for FLUX.1-dev and for the miniature.

A backbone is a `FluxPipeline` folder or hub id; the miniature consists of the same diffusers and
transformers classes with tiny configurations. Latents are the posterior's mode,
`z = (mode - shift_factor) * scaling_factor`, float32. Tokens are 2 x 2 latent cells,
`b (h/2 w/2) 4c`, FluxPipeline's own packing. Text is padded to a fixed length without an attention
mask, as FluxPipeline does, so the length belongs to the model.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import BackboneConfig, ConfigError
from .fast.transfer import send
from .io.hub import HubError, answering_hub
from .io.paths import resolve
from .io.sums import check_sums
from .io.texts import LostWordsWarning, describe_loss, lost_texts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

# Norms keep float32 weights under autocast; torch then says that it takes the slower kernel.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

PARTS: dict[str, tuple[str, ...]] = {
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "scheduler": ("scheduler",),
}


@dataclass
class Backbone:
    """The parts of a FluxPipeline; a part that was not loaded is None."""

    transformer: Any = None
    vae: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    tokenizer: Any = None
    tokenizer_2: Any = None
    scheduler: Any = None

    def components(self) -> dict[str, Any]:
        """The seven parts by the names that FluxPipeline gives them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def modules(self) -> list[nn.Module]:
        """The networks among the parts."""
        return [part for part in self.components().values() if isinstance(part, nn.Module)]

    def to(self, device: torch.device | str) -> Backbone:
        """Move every network; returns self."""
        for module in self.modules():
            module.to(device)
        return self


@dataclass
class TextEmbedding:
    """Embedded captions: T5 `tokens` `(b, T, d)` and CLIP's `pooled` vector `(b, p)`."""

    tokens: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> TextEmbedding:
        """Samples by slice, index list or index tensor."""
        return TextEmbedding(self.tokens[index], self.pooled[index])

    def to(self, *args: Any, **kwargs: Any) -> TextEmbedding:
        """As `Tensor.to`, for both."""
        return TextEmbedding(self.tokens.to(*args, **kwargs), self.pooled.to(*args, **kwargs))

    def send(self, device: torch.device) -> TextEmbedding:
        """On the device, without a wait (`fast.transfer.send`)."""
        return TextEmbedding(send(self.tokens, device), send(self.pooled, device))

    def where(self, keep: Tensor, other: TextEmbedding) -> TextEmbedding:
        """Eq. 13: this embedding where `keep` `(b,)` is true, else `other` (b or 1 samples)."""
        keep = keep.to(self.tokens.device)
        return TextEmbedding(
            torch.where(keep[:, None, None], self.tokens, other.tokens.to(self.tokens)),
            torch.where(keep[:, None], self.pooled, other.pooled.to(self.pooled)),
        )


# ------------------------------------------------------------------------- loading and saving


def load_backbone(config: BackboneConfig, parts: Iterable[str] = tuple(PARTS)) -> Backbone:
    """Load the named parts frozen, in eval mode, on the CPU.

    Args:
        config: `path` is a FluxPipeline folder (relative to the repository root) or a hub id.
        parts: any of transformer, vae, text, scheduler; the others are neither read nor downloaded.

    Raises:
        FileNotFoundError: the weights are missing, incomplete or not accessible.
        DamagedError: they are not those that were kept (`io/sums.py`).
    """
    from diffusers import FluxPipeline

    wanted = {name for part in parts for name in PARTS[part]}
    everything = {name for names in PARTS.values() for name in names}
    folder = resolve(config.path)
    if not folder.is_dir() and not is_hub_id(config.path):
        raise FileNotFoundError(_missing_message(config, "no such folder"))
    for name in wanted if folder.is_dir() else ():
        check_sums(folder / name)
    hub = nullcontext() if folder.is_dir() else answering_hub(config.path, "model_index.json")
    try:
        with hub, hide_progress_bars():
            pipeline = FluxPipeline.from_pretrained(
                str(folder) if folder.is_dir() else config.path,
                dtype=getattr(torch, config.dtype),
                use_safetensors=True,  # a pickle runs code when it is opened
                revision=config.revision or None,
                **dict.fromkeys(everything - wanted),
            )
    except HubError:
        raise
    except Exception as error:  # of a damaged file the libraries raise whatever they meet first
        reason = str(error).split("\n")[0] or type(error).__name__
        raise FileNotFoundError(_missing_message(config, reason)) from error
    backbone = Backbone(**{name: getattr(pipeline, name) for name in wanted})
    for module in backbone.modules():
        module.requires_grad_(False).eval()
    return backbone


def backbone_folder(config: BackboneConfig) -> Path:
    """The folder of the backbone's files: its own, or the hub's local copy of a revision.

    Raises:
        FileNotFoundError: as for `load_backbone`.
    """
    from huggingface_hub import hf_hub_download

    folder = resolve(config.path)
    if folder.is_dir():
        return folder
    load_backbone(config, ())  # raises a clear error if it is unavailable
    with answering_hub(config.path, "vae/config.json"):
        file = hf_hub_download(config.path, "vae/config.json", revision=config.revision or None)
    return Path(file).parents[1]


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Without the loading bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [x for x in (diffusers_logging, transformers_logging) if x.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _missing_message(config: BackboneConfig, reason: str) -> str:
    return (
        f"the backbone {config.path!r} (setting backbone.path) cannot be loaded: {reason}. "
        "`python -m ec2face_lab prepare --dry-run` names every missing, incomplete or pickled "
        "file. The miniature is part of the clone, or trained by `make foundation`. FLUX.1-dev is "
        "gated: accept its licence on its hub page and run `hf auth login`, or set backbone.path "
        "to a complete FluxPipeline folder."
    )


# --------------------------------------------------------------------------- latents and tokens


def check_side(vae: AutoencoderKL, side: int) -> None:
    """Refuse pictures that the autoencoder and the 2 x 2 tokens cannot divide.

    Raises:
        ConfigError: the side is no multiple of what they need, which the message names.
    """
    multiple = 2 ** len(vae.config.block_out_channels)  # the factor, and twice for tokens
    if side % multiple:
        raise ConfigError(f"data.size {side}: must be a multiple of {multiple} for this backbone")


def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images `b 3 h w` in [-1, 1] -> latents `b c h/f w/f`: `z = (mode - shift) * scale`."""
    mode = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
    return (mode - vae.config.shift_factor) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Latents `b c h w` -> images `b 3 fh fw`, about [-1, 1], not clamped; differentiable."""
    z = z.float() / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()


def pack(z: Tensor) -> Tensor:
    """Latents `b c h w` -> tokens `b (h/2 w/2) 4c`."""
    return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens `b (h/2 w/2) 4c` -> latents `b c h w`."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h // 2, w=w // 2, p=2, q=2)


@lru_cache(maxsize=64)
def position_ids(h: int, w: int, first: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Rotary position ids `(h/2 * w/2, 3)` = (first, row, column) of an `h x w` latent; cached.

    `first` is 0 for the noisy image and 1 for a condition (FluxKontextPipeline's layout). The
    tensor is shared by all callers: do not write into it.
    """
    with torch.inference_mode(False):  # an inference tensor in the cache would break training
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        ids = torch.stack([torch.full_like(rows, first), rows, columns], dim=-1)
        return ids.reshape(-1, 3).float().to(device)


@torch.no_grad()
def encode_text(
    backbone: Backbone, prompts: Sequence[str], length: int, t5_prompts: Sequence[str] | None = None
) -> TextEmbedding:
    """Embed captions as `FluxPipeline.encode_prompt` does, `length` T5 tokens each.

    Args:
        backbone: anything with the two text encoders and tokenizers, such as a pipeline.
        prompts: captions; the empty one is the null text of Eq. 13.
        length: T5 tokens; longer captions are cut off, shorter ones padded.
        t5_prompts: what T5 reads instead, equally many.
    """
    from diffusers.utils.torch_utils import get_module_execution_device

    def ids(tokenizer: Any, encoder: Any, texts: Sequence[str], n: int) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        found = tokenizer(list(texts), max_length=n, **options).input_ids
        return found.to(get_module_execution_device(encoder))

    clip = backbone.text_encoder
    t5 = backbone.text_encoder_2
    clip_ids = ids(backbone.tokenizer, clip, prompts, backbone.tokenizer.model_max_length)
    tokens = t5(ids(backbone.tokenizer_2, t5, t5_prompts or prompts, length))[0]
    return TextEmbedding(tokens, clip(clip_ids).pooler_output)


def warn_of_lost_words(
    backbone: Backbone,
    prompts: Sequence[str],
    length: int,
    prompts_2: Sequence[str] | None = None,
    stacklevel: int = 3,
) -> None:
    """Warn, once for all prompts, of words beyond what the text encoders read.

    Args:
        backbone: anything with the two tokenizers, such as a pipeline.
        prompts: captions.
        length: T5 tokens.
        prompts_2: what T5 reads instead of the captions.
        stacklevel: of the warning.
    """
    clip_length = backbone.tokenizer.model_max_length
    lost = lost_texts(backbone.tokenizer_2, prompts_2 or prompts, length)
    reader = f"T5 ({length} tokens)"
    if not lost:
        lost = lost_texts(backbone.tokenizer, prompts, clip_length)
        reader = f"CLIP ({clip_length} tokens; T5 reads all)"
    if lost:
        message = describe_loss(lost, len(prompts), reader)
        warnings.warn(message, LostWordsWarning, stacklevel)


def load_tiny_decoder(
    config: BackboneConfig, latent_shape: Sequence[int], size: int
) -> AutoencoderTiny:
    """The AutoencoderTiny of `backbone.pixel_decoder`, frozen, with its decoder only.

    It reads the transformer's latents as they are: its scale is 1 and its shift 0.

    Args:
        config: pixel_decoder (a folder or a hub id) and dtype are used.
        latent_shape: `(c, h, w)` that it has to decode.
        size: pixels of the side of the pictures.

    Raises:
        FileNotFoundError: no such decoder.
        ConfigError: it belongs to other latents.
    """
    from diffusers import AutoencoderTiny
    from safetensors import SafetensorError

    name = config.pixel_decoder
    folder = resolve(name)
    check_sums(folder)
    try:
        vae = AutoencoderTiny.from_pretrained(
            str(folder) if folder.is_dir() else name,
            torch_dtype=getattr(torch, config.dtype),
            use_safetensors=True,
        )
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(
            f"the small decoder {name!r} (setting backbone.pixel_decoder) cannot be loaded: "
            f"{str(error).splitlines()[0]}. FLUX.1's is the hub's madebyollin/taef1: name it or a "
            "folder that holds it, or leave the setting empty for the backbone's own decoder"
        ) from error
    c, h, _ = latent_shape
    factor = 2 ** (len(vae.config.decoder_block_out_channels) - 1)
    if vae.config.latent_channels != c or h * factor != size:
        raise ConfigError(
            f"backbone.pixel_decoder {name!r} belongs to another autoencoder: it makes pictures of "
            f"{factor} times the side out of {vae.config.latent_channels} channels, but here it is "
            f"{size // h} times and {c} channels"
        )
    del vae.encoder
    return vae.requires_grad_(False).eval()


def is_hub_id(name: str) -> bool:
    """Is this `owner/name`, not a path? Hub ids have one slash and begin with a name."""
    return name.count("/") == 1 and name[0] not in "./~"
