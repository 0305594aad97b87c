"""What the comparison systems have in common: data, training by time, weights, sampling.

Chosen here:
- Equal training time is what makes systems comparable that differ in everything else, so a stage
  of training ends after `seconds` of optimisation, and its schedules follow the fraction of time
  spent. Seconds are those of one core, which other work on the machine does not shorten. A stopped
  run resumes from its last checkpoint with the seconds it had spent.
- Every system may spend the same, as the profile's `baselines` says: `foundation_seconds` on what
  it stands on and `seconds` on its task. Two systems share what they stand on; it is trained once,
  on the faces that the base of EC²Face saw, and frozen. Who stands on nothing spends both on its
  task.
- All training faces are held in memory once, as bytes.
- Every system reads captions through the guiding CLIP only, as this world has no other reader
  (`reading.py`).
"""

from __future__ import annotations

import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ec2face_core.config import Config, ConfigError, resolve
from ec2face_core.data import FaceDataset
from ec2face_core.runs import (
    add_metrics,
    cut_metrics,
    newest_checkpoint,
    path_digest,
    save_checkpoint,
)

from ..world.pretrain import SEED
from ..world.sources import FolderWorld, ProceduralWorld, sentence
from . import WEIGHTS
from .reading import coloured, guiding_clip, one_hot, unknown_words
from .storage import read_weights, shared_file, shared_weights, write_weights

SIDE = 64  # pixels, of every system's networks

CHECKPOINT_SECONDS = 60.0  # of optimisation between two checkpoints


class System(ABC):
    """A face generator with the inputs of EC²Face.

    Args:
        config: the profile: where faces, autoencoder and critics are; sampling steps.

    Attributes:
        name: row of Tables 1 and 2.
        shares: (stage of `prepare`, its network in `networks`), where a system shares one.
        takes: which of `text` and `mask` may be given alone; every system takes both together.
        own_masks: whether `baselines.published_masks` changes what the system sees of a mask.
        maps: channels of a mask as the system sees it.
        parts: networks of EC²Face's backbone that sampling needs, frozen, in the backbone's folder.
        clip: reads captions (and pictures); frozen.
        networks: everything that training made and sampling needs, by name.
    """

    name: str
    shares: tuple[str, str] | tuple[()] = ()
    takes: frozenset[str] = frozenset({"text", "mask"})
    own_masks: bool = False
    maps: int = 19
    parts: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        if config.data.size != SIDE:
            raise ConfigError(
                f"{self.name} in miniature draws {SIDE} px, not {config.data.size}: run the "
                "official repository and score its pictures with evaluate --images --adapter"
            )
        self.config, self.clip = config, guiding_clip(config)
        self.networks = nn.ModuleDict()

    def prepare(self, shared_dir: Path, max_steps: int = 0) -> None:
        """Fill in what the system shares with another one from `shared_dir`, and freeze it.

        Where it is not there it is trained; the same call again resumes. Nothing to do for a system
        that shares nothing.
        """
        if self.shares:
            stage, key = self.shares
            path, net = shared_dir / f"{stage}.safetensors", self.networks[key]
            shared_weights(path, net, lambda: self.pretrain(shared_dir, max_steps))

    def pretrain(self, shared_dir: Path, max_steps: int) -> None:
        """Train the shared network in place, of a system that shares one.

        Args:
            shared_dir: holds the checkpoints of a training that was stopped.
        """
        raise NotImplementedError(f"{self.name} shares nothing")

    @classmethod
    def budget(cls, config: Config) -> float:
        """Seconds that `fit` may spend, so that every system spends the same in all."""
        own = config.baselines
        return own.seconds if cls.shares else own.foundation_seconds + own.seconds

    @classmethod
    def grounds(cls, config: Config, folder: Path) -> dict[str, Path]:
        """What a training in `folder` stands on and leaves alone, by its name in `about.json`."""
        return {"shared": shared_file(folder, cls.shares[0])} if cls.shares else {}

    @abstractmethod
    def fit(
        self,
        dataset: FaceDataset,
        run_dir: Path,
        seconds: float,
        seed: int = 42,
        max_steps: int = 0,
    ) -> None:
        """Train from nothing within `seconds` of optimisation; the same call again resumes.

        Args:
            run_dir: holds a folder for each stage; `run_dir.parent / "shared"` what `prepare` made.
            max_steps: of each stage; 0: no limit.
        """

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str] | None,
        masks: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """What `generate` does, of conditions that it has looked at, without gradients."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str] | None,
        masks: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Images `b 3 h w` in [0, 1], each drawn from its own generator.

        Warns about words that the vocabulary lacks, by name.

        Args:
            prompts: b captions, or None: mask alone.
            masks: label maps `b h w` int64, or None: text alone.

        Raises:
            ValueError: a condition that the system cannot do without is missing, or there are not
                as many of one thing as of the other.
        """
        given = {"text": prompts, "mask": masks}
        counts = {what: len(values) for what, values in given.items() if values is not None}
        if len(counts) < 2 and not counts.keys() & self.takes:
            wants = "a text, a mask, or both" if self.takes else "a text and a mask"
            raise ValueError(f"{self.name} needs {wants}")
        if set(counts.values()) != {len(generators)}:
            raise ValueError(f"{counts} for {len(generators)} generators: give one of each a face")
        if prompts is not None and (strange := unknown_words(self.clip, prompts)):
            warnings.warn(
                f"{self.name}: no caption of its training has {', '.join(strange)}; "
                "such words are read letter by letter",
                stacklevel=3,  # `no_grad` lies between
            )
        return self.sample(prompts, masks, generators)

    def see(self, masks: Tensor) -> Tensor:
        """Label maps `b h w` -> one-hot `b 19 h w`, or palette colours `b 3 h w` in [-1, 1]."""
        return one_hot(masks) if self.maps == 19 else coloured(masks)

    def parameters(self) -> int:
        """Trained weights that sampling needs."""
        return sum(p.numel() for p in self.networks.parameters())

    def save(self, folder: Path) -> None:
        """Write `folder/weights.safetensors`, and what is shared beside it if it is not there."""
        write_weights(folder / WEIGHTS, self._own())
        for path, net in self._shared(folder):
            if not path.is_file():
                write_weights(path, net)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there are no weights; the message names the remedy.
            ConfigError: they were trained on another network than the one that they would stand on.
        """
        made = Path(folder) / "provenance.json"
        about = json.loads(made.read_text())["parameters"] if made.is_file() else {}
        trained_on = about.get("stands_on", {})
        for name, path in self.grounds(self.config, Path(folder)).items():
            if path.exists() and trained_on.get(name) not in (None, path_digest(path)):
                raise ConfigError(
                    f"{folder} was trained on another network than {path}: train it again"
                )
        for path, net in ((Path(folder) / WEIGHTS, self._own()), *self._shared(Path(folder))):
            if not path.is_file():
                how = f"--profile {self.config.profile} --only {self.name}"
                raise FileNotFoundError(
                    f"no weights of {self.name} at {path}: "
                    f"`python -m ec2face_lab.study.comparison {how}` trains it, as does TRAIN=1"
                )
            read_weights(path, net)
        self.networks.requires_grad_(False).eval()

    def _own(self) -> nn.ModuleDict:
        return nn.ModuleDict({k: v for k, v in self.networks.items() if k not in self.shares})

    def _shared(self, folder: Path) -> list[tuple[Path, nn.Module]]:
        """File and network of what is shared: none, or one."""
        if not self.shares:
            return []
        stage, key = self.shares
        return [(shared_file(folder, stage), self.networks[key])]


@dataclass
class Faces:
    """Every face of a split in memory; `batch` draws from it.

    images: `n 3 h w` uint8; label_maps: `n h w` uint8; captions: n tuples of sentences.
    """

    images: Tensor
    label_maps: Tensor
    captions: list[tuple[str, ...]]

    @classmethod
    def read(cls, dataset: FaceDataset) -> Faces:
        """Read a dataset once."""
        images = [((dataset.image(n) + 1) * 127.5).round().byte() for n in dataset.ids]
        maps = [dataset.label_map(n).byte() for n in dataset.ids]
        return cls(
            torch.stack(images), torch.stack(maps), [dataset.captions(n) for n in dataset.ids]
        )

    @classmethod
    def of_world(cls, config: Config) -> Faces:
        """The faces that the base of EC²Face was trained on, `baselines.pool` of them."""
        data, pool = config.data, config.baselines.pool
        world = ProceduralWorld() if data.procedural else FolderWorld(resolve(data.root))
        images, maps, texts = [], [], []
        for number in range(-(-pool // 64)):
            drawn, told = world.scenes(SEED, 10**6 + number * 64, 64)
            images.append(((drawn.image + 1) * 127.5).round().byte())
            maps.append(drawn.label_map.byte())
            texts += [tuple(sentence(telling, seed) for seed in range(4)) for telling in told]
        return cls(torch.cat(images)[:pool], torch.cat(maps)[:pool], texts[:pool])

    def draw(self, size: int, generator: torch.Generator) -> tuple[list[int], list[str]]:
        """Rows of random faces, and a caption each."""
        rows = torch.randint(len(self.images), (size,), generator=generator).tolist()
        which = torch.rand(size, generator=generator).tolist()
        texts = [
            self.captions[i][int(u * len(self.captions[i]))]
            for i, u in zip(rows, which, strict=True)
        ]
        return rows, texts

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Random faces: images `b 3 h w` in [-1, 1], label maps `b h w` int64, a caption each."""
        rows, texts = self.draw(size, generator)
        return self.images[rows].float() / 127.5 - 1, self.label_maps[rows].long(), texts


def train_stage(
    name: str,
    step: Callable[[int, float, torch.Generator], Mapping[str, Tensor | float]],
    state: Mapping[str, nn.Module | torch.optim.Optimizer],
    run_dir: Path,
    seconds: float,
    seed: int,
    max_steps: int = 0,
) -> None:
    """Call `step` until `seconds` of a core are spent; checkpoint, journal, bar, resume.

    Args:
        name: of the stage, for its folder `run_dir/name` and the bar.
        step: (number, fraction of the time spent, generator of this step) -> values for the
            journal. It updates the weights itself. Its generator is a function of seed and number,
            so a resumed run goes on as the stopped one would have.
        state: modules and optimisers to keep in checkpoints, by name.
        max_steps: end earlier, after so many steps; 0: no limit.
    """
    from tqdm.auto import tqdm

    folder = run_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    number, spent = 0, 0.0
    if found := newest_checkpoint(folder / "checkpoints"):
        _restore(state, found[0])
        number, spent = found[1]["step"], found[1]["seconds"]
    cut_metrics(folder, number)
    saved, rows = spent, []

    def keep() -> None:
        add_metrics(folder, rows)
        rows.clear()
        save_checkpoint(folder / "checkpoints", number, _tensors(state), {"seconds": spent}, keep=1)

    bar = tqdm(total=round(seconds), initial=round(spent), desc=name, unit="s", mininterval=1)
    while spent < seconds and not (max_steps and number >= max_steps):
        began = time.process_time()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        values = step(number, min(1.0, spent / seconds), generator)
        number += 1
        spent += time.process_time() - began
        rows.append({"step": number, "seconds": spent} | {k: float(v) for k, v in values.items()})
        bar.update(min(round(spent), bar.total) - bar.n)
        if spent - saved > CHECKPOINT_SECONDS:
            keep()
            saved = spent
    if rows:
        keep()
    bar.close()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights as a function of the seed, with the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------ checkpoints


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flat tensors of modules and optimisers (whose `step` is a tensor, too)."""
    flat: dict[str, Tensor] = {}
    for name, part in state.items():
        if isinstance(part, nn.Module):
            flat |= {f"{name}/{k}": v for k, v in part.state_dict().items()}
        else:
            for i, values in part.state_dict()["state"].items():
                flat |= {f"{name}/{i}/{k}": torch.as_tensor(v) for k, v in values.items()}
    return {k: v.clone() for k, v in flat.items()}


def _restore(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, part in state.items():
        own = {
            k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")
        }
        if isinstance(part, nn.Module):
            part.load_state_dict(own)
            continue
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in own.items():
            i, _, what = key.partition("/")
            slots.setdefault(int(i), {})[what] = value
        part.load_state_dict(part.state_dict() | {"state": slots})
        for p, values in part.state.items():  # fused steps take for granted that strides agree
            for key, value in values.items():
                values[key] = torch.empty_like(p).copy_(value) if value.shape == p.shape else value
