"""What the comparison systems have in common: interface, training by time, weights, faces.

Chosen here:
- Systems that differ in everything else are compared at equal training time: a stage of training
  ends after so many seconds of optimisation, and its learning rate follows the share of the time
  that is spent. Seconds are those of one core, which other work on the machine does not shorten.
- Every system may spend the same, as the profile's `baselines` says: `foundation_seconds` on its
  foundation and `seconds` on its task. A foundation that two systems share is trained once, on the
  faces that the base of EC²Face saw, and frozen. A system without one spends both on its task.
- All training faces are held in memory once, as bytes.
- Every system reads captions through the guiding CLIP only (`encoders.py`).
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ec2face_core.attributes import one_hot, palette_image
from ec2face_core.config import Config, ConfigError
from ec2face_core.data import FaceDataset
from ec2face_core.perception import ClipScorer
from ec2face_core.runs import path_digest

from ..world.pool import POOL
from ..world.pretrain import SEED, parameters_of
from ..world.sources import caption_of, source_of
from ..world.training import Step, train
from . import WEIGHTS
from .encoders import unknown_words
from .int8_weights import read_weights, shared_file, shared_weights, write_weights

SIDES = (64, 128)  # pixels, of the pictures that systems are written for

Texts = Sequence[str] | None

Masks = Tensor | None

Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class Run:
    """A training of a system.

    Attributes:
        folder: holds a folder for each stage; what is shared lies in `shared` beside it.
        seconds: of optimisation, over all stages.
        seed: of weights and noise.
        max_steps: of each stage; 0: no limit.
        device: of the training; on a GPU seconds are those of the clock.
    """

    folder: Path
    seconds: float
    seed: int = 42
    max_steps: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    def stage(self, name: str, step: Step, state: Mapping[str, Any], share: float = 1.0) -> None:
        """Train one stage.

        Args:
            name: of its folder and its progress bar.
            step: as `training.train` calls it.
            state: modules and optimisers to keep in checkpoints, by name.
            share: of the run's seconds.
        """
        seconds = share * self.seconds
        train(
            self.folder / name, step, state, self.seed,
            steps=self.max_steps, seconds=seconds, device=self.device,
        )  # fmt: skip


class System(ABC):
    """A face generator with the inputs of EC²Face.

    Args:
        config: the profile: where faces, autoencoder and perception models are; sampling steps.
        device: where it is trained and samples; None: this process's GPU if there is one, else the
            CPU.

    Attributes:
        name: row of Tables 1 and 2.
        shares: (stage of `prepare`, its network in `networks`), where a system shares one.
        takes: which of `text` and `mask` may be given alone; every system takes both together.
        own_masks: whether `baselines.published_masks` changes what the system sees of a mask.
        maps: channels of a mask as the system sees it.
        parts: networks of EC²Face's backbone that sampling needs, frozen, in the backbone's folder.
        clip: reads captions (and pictures); frozen.
        networks: every trained network that sampling needs, by name.
        size: side of the pictures in pixels.
    """

    name: str
    shares: tuple[str, str] | tuple[()] = ()
    takes: frozenset[str] = frozenset({"text", "mask"})
    own_masks: bool = False
    maps: int = 19
    parts: tuple[str, ...] = ()

    def __init__(self, config: Config, device: torch.device | str | None = None) -> None:
        if config.data.size not in SIDES:
            sides = " or ".join(map(str, SIDES))
            raise ConfigError(
                f"{self.name} in miniature makes pictures of {sides} px, not {config.data.size}: "
                "run the official repository and score its pictures with evaluate --images"
            )
        self.config = config
        self.size = config.data.size
        self.device = this_device() if device is None else torch.device(device)
        self.clip = ClipScorer.from_config(config.perception, device=self.device)
        self.networks = nn.ModuleDict()

    @abstractmethod
    def build(self, seed: int) -> None:
        """Fill `networks` with random weights on the device, a function of the seed."""

    # ------------------------------------------------------------------------------- training

    def prepare(self, shared_dir: Path, max_steps: int = 0) -> None:
        """Fill in the shared network from `shared_dir`, and freeze it.

        A missing one is trained first; the same call again resumes. A system that shares nothing
        does nothing.
        """
        if self.shares:
            stage, key = self.shares
            own = self.config.baselines
            seconds = own.foundation_seconds
            run = Run(shared_dir, seconds, self.config.seed, max_steps, self.device)
            path = shared_dir / f"{stage}.safetensors"
            shared_weights(path, self.networks[key], lambda: self.pretrain(run))

    def pretrain(self, run: Run) -> None:
        """Train the shared network in place, of a system that shares one."""
        raise NotImplementedError(f"{self.name} shares nothing")

    def fit(self, dataset: FaceDataset, run: Run) -> None:
        """Train from random weights, then freeze; the same call again resumes."""
        self.build(run.seed)
        self.prepare(run.folder.parent / "shared", run.max_steps)
        run = dataclasses.replace(run, device=self.device)
        self.train(Faces.read(dataset).to(self.device), run)
        self.networks.requires_grad_(False).eval()

    @abstractmethod
    def train(self, faces: Faces, run: Run) -> None:
        """Train what is not shared, in one or more stages of `run`."""

    @classmethod
    def budget(cls, config: Config) -> float:
        """Seconds that `fit` may spend, so that every system spends the same in all."""
        own = config.baselines
        return own.seconds if cls.shares else own.foundation_seconds + own.seconds

    @classmethod
    def frozen_files(cls, config: Config, folder: Path) -> dict[str, Path]:
        """Frozen weights that a training in `folder` builds on, by their name in `about.json`."""
        return {"shared": shared_file(folder, cls.shares[0])} if cls.shares else {}

    # ------------------------------------------------------------------------------- sampling

    @abstractmethod
    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """What `generate` does with checked conditions, without gradients."""

    @torch.no_grad()
    def generate(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Generate images `b 3 h w` in [0, 1] on the device.

        Warns about words that the vocabulary lacks, by name.

        Args:
            prompts: b captions, or None: mask alone.
            masks: label maps `b h w` int64, or None: text alone.
            generators: one for each image, of the CPU, so that neither batch nor order counts.

        Raises:
            ValueError: a condition that the system cannot do without is missing, or the conditions
                and generators differ in number.
        """
        given = {"text": prompts, "mask": masks}
        counts = {kind: len(values) for kind, values in given.items() if values is not None}
        if len(counts) < 2 and not counts.keys() & self.takes:
            needs = "a text, a mask, or both" if self.takes else "a text and a mask"
            raise ValueError(f"{self.name} needs {needs}")
        if set(counts.values()) != {len(generators)}:
            raise ValueError(f"{counts} for {len(generators)} generators: give one of each a face")
        if prompts is not None and (strange := unknown_words(self.clip, prompts)):
            warnings.warn(
                f"{self.name}: no caption of its training has {', '.join(strange)}; "
                "such words are read letter by letter",
                stacklevel=3,  # `no_grad` lies between
            )
        masks = None if masks is None else masks.to(self.device)
        return self.sample(prompts, masks, generators)

    def see(self, masks: Tensor) -> Tensor:
        """Label maps `b h w` -> one-hot `b 19 h w`, or palette colours `b 3 h w` in [-1, 1]."""
        return one_hot(masks) if self.maps == 19 else palette_image(masks)

    # -------------------------------------------------------------------------------- weights

    def parameters(self) -> int:
        """Trained weights that sampling needs."""
        return sum(p.numel() for p in self.networks.parameters())

    def save(self, folder: Path) -> None:
        """Write `folder/weights.safetensors`, and what is shared beside it if it is not there."""
        for path, net in self._files(folder).items():
            if path.name == WEIGHTS or not path.is_file():
                write_weights(path, net)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there are no weights; the message names the remedy.
            ConfigError: they were trained on other frozen weights than those that are there.
        """
        trained_on = parameters_of(folder).get("stands_on", {})
        for name, path in self.frozen_files(self.config, folder).items():
            if path.exists() and trained_on.get(name) not in (None, path_digest(path)):
                raise ConfigError(
                    f"{folder} was trained on another network than {path}: train it again"
                )
        for path, net in self._files(folder).items():
            if not path.is_file():
                options = f"--profile {self.config.profile} --only {self.name}"
                raise FileNotFoundError(
                    f"no weights of {self.name} at {path}: "
                    f"`python -m ec2face_lab baselines {options}` trains it, as does TRAIN=1"
                )
            read_weights(path, net)
        self.networks.requires_grad_(False).eval()

    def _files(self, folder: Path) -> dict[Path, nn.Module]:
        """The networks of each file: the system's own, and the shared one if there is one."""
        own = nn.ModuleDict({k: v for k, v in self.networks.items() if k not in self.shares})
        files = {folder / WEIGHTS: own}
        if self.shares:
            stage, key = self.shares
            files[shared_file(folder, stage)] = self.networks[key]
        return files


@dataclass
class Faces:
    """The faces of a split in memory.

    images: `n 3 h w` uint8; label_maps: `n h w` uint8; captions: n tuples of sentences.
    """

    images: Tensor
    label_maps: Tensor
    captions: list[tuple[str, ...]]

    @classmethod
    def read(cls, dataset: FaceDataset) -> Faces:
        """Read a dataset once."""
        images = [_bytes(dataset.image(n)) for n in dataset.ids]
        maps = [dataset.label_map(n).byte() for n in dataset.ids]
        captions = [dataset.captions(n) for n in dataset.ids]
        return cls(torch.stack(images), torch.stack(maps), captions)

    @classmethod
    def of_foundation(cls, config: Config) -> Faces:
        """The faces that the base of EC²Face was trained on, `baselines.pool` of them."""
        pool = config.baselines.pool
        source = source_of(config.data)
        images = []
        maps = []
        captions = []
        for start in range(0, pool, 64):
            shown, descriptions = source.scenes(SEED, POOL + start, 64)
            images.append(_bytes(shown.image))
            maps.append(shown.label_map.byte())
            captions += [tuple(caption_of(d, seed) for seed in range(4)) for d in descriptions]
        return cls(torch.cat(images)[:pool], torch.cat(maps)[:pool], captions[:pool])

    def to(self, device: torch.device) -> Faces:
        """The same faces on a device, that of the generators of `sample` and `batch`."""
        return Faces(self.images.to(device), self.label_maps.to(device), self.captions)

    def sample(self, size: int, generator: torch.Generator) -> tuple[list[int], list[str]]:
        """Rows of random faces, and a caption of each."""
        device = generator.device
        count = len(self.images)
        rows = torch.randint(count, (size,), generator=generator, device=device).tolist()
        shares = torch.rand(size, generator=generator, device=device).tolist()
        captions = [self.captions[i] for i in rows]
        return rows, [some[int(u * len(some))] for some, u in zip(captions, shares, strict=True)]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Random faces: images `b 3 h w` in [-1, 1], label maps `b h w` int64, a caption each."""
        rows, texts = self.sample(size, generator)
        return self.images[rows].float() / 127.5 - 1, self.label_maps[rows].long(), texts


def this_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().byte()
