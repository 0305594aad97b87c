"""The FLUX backbone: one way in for FLUX.1-dev and for the miniature, latents, tokens, text, LoRA.

A backbone is a `FluxPipeline` folder or hub id. The miniature (`tiny_backbone`) has the same
diffusers and transformers classes with tiny configurations, so nothing else knows which one it is.

Chosen here
    Latents are the posterior's mode, `z = (mode - shift_factor) * scaling_factor`, float32.
    Tokens are 2 x 2 latent cells, `b (h/2 w/2) 4c`, FluxPipeline's own packing.
    Text is padded to a fixed length without attention mask, as FluxPipeline does: the length
    belongs to the model.
    The mask branch's LoRA is `lora.py`; its functions are reachable here, too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import string
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import BackboneConfig, resolve
from .lora import add_mask_lora, load_mask_lora, read_mask_lora, save_mask_lora
from .weights import is_hub_id, pipeline_problems

__all__ = [
    "PARTS",
    "Backbone",
    "TextEmbedding",
    "add_mask_lora",
    "decode_latents",
    "encode_images",
    "encode_text",
    "load_backbone",
    "load_mask_lora",
    "pack",
    "position_ids",
    "read_mask_lora",
    "save_backbone",
    "save_mask_lora",
    "tiny_backbone",
    "unpack",
]

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else noise when diffusers imports it

PARTS: dict[str, tuple[str, ...]] = {
    "transformer": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "scheduler": ("scheduler",),
}


@dataclass
class Backbone:
    """The parts of a FluxPipeline; a part that was not asked for is None."""

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

    def where(self, keep: Tensor, other: TextEmbedding) -> TextEmbedding:
        """These samples where `keep` `(b,)` is true, else `other` (b or 1 samples). Eq. 13."""
        keep = keep.to(self.tokens.device)
        return TextEmbedding(
            torch.where(keep[:, None, None], self.tokens, other.tokens.to(self.tokens)),
            torch.where(keep[:, None], self.pooled, other.pooled.to(self.pooled)),
        )


# ------------------------------------------------------------------------- loading and saving


def load_backbone(config: BackboneConfig, parts: Iterable[str] = tuple(PARTS)) -> Backbone:
    """Load the asked parts frozen, in eval mode, on the CPU.

    Args:
        config: `path` is a FluxPipeline folder (relative to the repository root) or a hub id.
        parts: any of transformer, vae, text, scheduler; the others are neither read nor downloaded.

    Raises:
        FileNotFoundError: the weights are missing, incomplete or not accessible.
    """
    from diffusers import FluxPipeline
    from safetensors import SafetensorError

    wanted = {name for part in parts for name in PARTS[part]}
    everything = {name for names in PARTS.values() for name in names}
    folder = resolve(config.path)
    if not folder.is_dir() and not is_hub_id(config.path):
        raise FileNotFoundError(_missing(config, "no such folder"))
    try:
        with _without_bars():
            pipeline = FluxPipeline.from_pretrained(
                str(folder) if folder.is_dir() else config.path,
                dtype=getattr(torch, config.dtype),
                use_safetensors=True,  # a pickle runs code when it is opened
                **dict.fromkeys(everything - wanted),
            )
    except (OSError, SafetensorError) as error:
        problems = pipeline_problems(folder) if folder.is_dir() else []
        reason = "; ".join(problems) or str(error).split("\n")[0]
        raise FileNotFoundError(_missing(config, reason)) from error
    backbone = Backbone(**{name: getattr(pipeline, name) for name in wanted})
    for module in backbone.modules():
        module.requires_grad_(False).eval()
    return backbone


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading takes a second in the miniature: no bars of diffusers and transformers."""
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


def _missing(config: BackboneConfig, reason: str) -> str:
    return (
        f"the backbone {config.path!r} (setting backbone.path) cannot be loaded: {reason}. "
        "The miniature is made by `make foundation`. FLUX.1-dev is gated: accept its licence on "
        "its hub page and run `hf auth login`, or set backbone.path to a complete FluxPipeline "
        "folder."
    )


def save_backbone(
    backbone: Backbone, folder: Path | str, dtype: torch.dtype = torch.float16
) -> None:
    """Write a whole backbone as a FluxPipeline folder; its own dtype stays what it is."""
    import copy

    from diffusers import FluxPipeline

    parts = {
        name: copy.deepcopy(part).to(dtype) if isinstance(part, nn.Module) else part
        for name, part in backbone.components().items()
    }
    with _without_bars():
        FluxPipeline(**parts).save_pretrained(str(folder))


# --------------------------------------------------------------------------- latents and tokens


def encode_images(vae: nn.Module, images: Tensor) -> Tensor:
    """Images `b 3 h w` in [-1, 1] -> latents `b c h/f w/f`: `z = (mode - shift) * scale`."""
    mode = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
    return (mode - vae.config.shift_factor) * vae.config.scaling_factor


def decode_latents(vae: nn.Module, z: Tensor) -> Tensor:
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
def encode_text(backbone: Backbone, prompts: Sequence[str], length: int) -> TextEmbedding:
    """Embed captions as `FluxPipeline.encode_prompt` does, `length` T5 tokens each.

    `backbone` may be anything with the two text encoders and tokenizers (so also a pipeline).
    An empty caption is the null text of Eq. 13. What does not fit is cut off.
    """

    def ids(tokenizer: Any, n: int) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(prompts), max_length=n, **options).input_ids

    clip, t5 = backbone.text_encoder, backbone.text_encoder_2
    clip_ids = ids(backbone.tokenizer, backbone.tokenizer.model_max_length)
    tokens = t5(ids(backbone.tokenizer_2, length).to(t5.device))[0]
    return TextEmbedding(tokens, clip(clip_ids.to(clip.device)).pooler_output)


# --------------------------------------------------------------------------------- the miniature


def tiny_backbone(corpus: Sequence[str], seed: int = 0) -> Backbone:
    """The miniature FLUX at random weights, trainable: transformer 2.35 M, autoencoder 0.53 M.

    64 px images are 16 x 16 latents of 8 channels (f4) and 64 tokens; the transformer is
    128 = 4 x 32 wide with 2 double and 4 single blocks; vocabularies are learnt from the corpus.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, tokenizer_2 = _clip_tokenizer(corpus), _t5_tokenizer(corpus)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                projection_dim=64,
                hidden_act="quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=96,
                d_kv=32,
                d_ff=192,
                num_layers=2,
                num_heads=3,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                tie_word_embeddings=False,
            )
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[24, 48, 48],
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=0.3611,  # FLUX.1-dev's; set both after the autoencoder is trained
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=32,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=96,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
    scheduler = FlowMatchEulerDiscreteScheduler(  # FLUX.1-dev's
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return Backbone(
        transformer, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, scheduler
    )


def _clip_tokenizer(corpus: Sequence[str], vocabulary: int = 600, length: int = 32) -> Any:
    """CLIP's byte-level BPE with merges learnt from the corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer, bpe.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"]
    for byte in alphabet:  # so that every text can be spelt
        vocab.setdefault(f"{byte}</w>", len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):  # the end has the highest id, as in CLIP
        vocab[token] = len(vocab)
    return CLIPTokenizer(
        vocab=vocab, merges=[tuple(m) for m in model["merges"]], model_max_length=length
    )


def _t5_tokenizer(corpus: Sequence[str], vocabulary: int = 400, length: int = 32) -> Any:
    """T5's unigram model learnt from the corpus."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import T5TokenizerFast

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = T5TokenizerFast().backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation),
        show_progress=False,
    )
    unigram.train_from_iterator(corpus, trainer)
    vocab = [tuple(entry) for entry in json.loads(unigram.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=length)
