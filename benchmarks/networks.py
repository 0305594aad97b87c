"""The networks of a training step at random weights, in two sizes, for counting and timing.

`flux` is the paper's: FLUX.1-dev, its autoencoder, a parser built like FaRL's and CLIP ViT-L-14, at
512 px. `tiny` has the miniature's classes, small enough for a CPU. On the meta device nothing is
allocated, and FLOPs and bytes can be counted in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.backbone import TextEmbedding
from ec2face_core.config import LoraConfig
from ec2face_core.mask_branch import ADAPTER, add_mask_lora
from ec2face_core.perception import CLIP_MEAN, CLIP_STD, ClipScorer, FaceParser
from ec2face_lab.world.networks import MiniParserNet, build_mini_clip, mini_clip_config


@dataclass(frozen=True)
class Size:
    """Configurations of the networks, and the shapes of their inputs."""

    transformer: dict[str, Any]  # of FluxTransformer2DModel
    vae: dict[str, Any]  # of AutoencoderKL
    parser: Callable[[], nn.Module]
    parser_side: int  # pixels that the parser wants
    clip: Callable[[], dict[str, Any]]  # open_clip's model_cfg
    pixels: int  # side of a picture
    text: int  # text tokens
    rank: int  # of the LoRA
    batch: int
    dtype: torch.dtype  # of the frozen weights

    @property
    def latent_side(self) -> int:
        """Cells of the side of a latent."""
        return self.pixels // 2 ** (len(self.vae["up_block_types"]) - 1)


class FarlParser(nn.Module):
    """FaRL's face parser: ViT-B/16, a pyramid of four of its layers, UPerNet's head.

    After `farl/network/transformers.py` and `mmseg`'s UPerHead: [0, 1] images `b 3 448 448` ->
    (logits `b 19 112 112`, {}), facer's contract. 161 M parameters.
    """

    LAYERS = (3, 5, 7, 11)
    BINS = (1, 2, 3, 6)

    def __init__(self, classes: int = 19, d: int = 768, side: int = 448) -> None:
        import timm

        super().__init__()
        self.vit = timm.create_model("vit_base_patch16_224", img_size=side, num_classes=0)
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(_up(d), nn.BatchNorm2d(d), nn.GELU(), _up(d)),
                _up(d),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.pools = nn.ModuleList(_conv(d, d, 1) for _ in self.BINS)
        self.pooled = _conv(d * (1 + len(self.BINS)), d, 3)
        self.lateral = nn.ModuleList(_conv(d, d, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_conv(d, d, 3) for _ in range(3))
        self.fuse = _conv(4 * d, d, 3)
        self.head = nn.Conv2d(d, classes, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `b 19 112 112` of images `b 3 448 448` in [0, 1]."""
        layers = self.vit.forward_intermediates(
            image, indices=list(self.LAYERS), intermediates_only=True
        )
        *fine, coarse = (step(x) for step, x in zip(self.pyramid, layers, strict=True))
        context = [
            _resize(pool(F.adaptive_avg_pool2d(coarse, n)), coarse)
            for n, pool in zip(self.BINS, self.pools, strict=True)
        ]
        top = self.pooled(torch.cat([coarse, *context], 1))
        maps = [*(side(x) for side, x in zip(self.lateral, fine, strict=True)), top]
        for i in (2, 1, 0):
            maps[i] = maps[i] + _resize(maps[i + 1], maps[i])
        maps = [*(step(x) for step, x in zip(self.smooth, maps[:3], strict=True)), top]
        return self.head(self.fuse(torch.cat([_resize(x, maps[0]) for x in maps], 1))), {}


def _up(d: int) -> nn.Module:
    return nn.ConvTranspose2d(d, d, 2, stride=2)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Module:
    """The ConvModule of mmseg."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _vit_l_14() -> dict[str, Any]:
    import open_clip

    return open_clip.get_model_config("ViT-L-14")


def _vae(channels: list[int], layers: int, latent: int, groups: int, attention: bool) -> dict:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": latent,
        "norm_num_groups": groups,
        "mid_block_add_attention": attention,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }


SIZES = {
    "tiny": Size(
        transformer={
            "in_channels": 32, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32,
            "num_attention_heads": 4, "joint_attention_dim": 96, "pooled_projection_dim": 64,
            "guidance_embeds": True, "axes_dims_rope": (8, 12, 12),
        },
        vae=_vae([24, 48, 48], 1, 8, 8, attention=False),
        parser=MiniParserNet, parser_side=64,
        clip=lambda: mini_clip_config(1024),
        pixels=64, text=32, rank=16, batch=8, dtype=torch.float32,
    ),
    "flux": Size(
        transformer={"guidance_embeds": True},  # the class's defaults are FLUX.1-dev's
        vae=_vae([128, 256, 512, 512], 2, 16, 32, attention=True),
        parser=FarlParser, parser_side=448,
        clip=_vit_l_14,
        pixels=512, text=512, rank=4, batch=4, dtype=torch.bfloat16,
    ),
}  # fmt: skip


class RandomParser(FaceParser):
    """A FaceParser around a given network."""

    def __init__(self, net: nn.Module, size: int) -> None:
        self.net = net
        self.size = size


class RandomClip(ClipScorer):
    """A ClipScorer around a given network; every text has the same tokens."""

    def __init__(self, model: nn.Module, side: int, length: int, device: str) -> None:
        self.model = model
        self.size = side
        self.mode = "bicubic"
        self.device = torch.device(device)
        self.tokenizer = lambda texts: torch.zeros(len(texts), length, dtype=torch.long)
        self.mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)


@dataclass
class Networks:
    """Everything a step needs, frozen but for the LoRA's `parameters`."""

    transformer: nn.Module
    parameters: list[nn.Parameter]
    vae: nn.Module
    parser: RandomParser
    clip: RandomClip


def build_transformer(size: Size, device: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """The transformer with its mask LoRA (joint attention), and the LoRA's parameters."""
    from diffusers import FluxTransformer2DModel

    with torch.device(device), _default_dtype(size.dtype):
        transformer = FluxTransformer2DModel(**size.transformer)
    return transformer, add_mask_lora(transformer, LoraConfig(rank=size.rank, alpha=size.rank))


def place_lora(transformer: nn.Module, size: Size, everywhere: bool) -> None:
    """Where the LoRA of an installed mask branch is computed: on mask tokens, or on all.

    everywhere: peft's own forward on all tokens, times 0 or 1 by token; the result is the same.
    """
    from peft.tuners.lora import LoraLayer

    mask = (size.latent_side // 2) ** 2  # tokens, of mask and noise each
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer):
            layer.scaling[ADAPTER] = 1.0
            if everywhere:
                others = mask + (size.text if name.startswith("single") else 0)
                device = layer.lora_A[ADAPTER].weight.device
                gate = torch.arange(others + mask, device=device) >= others
                layer.scaling[ADAPTER] = gate.to(size.dtype)[:, None]
                layer.cast_input_dtype_enabled = True
                layer.lora_variant.pop(ADAPTER)


def build_pixel_path(size: Size, device: str) -> tuple[nn.Module, RandomParser, RandomClip]:
    """Decoder, parser and CLIP."""
    from diffusers import AutoencoderKL

    clip_config = size.clip()
    with torch.device(device), _default_dtype(size.dtype):
        vae = AutoencoderKL(**size.vae)
        parser = size.parser()
        clip = build_mini_clip(clip_config)
    for net in (vae, parser, clip):
        net.requires_grad_(False).eval()
    for net in (parser, clip.visual):  # they are given float32 pictures

        def cast(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (inputs[0].to(size.dtype),)

        net.register_forward_pre_hook(cast)
    side = clip_config["vision_cfg"]["image_size"]
    length = clip_config["text_cfg"]["context_length"]
    return vae, RandomParser(parser, size.parser_side), RandomClip(clip, side, length, device)


def build(size: Size, device: str) -> Networks:
    """All networks at random weights, without allocating anything on "meta"."""
    return Networks(*build_transformer(size, device), *build_pixel_path(size, device))


@dataclass
class Inputs:
    """b samples: noisy and clean-mask latents `b c h w`, text, t `(b,)`, labels `b H W`."""

    z: Tensor
    z_mask: Tensor
    text: TextEmbedding
    t: Tensor
    label_map: Tensor


def inputs(size: Size, batch: int, device: str) -> Inputs:
    """A random batch."""
    c = size.vae["latent_channels"]
    side = size.latent_side
    with torch.device(device):
        config = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | size.transformer
        text = TextEmbedding(
            torch.randn(batch, size.text, config["joint_attention_dim"]),
            torch.randn(batch, config["pooled_projection_dim"]),
        )
        z, z_mask = torch.randn(2, batch, c, side, side)
        labels = torch.randint(0, 19, (batch, size.pixels, size.pixels))
        return Inputs(z, z_mask, text, torch.rand(batch), labels)


@contextmanager
def flash_on_meta() -> Iterator[None]:
    """Use the flash kernel for attention of meta tensors, as on a GPU.

    PyTorch uses the plain formula for them. Its forward FLOPs are the same, but its backward has 4
    matrix products instead of 5 (flash computes the probabilities again) and keeps the
    probabilities.
    """
    stock = F.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if query.is_meta and attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return stock(query, key, value, attn_mask, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
