"""The trainer of EC²Face on random networks and random data: its own step, without any file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from networks import Networks, Size, place_lora
from torch import Tensor, nn

from ec2face_core.attributes import NUM_CLASSES, pixel_counts
from ec2face_core.backbone import TextEmbedding
from ec2face_core.config import Config, load_profile
from ec2face_core.consistency import PixelConsistency
from ec2face_core.fast.blocks import blocks_of, prepare_blocks
from ec2face_core.fast.decoupled import set_attention
from ec2face_core.mask_branch import install_mask_branch
from ec2face_core.trainer import Trainer

FACES = 8  # of the random data


@dataclass(frozen=True)
class Settings:
    """What a measurement varies.

    Attributes:
        attention: of the mask tokens.
        text: text tokens.
        batch: samples of a micro-batch.
        repeats: samples that share one pass over a mask.
        recompute: every n-th block is computed again in backward; 0: none.
        compile: whether the blocks are compiled.
        dropped: whether all masks are dropped, so that attention gets a mask of keys; else none is.
    """

    attention: str = "joint"
    text: int = 128
    batch: int = 2
    repeats: int = 1
    recompute: int = 0
    compile: bool = False
    dropped: bool = False


class RandomCache:
    """A latent cache of random faces in memory, with the part of LatentCache that training reads.

    Args:
        size: shapes.
        text: text tokens.
    """

    def __init__(self, size: Size, text: int) -> None:
        generator = torch.Generator().manual_seed(0)
        side = size.latent_side
        config = {"joint_attention_dim": 4096, "pooled_projection_dim": 768} | size.transformer

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).half()

        self.latent_shape = (size.vae["latent_channels"], side, side)
        self.ids = [str(i) for i in range(FACES)]
        self._z = normal(FACES, *self.latent_shape)
        self._z_mask = normal(FACES, *self.latent_shape)
        shape = (FACES, size.pixels, size.pixels)
        self._labels = torch.randint(NUM_CLASSES, shape, generator=generator).byte()
        self._tokens = normal(FACES, text, config["joint_attention_dim"])
        self._pooled = normal(FACES, config["pooled_projection_dim"])

    def captions(self, id: str) -> tuple[str, ...]:
        """The one caption of a face: its id."""
        return (id,)

    def label_maps(self, ids: Sequence[str]) -> Tensor:
        """Label maps `b h w`, int64."""
        return self._labels[self._rows(ids)].long()

    def label_counts(self) -> Tensor:
        """Pixels of each class over all faces, `(19,)` int64."""
        return pixel_counts(self._labels).sum(0)

    def text(self, captions: Sequence[str]) -> TextEmbedding:
        """Embeddings of captions, float32."""
        rows = self._rows(captions)
        return TextEmbedding(self._tokens[rows].float(), self._pooled[rows].float())

    def batch(self, ids: Sequence[str], caption_indices: Sequence[int]) -> dict[str, Any]:
        """As LatentCache.batch."""
        rows = self._rows(ids)
        return {
            "id": list(ids),
            "captions": list(ids),
            "z": self._z[rows].float(),
            "z_mask": self._z_mask[rows].float(),
            "label_map": self.label_maps(ids),
            "text": self.text(ids),
        }

    def read_ahead(self, ids: Sequence[str], caption_indices: Sequence[int]) -> None:
        """Nothing: everything is in memory."""

    @staticmethod
    def _rows(names: Sequence[str]) -> list[int]:
        return [int(name or 0) for name in names]  # the empty caption has an embedding, too


class RandomTrainer(Trainer):
    """A Trainer whose `setup` takes random networks instead of loading any.

    Args:
        networks: on their device; the transformer is brought into the state of the settings.
        size: what they were built from.
        settings: of the measurement.
    """

    def __init__(self, networks: Networks, size: Size, settings: Settings) -> None:
        device = networks.parameters[0].device
        config = configuration(size, settings)
        super().__init__(config, "both", config.run_dir, "cpu" if device.type == "cpu" else None)
        self.networks = networks
        self.size = size

    def setup(self) -> None:
        """As in Trainer, without the check of the memory, which is measured."""
        self._start_processes()
        self._encode()
        self._load_models()
        self._make_optimizer()

    def _encode(self) -> None:
        """A cache of random latents, and the stream of samples from it."""
        self.cache: Any = RandomCache(self.size, self.config.backbone.text_length)
        self.stream = self._stream(self.cache)
        self.null_text = self.cache.text([""])
        self.counts = self.cache.label_counts().to(self.device)
        self.weight_scale = self._weight_scale()

    def _load_models(self) -> None:
        """Put the random transformer into the state of the settings."""
        n = self.networks
        self.transformer = n.transformer
        self.parameters = n.parameters
        for p in self.parameters:
            p.grad = None  # of a measurement that ran out of memory
        reset(self.transformer, self.config, self.size)
        prepare_blocks(self.transformer, self.config.trainer)
        self.consistency = PixelConsistency(n.vae, n.clip, n.parser, self.config.loss)


def configuration(size: Size, settings: Settings) -> Config:
    """The paper's configuration, on one process, with the settings."""
    return load_profile(
        "paper",
        data={"size": size.pixels},
        backbone={
            "text_length": settings.text, "dtype": str(size.dtype).removeprefix("torch."),
        },
        lora={"rank": size.rank, "alpha": float(size.rank), "attention": settings.attention},
        trainer={
            "batch_size": settings.batch, "accumulation": 1, "noise_repeats": settings.repeats,
            "num_processes": 1,
            "gradient_checkpointing": settings.recompute > 0,
            "recompute_every": max(1, settings.recompute), "compile": settings.compile,
            "drop_probability": float(settings.dropped),
        },
    )  # fmt: skip


def reset(transformer: nn.Module, config: Config, size: Size) -> None:
    """Undo what earlier measurements did to a transformer, and install its mask branch anew.

    That is: compiled blocks, recomputation, accelerate's autocast around `forward`, a LoRA on all
    tokens, another attention.
    """
    for block in blocks_of(transformer):
        block._compiled_call_impl = None
    transformer.disable_gradient_checkpointing()
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        transformer.__dict__.pop(name, None)
    install_mask_branch(transformer, config.lora)
    set_attention(transformer, config.lora.attention)
    place_lora(transformer, size, everywhere=False)
