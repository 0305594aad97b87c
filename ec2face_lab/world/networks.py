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
