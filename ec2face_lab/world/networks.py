"""Networks of the miniature: its FLUX, its face parser, its CLIP, and their tokenizers.

All have the classes and file formats of the originals with tiny configurations, so that nothing
else has to know which it loads: `tiny_backbone` is FLUX.1-dev's counterpart, `MiniParserNet` that
of FaRL in facer, `build_mini_clip` that of OpenAI's CLIP in open_clip.
"""

from __future__ import annotations

import json
import string
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import NUM_CLASSES
from ec2face_core.backbone import Backbone
from ec2face_core.perception import CLIP_MEAN, CLIP_STD
from ec2face_core.runs import whole_file, write_json

# ------------------------------------------------------------------------------------ the FLUX


def tiny_backbone(corpus: Sequence[str], seed: int = 0) -> Backbone:
    """The miniature FLUX at random weights, trainable: transformer 2.35 M, autoencoder 0.53 M.

    64 px images are 16 x 16 latents of 8 channels (f4) and 64 tokens; the transformer is
    128 = 4 x 32 wide with 2 double and 4 single blocks; vocabularies are trained on the corpus.

    corpus: captions. seed: of the weights.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer = clip_tokenizer(corpus, vocab_size=856)
    tokenizer_2 = _t5_tokenizer(corpus)
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


def clip_tokenizer(corpus: Iterable[str], vocab_size: int = 1024, length: int = 32) -> Any:
    """CLIP's byte-level BPE with merges trained on the corpus: a transformers `CLIPTokenizer`.

    It has CLIP's own pre-tokeniser and alphabet, so it can spell any text; only its merges are
    fewer. The end token has the highest id, as in CLIP: text towers pool where the id is highest.

    Args:
        corpus: texts.
        vocab_size: the most tokens, of which 514 are the alphabet and the two ends.
        length: tokens of a text, both ends included.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    end = "<|endoftext|>"
    bpe = Tokenizer(
        models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=end)
    )
    original = CLIPTokenizer().backend_tokenizer
    bpe.normalizer = original.normalizer
    bpe.pre_tokenizer = original.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        # Else bytes that end a word are numbered in hash order, and merges differ by process.
        special_tokens=[byte + "</w>" for byte in alphabet],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = model["vocab"]
    for token in ("<|startoftext|>", end):
        vocabulary[token] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _t5_tokenizer(corpus: Sequence[str], vocabulary: int = 400, length: int = 32) -> Any:
    """T5's unigram model, trained on the corpus."""
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


# --------------------------------------------------------------------------- the face parser


class MiniParserNet(nn.Module):
    """The miniature's FaRL: a small U-Net with FaRL's interface and facer's class order.

    Images `b 3 h w` in [0, 1] -> (logits `b 19 size size`, {}). It resizes and normalises by
    itself. The first layer folds 2 x 2 pixels into channels, so the widest maps have half the side:
    full resolution takes twice the time and gains no accuracy.

    Args:
        widths: channels at 1/2, 1/4, 1/8 ... of the side; multiples of 8.
        size: side in pixels, a multiple of 2 ** len(widths).
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 96), size: int = 64) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.size = size
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
        """Logits of images; the second result is empty, as facer's networks have one."""
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
    """Write the net as a half-precision TorchScript file that facer opens."""
    half = MiniParserNet(net.widths, net.size)
    half.load_state_dict(net.state_dict())
    with warnings.catch_warnings(), whole_file(path) as part:
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript at every submodule
        torch.jit.script(half.eval().half()).save(str(part))


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


# ------------------------------------------------------------------------------------ the CLIP


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


def save_mini_clip(folder: Path, model: nn.Module, model_config: dict, tokenizer: Any) -> None:
    """Write a folder that open_clip reads as `local-dir`: configuration, weights, tokenizer.

    Args:
        folder: where to write.
        model: what `build_mini_clip` made; its weights are written in half precision.
        model_config: its `model_cfg`.
        tokenizer: what `clip_tokenizer` made.
    """
    from safetensors.torch import save_file

    size = model_config["vision_cfg"]["image_size"]
    preprocess = {
        "size": [size, size], "mode": "RGB", "mean": list(CLIP_MEAN), "std": list(CLIP_STD),
        "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    write_json(folder / "open_clip_config.json", config)
    tokenizer.save_pretrained(folder)
    state = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    with whole_file(folder / "open_clip_model.safetensors") as part:
        save_file(state, part)
