"""Networks of the miniature: its FLUX, its face parsers, its CLIPs, and their tokenizers.

All have the classes and file formats of the originals with tiny configurations, so that nothing
else has to know which it loads: `tiny_backbone` is FLUX.1-dev's counterpart, the `ParserNet`s are
those of FaRL in facer, `build_mini_clip` that of OpenAI's CLIP in open_clip.
"""

from __future__ import annotations

import copy
import itertools
import json
import string
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ec2face_core.attributes import NUM_CLASSES
from ec2face_core.backbone import Backbone, hide_progress_bars
from ec2face_core.io.sums import list_sums
from ec2face_core.perception import CLIP_MEAN, CLIP_STD
from ec2face_core.runs import whole_file, write_json, write_tensors

# ------------------------------------------------------------------------------------ the FLUX


@dataclass(frozen=True)
class Plan:
    """Sizes of a miniature FLUX; the defaults are those of the first miniature."""

    side: int = 64  # pixels
    vae_widths: tuple[int, ...] = (24, 48, 48)  # at 1/1, 1/2, 1/4 ... of the side
    latent_channels: int = 8
    heads: int = 4  # of 32 channels each
    t5_heads: int = 3  # of 32 channels each
    text_length: int = 32  # tokens of both text encoders


SECOND = Plan(128, (16, 32, 64, 128), 16, heads=6, t5_heads=4, text_length=64)


def tiny_backbone(corpus: Sequence[str], seed: int = 0, plan: Plan = Plan()) -> Backbone:
    """A miniature FLUX at random weights, trainable; vocabularies are trained on the corpus.

    The first miniature has 16 x 16 latents of 8 channels (f4) for 64 px, a transformer of 2.35 M
    parameters and an autoencoder of 0.53 M. `SECOND` has FLUX.1-dev's layout, 16 x 16 latents of 16
    channels (f8) for 128 px, and 5.2 M and 2.6 M parameters. Both have 64 image tokens.

    Args:
        corpus: captions.
        seed: of the weights.
        plan: sizes of the parts.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer = clip_tokenizer(corpus, vocab_size=856, length=plan.text_length)
    tokenizer_2 = _t5_tokenizer(corpus, length=plan.text_length)
    stages = len(plan.vae_widths)
    text_width = 32 * plan.t5_heads
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
                d_model=text_width,
                d_kv=32,
                d_ff=2 * text_width,
                num_layers=2,
                num_heads=plan.t5_heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                tie_word_embeddings=False,
            )
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * stages,
            up_block_types=["UpDecoderBlock2D"] * stages,
            block_out_channels=list(plan.vae_widths),
            layers_per_block=1,
            latent_channels=plan.latent_channels,
            norm_num_groups=8,
            sample_size=plan.side,
            scaling_factor=0.3611,  # FLUX.1-dev's; set both after the autoencoder is trained
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * plan.latent_channels,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=plan.heads,
            joint_attention_dim=text_width,
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


def save_backbone(
    backbone: Backbone, folder: Path | str, dtype: torch.dtype = torch.float16
) -> None:
    """Write a whole backbone as a FluxPipeline folder; its own dtype stays what it is."""
    from diffusers import FluxPipeline

    parts = {
        name: copy.deepcopy(part).to(dtype) if isinstance(part, nn.Module) else part
        for name, part in backbone.components().items()
    }
    with hide_progress_bars():
        FluxPipeline(**parts).save_pretrained(str(folder))
    for file in Path(folder).glob("*/config.json"):  # diffusers writes where a part was read
        settings = json.loads(file.read_text())
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2) + "\n")
    list_sums(Path(folder))


# --------------------------------------------------------------------------- the face parsers


class ParserNet(nn.Module):
    """What both parsers share with FaRL: its interface, facer's class order, a square frame.

    Images `b 3 h w` in [0, 1] -> (logits `b 19 size size`, {}).

    size: side in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))

    def framed(self, image: Tensor) -> Tensor:
        """Images, resized and normalised."""
        image = image.to(self.mean.dtype)
        if image.shape[-1] != self.size or image.shape[-2] != self.size:
            image = F.interpolate(
                image, size=[self.size, self.size], mode="bilinear", align_corners=False
            )
        return (image - self.mean) / self.std


class MiniParserNet(ParserNet):
    """The guiding parser: a small U-Net.

    The first layer folds 2 x 2 pixels into channels, so the widest maps have half the side: full
    resolution takes twice the time and gains no accuracy. GroupNorm lets training and evaluation
    compute the same.

    Args:
        widths: channels at 1/2, 1/4, 1/8 ... of the side; multiples of 8.
        size: side in pixels, a multiple of 2 ** len(widths).
    """

    def __init__(self, widths: Sequence[int] = (24, 40, 64, 96), size: int = 64) -> None:
        super().__init__(size)
        self.down = nn.ModuleList([_group_block(12, widths[0])])
        for inputs, outputs in itertools.pairwise(widths):
            self.down.append(
                nn.Sequential(_group_block(inputs, outputs), _group_block(outputs, outputs))
            )
        self.up = nn.ModuleList(
            _group_block(widths[i] + widths[i + 1], widths[i])
            for i in reversed(range(len(widths) - 1))
        )
        self.head = nn.Conv2d(widths[0], 4 * NUM_CLASSES, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of images; the second result is empty, as facer's networks have one."""
        x = F.pixel_unshuffle(self.framed(image), 2)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.avg_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        aux: dict[str, Tensor] = {}
        return F.pixel_shuffle(self.head(x), 2), aux

    def start_from(self, shares: Tensor) -> None:
        """Predict class shares, `(19,)` in facer's order, instead of learning them first."""
        with torch.no_grad():
            self.head.bias.copy_(shares.log().repeat_interleave(4))
            self.head.weight.mul_(0.3)


class DilatedParserNet(ParserNet):
    """The scoring parser: dilated residual blocks at a quarter of the side, and two finer paths.

    It has no pyramid of skips and reads every pixel at full resolution. Its BatchNorms vanish into
    the convolutions when it is saved.

    Args:
        widths: channels at 1, 1/2 and 1/4 of the side.
        size: side in pixels, a multiple of 4.
        dilations: of the residual blocks.
    """

    def __init__(
        self,
        widths: Sequence[int] = (12, 24, 64),
        size: int = 64,
        dilations: Sequence[int] = (1, 2, 4, 8),
    ) -> None:
        super().__init__(size)
        fine, middle, coarse = widths
        self.fine = _batch_block(3, fine)
        self.middle = _batch_block(fine, middle, stride=2)
        self.middle_detail = _batch_block(middle, middle)
        self.coarse = _batch_block(middle, coarse, stride=2)
        self.context = nn.Sequential(*(_DilatedBlock(coarse, d) for d in dilations))
        self.join_middle = _batch_block(middle + coarse, middle)
        self.join_fine = _batch_block(fine + middle, 2 * fine)
        self.head = nn.Conv2d(2 * fine, NUM_CLASSES, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of images; the second result is empty, as facer's networks have one."""
        fine = self.fine(self.framed(image))
        middle = self.middle_detail(self.middle(fine))
        coarse = self.context(self.coarse(middle))
        middle = self.join_middle(torch.cat([_twice(coarse), middle], 1))
        aux: dict[str, Tensor] = {}
        return self.head(self.join_fine(torch.cat([_twice(middle), fine], 1))), aux

    def start_from(self, shares: Tensor) -> None:
        """Predict class shares, `(19,)` in facer's order, instead of learning them first."""
        with torch.no_grad():
            self.head.bias.copy_(shares.log())


class _DilatedBlock(nn.Module):
    """A residual block whose first convolution is dilated."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _batch_block(width, width, dilation=dilation),
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def save_parser(net: ParserNet, path: Path) -> None:
    """Write the net as a half-precision TorchScript file that facer opens."""
    net = copy.deepcopy(net).cpu().float().eval().to(memory_format=torch.contiguous_format)
    for part in list(net.modules()):
        layers = list(part.children())
        if len(layers) > 1 and isinstance(layers[1], nn.BatchNorm2d):
            part[0] = fuse_conv_bn_eval(layers[0], layers[1])
            part[1] = nn.Identity()
    with warnings.catch_warnings(), whole_file(path) as file:
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript at every submodule
        torch.jit.script(net.half()).save(str(file))
    list_sums(path)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _group_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()
    )


def _batch_block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(
        inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


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
    write_tensors(folder / "open_clip_model.safetensors", state)
    list_sums(folder)
