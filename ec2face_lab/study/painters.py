"""What generates the pictures of a split: one small interface for every method.

A painter turns ids into images (`paint`), lists everything that shapes them (`key`), and says what
is written into a picture's file (`about`). Painters are EC²Face's variants and its base without
LoRA, the references (the real faces, and their round trip through the autoencoder), and the
comparison systems.

A picture's noise is a function of (sampling.seed, id) alone: it depends neither on the batch nor on
the order.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ec2face_core.config import VARIANTS, BackboneConfig, Config, ConfigError, adapter_dir
from ec2face_core.data import FaceDataset
from ec2face_core.io.lora_file import LORA_FILE, find_mask_lora
from ec2face_core.io.paths import resolve
from ec2face_core.io.texts import LostWordsWarning
from ec2face_core.mask_branch import ADAPTER
from ec2face_core.perception import LOCAL_DIR
from ec2face_core.runs import path_digest

from ..baselines import SYSTEMS, WEIGHTS, load, systems, weights_dir
from ..baselines.int8_weights import shared_file
from ..cache import code_digest
from ..painter.edits import edit

BASE = "base"
REAL = "real"
ROUND_TRIP = "vae_round_trip"

METHODS = (*VARIANTS, BASE, REAL, ROUND_TRIP, *SYSTEMS)

NOTICE = "Synthetic face: not a photograph of a person."

SHAPING = (  # modules that decide the pixels of EC²Face and of the round trip
    "ec2face_core.attributes",
    "ec2face_core.backbone",
    "ec2face_core.fast.decoupled",
    "ec2face_core.inference.inputs",
    "ec2face_core.mask_branch",
    "ec2face_core.pipeline",
    "ec2face_lab.study.painters",
)

BLOCKS = (
    "encoders",
    "flux",
    "int8_weights",
    "style",
    "system",
    "unets",
)  # shared by several systems


class Painter(ABC):
    """Generates pictures of a dataset's faces by one method.

    Attributes:
        slow: whether several processes should share the pictures of a split.
    """

    slow = True

    def __init__(self, config: Config, method: str, dataset: FaceDataset | None = None) -> None:
        self.config = config
        self.method = method
        self.dataset = dataset

    @abstractmethod
    def paint(self, ids: Sequence[str]) -> Tensor:
        """Images `b 3 h w` in [0, 1]."""

    @abstractmethod
    def key(self) -> list[Any]:
        """JSON-ready values that change whenever the pictures of the same faces would change."""

    @abstractmethod
    def about(self, name: str) -> dict[str, str]:
        """PNG text chunks of the picture of a face."""

    def check(self) -> None:  # noqa: B027 (references have no weights of their own)
        """Raise an error with the remedy if weights are missing."""


def painter(config: Config, method: str, dataset: FaceDataset | None = None) -> Painter:
    """The painter of a method, one of `METHODS`.

    Raises:
        ConfigError: there is no such method; the message lists them.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} does not exist; known: {', '.join(METHODS)}")
    references = {REAL: RealFaces, ROUND_TRIP: RoundTrip}
    kind = references.get(method, ComparisonSystem if method in SYSTEMS else EC2Face)
    return kind(config, method, dataset)


# ------------------------------------------------------------------------------------- references


class RealFaces(Painter):
    """The faces themselves."""

    slow = False

    def paint(self, ids: Sequence[str]) -> Tensor:
        """Images `b 3 h w` in [0, 1]."""
        return torch.stack([self.dataset.image(name) for name in ids]) / 2 + 0.5

    def key(self) -> list[Any]:
        """Nothing but the data, which the caller adds, shapes them."""
        return [self.method, self.config.data.size]

    def about(self, name: str) -> dict[str, str]:
        """Which face it is."""
        return {"Source": f"Face {name} of {self.dataset.root.name}."}


class RoundTrip(Painter):
    """The faces after encoding and decoding: a ceiling for what the latents can express."""

    slow = False

    def paint(self, ids: Sequence[str]) -> Tensor:
        """Images `b 3 h w` in [0, 1]."""
        images = torch.stack([self.dataset.image(name) for name in ids])
        return through_autoencoder(self._vae, images.to(_device())) / 2 + 0.5

    def key(self) -> list[Any]:
        """The autoencoder and the code."""
        parts = _backbone_digests(self.config.backbone)
        return [self.method, self.config.data.size, parts, code_digest(SHAPING)]

    def about(self, name: str) -> dict[str, str]:
        """Which autoencoder it went through."""
        source = f"{self.dataset.root.name}, {self.config.backbone.path}"
        return {"Source": f"Autoencoder round trip of a face of {source}."}

    @functools.cached_property
    def _vae(self) -> Any:
        from ec2face_core.backbone import load_backbone

        return load_backbone(self.config.backbone, ("vae",)).vae.to(_device())


@torch.no_grad()
def through_autoencoder(vae: Any, images: Tensor) -> Tensor:
    """Encode and decode images `b 3 h w` in [-1, 1]."""
    from ec2face_core.backbone import decode_latents, encode_images

    return decode_latents(vae, encode_images(vae, images))


# ---------------------------------------------------------------------------------------- EC²Face


class EC2Face(Painter):
    """A variant of EC²Face, or the base model without LoRA, which reads the text alone."""

    _led_by: Any = None  # consistency guidance, once it is asked for

    def paint(self, ids: Sequence[str]) -> Tensor:
        """Images `b 3 h w` in [0, 1], from each face's manifest caption and mask."""
        texts = [self.dataset.manifest_caption(name) for name in ids]
        masks = None
        if self.method != BASE:
            masks = [self.dataset.label_map(name) for name in ids]
        return self.sample(texts, masks, [picture_seed(self.config, name) for name in ids])

    def key(self) -> list[Any]:
        """Weights, sampling settings and code."""
        s = self.config.sampling
        b = self.config.backbone
        settings = [s.steps, s.guidance, s.text_guidance, s.mask_guidance, s.seed]
        settings += [s.mixed_precision, b.dtype, b.text_length, self.config.data.size]
        weights = [_backbone_digests(b), self._lora_digest()]
        if s.consistency:
            settings += [s.consistency, s.consistency_below, dataclasses.asdict(self.config.loss)]
            weights.append(path_digest(resolve(self.config.perception.parser)))
        return [self.method, settings, weights, code_digest(SHAPING)]

    def about(self, name: str) -> dict[str, str]:
        """The model, and the prompt and seed of a face."""
        return self.notice(self.dataset.manifest_caption(name), picture_seed(self.config, name))

    def notice(self, prompt: str, seed: int) -> dict[str, str]:
        """PNG text chunks of a picture that was sampled from a prompt and a seed."""
        lora = f", mask LoRA {self.method} {self._lora_digest()}" if self.method != BASE else ""
        return _chunks(f"EC2Face on {self.config.backbone.path}{lora}", prompt, seed)

    def check(self) -> None:
        """Raise a ConfigError if the LoRA is missing, or was trained with other settings."""
        if self.method == BASE:
            return
        try:
            find_mask_lora(self.config, self.method)
        except FileNotFoundError as error:
            seeds = max(1, self.config.seed - Config.seed + 1)
            raise ConfigError(
                f"no LoRA in {adapter_dir(self.config, self.method)}: `make reproduce "
                f"PROFILE={self.config.profile} TRAIN=1 SEEDS={seeds}` trains it"
            ) from error

    def sample(
        self, prompts: Sequence[str], masks: Sequence[Tensor] | None, seeds: Sequence[int]
    ) -> Tensor:
        """Images `b 3 h w` in [0, 1], each from its own noise, which is drawn on the CPU.

        Args:
            prompts: b texts.
            masks: b label maps `h w`; None: from the text alone.
            seeds: of the noise of each image.

        Raises:
            ConfigError: masks for the base model, or a LoRA that is missing.
        """
        if self.method == BASE and masks is not None:
            raise ConfigError("the base model has no mask branch: give no masks, or a variant")
        return self._sample(lambda pipe, **settings: pipe(list(prompts), masks, **settings), seeds)

    def edit(
        self,
        images: Tensor,
        masks: Tensor,
        new_masks: Tensor,
        prompts: Sequence[str],
        seeds: Sequence[int],
        margin: int | None = None,
    ) -> Tensor:
        """Edited images `b 3 h w` in [0, 1] (`painter/edits.py`).

        Args:
            images: `b 3 h w` in [0, 1].
            masks: label maps `b h w` of what they show.
            new_masks: label maps of what they are to show.
            prompts: b texts.
            seeds: of the noise of each image.
            margin: pixels around the change that are sampled, too; None: 1/32 of the side.

        Raises:
            ConfigError: the LoRA is missing.
        """
        given = (images, masks, new_masks, list(prompts), margin)
        return self._sample(lambda pipe, **settings: edit(pipe, *given, **settings), seeds)

    def _sample(self, call: Callable[..., Any], seeds: Sequence[int]) -> Tensor:
        """What a call of the pipeline gives with the configured settings."""
        self.check()
        s = self.config.sampling
        pipe = self._pipeline()
        options: dict[str, Any] = {}
        if s.consistency:
            options["consistency"] = self._guidance(pipe.vae)
        half = torch.autocast(_device().type, torch.bfloat16, enabled=s.mixed_precision == "bf16")
        with half, warnings.catch_warnings():
            if getattr(pipe, "told", False):  # captions are cut in every batch, said in the first
                warnings.simplefilter("ignore", LostWordsWarning)
            images = call(
                pipe,
                num_inference_steps=s.steps,
                guidance_scale=s.guidance,
                text_guidance=s.text_guidance,
                mask_guidance=s.mask_guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                **options,
            ).images
        pipe.told = True
        return images.float()

    def _guidance(self, vae: Any) -> Any:
        from ec2face_core.inference.consistency import ConsistencyGuidance

        if self._led_by is None:
            s = self.config.sampling
            given = (self.config, vae, s.consistency, s.consistency_below)
            self._led_by = ConsistencyGuidance.from_config(*given)
        return self._led_by

    def _pipeline(self) -> Any:
        """The pipeline with this variant's LoRA; the backbone is loaded once for all variants."""
        pipe = _load_pipeline(self.config.backbone, self.config.data.size)
        wanted = None
        if self.method != BASE:
            wanted = (str(adapter_dir(self.config, self.method)), self._lora_digest())
        current = getattr(pipe, "loaded", None)
        if current == wanted:
            return pipe
        if wanted:
            pipe.load_mask_lora(wanted[0])
        else:
            pipe.delete_adapters(ADAPTER)
        pipe.loaded = wanted
        return pipe

    def _lora_digest(self) -> str:
        if self.method == BASE:
            return ""
        return path_digest(adapter_dir(self.config, self.method) / LORA_FILE)


@functools.lru_cache(maxsize=1)
def _load_pipeline(backbone: BackboneConfig, size: int) -> Any:
    from ec2face_core.backbone import load_backbone
    from ec2face_core.pipeline import EC2FacePipeline

    parts = load_backbone(backbone).components()
    pipe = EC2FacePipeline(**parts, text_length=backbone.text_length, image_size=size)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(_device())


# ----------------------------------------------------------------------------- comparison systems


class ComparisonSystem(Painter):
    """A comparison system of Tables 1 and 2 in miniature."""

    def paint(self, ids: Sequence[str]) -> Tensor:
        """Images `b 3 h w` in [0, 1], from each face's manifest caption and mask."""
        texts = [self.dataset.manifest_caption(name) for name in ids]
        masks = torch.stack([self.dataset.label_map(name) for name in ids])
        seeds = [picture_seed(self.config, name) for name in ids]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self._system.generate(texts, masks, generators)

    def key(self) -> list[Any]:
        """Weights, what the system needs of the backbone and of CLIP, settings and code."""
        s = self.config.sampling
        settings = [s.steps, s.seed, s.guidance, s.text_guidance, s.mask_guidance]
        settings += [s.mixed_precision, self.config.data.size]
        backbone = resolve(self.config.backbone.path)
        files = [path for path in weight_files(self.config, self.method) if path.is_file()]
        files += [backbone / part for part in systems()[self.method].parts]
        files.append(resolve(self.config.perception.clip.removeprefix(LOCAL_DIR)))
        module = SYSTEMS[self.method].partition(".")[0]
        code = [f"ec2face_lab.baselines.{name}" for name in (*BLOCKS, module)]
        code += [*SHAPING, "ec2face_core.perception"]
        return [self.method, settings, [path_digest(path) for path in files], code_digest(code)]

    def about(self, name: str) -> dict[str, str]:
        """The model, and the prompt and seed of a face."""
        weights = path_digest(weights_dir(self.config, self.method) / WEIGHTS)
        model = f"{self.method} in miniature, weights {weights}"
        prompt = self.dataset.manifest_caption(name)
        return _chunks(model, prompt, picture_seed(self.config, name))

    def check(self) -> None:
        """Raise a FileNotFoundError if there are no weights."""
        if not (weights_dir(self.config, self.method) / WEIGHTS).is_file():
            load(self.config, self.method)  # whose error names the remedy

    @functools.cached_property
    def _system(self) -> Any:
        return load(self.config, self.method)


def weight_files(config: Config, system: str) -> list[Path]:
    """A comparison system's own weights and, if it shares a network with another, those."""
    folder = weights_dir(config, system)
    stages = systems()[system].shares[:1]
    return [folder / WEIGHTS, *(shared_file(folder, stage) for stage in stages)]


# ----------------------------------------------------------------------------------------- shared


def picture_seed(config: Config, name: str) -> int:
    """Seed of one picture's noise, from (sampling.seed, name) alone."""
    digest = hashlib.sha256(f"{config.sampling.seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _chunks(model: str, prompt: str, seed: int) -> dict[str, str]:
    return {
        "Disclaimer": NOTICE,
        "Model": model,
        "Prompt-SHA256": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "Seed": str(seed),
    }


def _backbone_digests(config: BackboneConfig) -> list[str]:
    folder = resolve(config.path)
    parts = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return [config.path, *(path_digest(part) for part in parts)]


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
