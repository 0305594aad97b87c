"""The pictures of a split by one method, and grids of seeds: generated once and kept.

- A stopped run is completed by the same call.
- A folder is named by a digest of everything that shapes its pictures (weights, sampling settings,
  captions, masks, code), so its content is never stale.
- Every sampled PNG says in its text chunks that it is synthetic, by which model, and from which
  prompt (as a hash) and seed.
- Pictures that a system's official code wrote, and that `evaluate --layout` adopted, take the place
  of its miniature's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ec2face_core.config import Config
from ec2face_core.data import open_dataset
from ec2face_core.runs import content_key

from ..baselines import PAPER, SYSTEMS, trained
from ..cache import claim, data_digest
from ..launch import run
from .painters import EC2Face, painter, picture_seed
from .png import load_pictures, read_picture, save_picture
from .scores import evaluated_ids, folder_features, is_scored, score_folder

if TYPE_CHECKING:
    from pandas import DataFrame


class PictureSet:
    """The pictures `{id}.png` of a split by one method.

    Args:
        config: data, weights, sampling and evaluation.
        method: one of `painters.METHODS`: a variant of EC²Face, `base`, a reference (`real`,
            `vae_round_trip`), or a comparison system.
        split: test, zero_shot, validation or train.
        limit: the first faces only; 0 takes `evaluation.limit`, and 0 there means all.
        folder: where this process puts the pictures, for `generate` with a shard; None: the
            official pictures of a system if there are any, else
            `runs/<profile>/images/<split>-<method>-<digest>`.

    Attributes:
        dataset: the faces of the split.
        ids: the faces that are evaluated.
        official: whether the pictures are those of a system's official code.

    Raises:
        ConfigError: there is no such method.
    """

    def __init__(
        self,
        config: Config,
        method: str,
        split: str,
        limit: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self.split = split
        self.dataset = open_dataset(config, split)
        self.ids = evaluated_ids(config, self.dataset, limit)
        self.painter = painter(config, method, self.dataset)
        self._folder = folder
        self.limit = limit
        adopted = official_pictures(config, method, split)
        self.official = folder is None and adopted.is_dir()
        if self.official:
            self._folder = adopted.resolve()

    @functools.cached_property
    def key(self) -> str:
        """Twelve hex digits of everything that shapes the pictures."""
        return content_key([data_digest(self.dataset), self.painter.key()])

    @property
    def folder(self) -> Path:
        """Where the pictures lie, or will lie."""
        name = f"{self.split}-{self.method}"
        return self._folder or self.config.run_dir / "images" / f"{name}-{self.key}"

    @property
    def missing(self) -> list[str]:
        """Ids whose pictures are not there yet."""
        if self.official:  # they were complete when they were adopted
            return []
        return [name for name in self.ids if not (self.folder / f"{name}.png").is_file()]

    def generate(self, shard: tuple[int, int] | None = None, progress: bool = True) -> Path:
        """Generate the missing pictures and return the folder.

        Args:
            shard: (rank, number of processes): generate every n-th picture in this process; None:
                all pictures, on as many processes as `sampling.num_processes` says.
            progress: show a bar.

        Raises:
            ConfigError: the folder holds other pictures, or a LoRA is missing.
            FileNotFoundError: a system's weights are missing; the message names the remedy.
        """
        if self.official:
            return self.folder
        if shard is None:
            generate_missing([self])
        rank, world = shard or (0, 1)
        lacking = set(self.missing)
        ids = [name for name in self.ids[rank::world] if name in lacking]
        if ids:
            self.painter.check()  # before there is a folder
        about = {"method": self.method, "split": self.split, "profile": self.config.profile}
        claim(self.folder, {"key": self.key, **about})
        title = f"{self.method}, {self.split}"
        size = self.config.sampling.batch_size
        for names in batches(ids, size, title, progress and rank == 0):
            for name, image in zip(names, self.painter.paint(names), strict=True):
                save_picture(self.folder / f"{name}.png", image, self.painter.about(name))
        return self.folder

    def load(self, ids: Sequence[str]) -> Tensor:
        """Pictures `b 3 h w` in [-1, 1]; the missing ones of the set are generated first."""
        return load_pictures(self.generate(), ids)

    def scores(self, progress: bool = True) -> DataFrame:
        """The rows of `scores.score_folder`; what is missing is generated first."""
        folder = self.generate(progress=progress)
        self._share_scoring(folder)
        return score_folder(folder, self.dataset, self.config, self.limit, progress)

    def _share_scoring(self, folder: Path) -> None:
        """Score on a rank for each GPU, where there are several."""
        processes = min(self.config.sampling.num_processes, torch.cuda.device_count())
        if processes < 2 or is_scored(folder, self.dataset, self.config, self.limit):
            return
        settings = folder.with_suffix(".yaml")
        self.config.save(settings)
        run(
            "ec2face_lab", "evaluate", "--config", str(settings), "--images", str(folder),
            "--split", self.split, "--limit", str(self.limit), "--scores-only",
            num_processes=processes,
        )  # fmt: skip

    def features(self, progress: bool = True) -> dict[str, np.ndarray]:
        """The features of `scores.folder_features`; what is missing is generated first."""
        folder = self.generate(progress=progress)
        return folder_features(folder, self.dataset, self.config, self.limit, progress)


def generate_missing(sets: Iterable[PictureSet]) -> None:
    """Generate in child processes what several sets lack, one start for each configuration.

    A start loads the models, which takes long, so it serves all sets of a configuration and split.
    Sets that are configured for one process, and references, are left to `PictureSet.generate`.

    Raises:
        ConfigError, FileNotFoundError: weights are missing; the message names the remedy.
        LaunchError: a child failed.
    """
    starts: dict[tuple[Config, str, int], list[str]] = {}
    for pictures in sets:
        if pictures.painter.slow and pictures.missing:
            pictures.painter.check()
            start = (pictures.config, pictures.split, pictures.limit)
            starts.setdefault(start, []).append(pictures.method)
    for (config, split, limit), methods in starts.items():
        processes = config.sampling.num_processes
        if torch.cuda.is_available():  # a rank of its own for each GPU, and no more
            processes = min(processes, torch.cuda.device_count())
        if processes > 1:
            settings = config.run_dir / "images" / f"{split}-{config.seed}.yaml"
            config.save(settings)
            run(
                "ec2face_lab", "generate", "--config", str(settings), "--method", *methods,
                "--split", split, "--limit", str(limit), "--quiet",
                num_processes=processes,
                title=f"{split} pictures by {', '.join(methods)}, on {processes} processes",
            )  # fmt: skip


def official_pictures(config: Config, method: str, split: str) -> Path:
    """Where `evaluate --layout` leaves a link to the pictures that the official code wrote."""
    return config.run_dir / "images" / f"{split}-{method}-official"


def available(config: Config, split: str) -> list[str]:
    """The systems that have weights, or adopted pictures of this split, in the tables' order.

    On zero-shot faces the weights of the newer systems do not count: sampling takes too long.
    """
    ready = [name for name in trained(config) if name in PAPER or split != "zero_shot"]
    return [
        name for name in SYSTEMS if name in ready or official_pictures(config, name, split).is_dir()
    ]


# ------------------------------------------------------------------------------------------ grids


def sample_grid(
    config: Config,
    method: str,
    name: str,
    prompts: Sequence[str],
    masks: Sequence[Tensor] | Tensor | None = None,
    seeds: int = 6,
    progress: bool = True,
) -> Tensor:
    """Several seeds of each condition, kept as PNG in `runs/<profile>/images/<name>-<digest>`.

    Args:
        config: weights and sampling.
        method: a variant of EC²Face, or `base`.
        name: of the grid; part of the pictures' seeds.
        prompts: one text for each row; "" for none.
        masks: one label map `h w` for each row; None: from the text alone.
        seeds: pictures of each condition.
        progress: show a bar.

    Returns:
        Images `rows seeds 3 h w` in [-1, 1].
    """
    model = EC2Face(config, method)
    labels = b"" if masks is None else np.stack([np.asarray(mask) for mask in masks]).tobytes()
    key = content_key([model.key(), list(prompts), hashlib.sha256(labels).hexdigest()])
    folder = config.run_dir / "images" / f"{name}-{key}"
    claim(folder, {"key": key, "method": method, "grid": name, "profile": config.profile})
    cells = [(row, k) for row in range(len(prompts)) for k in range(seeds)]
    files = {cell: folder / f"{cell[0]:02d}_{cell[1]:02d}.png" for cell in cells}
    missing = [cell for cell in cells if not files[cell].is_file()]
    for batch in batches(missing, config.sampling.batch_size, name, progress):
        numbers = [picture_seed(config, f"{name}/{row}/{k}") for row, k in batch]
        texts = [prompts[row] for row, _ in batch]
        maps = None if masks is None else [masks[row] for row, _ in batch]
        images = model.sample(texts, maps, numbers)
        for cell, image, text, number in zip(batch, images, texts, numbers, strict=True):
            save_picture(files[cell], image, model.notice(text, number))
    images = torch.stack([read_picture(files[cell]) for cell in cells])
    return images.unflatten(0, (len(prompts), seeds))


def batches(items: Sequence[Any], size: int, title: str, show: bool) -> Iterator[Sequence[Any]]:
    """Batches with a progress bar, which is left out where there is nothing to do."""
    from tqdm.auto import tqdm

    parts = [items[i : i + size] for i in range(0, len(items), size)]
    hidden = not (show and parts)
    return iter(tqdm(parts, desc=title, unit="batch", mininterval=1, disable=hidden))
