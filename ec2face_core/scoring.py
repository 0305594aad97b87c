"""Score a folder of pictures against their faces, picture by picture.

Chosen here:
- Every score is kept for each picture, so that intervals and paired differences can be bootstrapped
  over images afterwards. Text and mask are scored by two critics: the one that guided training, and
  an independent one.
- Scores lie in `runs/<profile>/scores`, named by the content of pictures, faces, critics and code:
  a second run reads them, and a changed picture is scored again.
- A folder is checked whole before anything is scored: one report of every bad file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attributes import CLASSES
from .config import Config, resolve
from .datasets import DataError, FaceDataset, Report, open_dataset
from .generate import code_digest, data_digest, evaluated_ids, read_picture
from .metrics import Lpips, Niqe, mask_counts
from .perception import LOCAL_DIR, ClipScorer, FaceParser
from .results import path_digest
from .validation import IMAGE_SUFFIXES, files_by_id, parallel, read_image

if TYPE_CHECKING:
    from pandas import DataFrame

CRITICS = ("independent", "guiding")
BATCH = 32  # pictures scored at once
PRISTINE = 1000  # training faces that NIQE is refitted to
SCORING = ("attributes", "metrics", "perception", "scoring")  # modules that decide a score


@dataclass(frozen=True)
class Critics:
    """Everything that scores, loaded once; parsers and CLIPs by name of `CRITICS`."""

    parsers: Mapping[str, FaceParser]
    clips: Mapping[str, ClipScorer]
    lpips: Lpips
    niqe: Niqe
    device: torch.device


def load_critics(config: Config) -> Critics:
    """The critics of a configuration; the same ones at every call in this process.

    Raises:
        FileNotFoundError: weights are missing; the message says where they come from.
    """
    return _critics(
        Config(data=config.data, perception=config.perception, evaluation=config.evaluation)
    )


@functools.lru_cache(maxsize=1)
def _critics(config: Config) -> Critics:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose = {critic: critic == "independent" for critic in CRITICS}
    niqe = Niqe(config)
    if config.evaluation.niqe_refit:
        train = open_dataset(config, "train")
        niqe.fit(torch.stack(list(parallel(train.image, train.ids[:PRISTINE]))))
    return Critics(
        {k: FaceParser.from_config(config.perception, s, device) for k, s in choose.items()},
        {k: ClipScorer.from_config(config.perception, s, device) for k, s in choose.items()},
        Lpips(config, device),
        niqe,
        device,
    )


def score_folder(
    images_dir: Path | str,
    dataset: FaceDataset,
    config: Config,
    limit: int = 0,
    progress: bool = True,
) -> DataFrame:
    """Score the pictures `{id}.*` of a folder against their faces.

    Args:
        images_dir: pictures as large as the dataset's; other files than pictures are ignored.
        dataset: gives masks, manifest captions and the real images.
        limit: the first faces only; 0 takes `evaluation.limit`, and 0 there means all.

    Returns:
        One row a picture: id; text_<critic> (percent); lpips (against the real image); niqe;
        support_<class> and correct_<critic>_<class> (pixels).

    Raises:
        DataError: pictures are missing, unreadable, of another size or of unknown faces; one
            report names them all.
    """
    import pandas as pd

    folder = resolve(images_dir)
    ids = evaluated_ids(config, dataset, limit)
    files, report = _named_files(folder, dataset, ids)
    if report.problems:  # say at once what else is wrong
        _check_pictures(report, files, config.data.size)
    cache = config.run_dir / "scores" / f"{folder.name}-{_score_key(files, dataset, config)}.csv"
    if cache.is_file():
        return pd.read_csv(cache, dtype={"id": str}, float_precision="round_trip")
    _check_pictures(report, files, config.data.size)

    from tqdm.auto import tqdm

    critics, parts = load_critics(config), []
    starts = range(0, len(ids), BATCH)
    for start in tqdm(starts, f"scoring {folder.name}", mininterval=1, disable=not progress):
        parts.append(_score(critics, files, ids[start : start + BATCH], dataset))
    table = pd.DataFrame(torch.cat(parts).numpy(), columns=_columns())
    table = table.astype({name: int for name in _columns() if name.startswith(("sup", "cor"))})
    table.insert(0, "id", ids)
    write_frame(cache, table)
    return table


def counts(per_image: DataFrame, critic: str) -> tuple[Any, Any]:
    """(correct, support) of the rows of `score_folder`, each `(n, 19)`."""
    correct = per_image[[f"correct_{critic}_{c}" for c in CLASSES]]
    return correct.to_numpy(), per_image[[f"support_{c}" for c in CLASSES]].to_numpy()


def _columns() -> list[str]:
    names = [f"text_{critic}" for critic in CRITICS] + ["lpips", "niqe"]
    names += [f"support_{c}" for c in CLASSES]
    return names + [f"correct_{critic}_{c}" for critic in CRITICS for c in CLASSES]


@torch.no_grad()
def _score(
    critics: Critics,
    files: Mapping[str, Path],
    ids: Sequence[str],
    dataset: FaceDataset,
) -> Tensor:
    """Scores of a few pictures in the order of `_columns`, float64."""
    images = torch.stack([read_picture(files[name]) for name in ids]).to(critics.device)
    real = torch.stack([dataset.image(name) for name in ids]).to(critics.device)
    target = torch.stack([dataset.label_map(name) for name in ids]).to(critics.device)
    captions = [dataset.manifest_caption(name) for name in ids]
    columns = [critics.clips[critic].score(images, captions) for critic in CRITICS]
    columns += [critics.lpips(images, real), critics.niqe(images)]
    found = [mask_counts(critics.parsers[critic].parse(images), target) for critic in CRITICS]
    tables = [found[0][1], *(correct for correct, _ in found)]
    columns = [column.double().cpu()[:, None] for column in columns]
    return torch.cat(columns + [table.double().cpu() for table in tables], dim=1)


def _named_files(
    folder: Path, dataset: FaceDataset, ids: Sequence[str]
) -> tuple[dict[str, Path], Report]:
    """The picture of each id that has one, and a report of missing ones and of those of no face."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of pictures")
    report, known = Report(folder, len(ids)), set(dataset.ids)
    files = files_by_id(folder, IMAGE_SUFFIXES, report)
    for name in ids:
        if name not in files:
            report.add(folder / f"{name}.png", "missing")
    for name, path in files.items():
        if name not in known:
            report.add(path, f"no face {name} in {dataset.root.name}, split {dataset.split}")
    return {name: files[name] for name in ids if name in files}, report


def _check_pictures(report: Report, files: Mapping[str, Path], size: int) -> None:
    """Add every unreadable picture and every one that is not `size` pixels wide; then raise."""

    def check(path: Path) -> str:
        try:
            width = read_image(path).width
        except DataError as error:
            return str(error)
        return "" if width == size else f"wrong size {width}, data.size is {size}"

    for path, reason in zip(files.values(), parallel(check, files.values()), strict=True):
        if reason:
            report.add(path, reason)
    report.raise_if_bad()


def _score_key(files: Mapping[str, Path], dataset: FaceDataset, config: Config) -> str:
    """Twelve hex digits of pictures, faces, critics, settings and code."""
    about = [critics_digest(config), data_digest(dataset), list(files)]
    about.append(list(parallel(path_digest, files.values())))
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def critics_digest(config: Config) -> str:
    """Twelve hex digits of the critics' weights and settings, and of the code that scores."""
    p, e = config.perception, config.evaluation
    names = (p.parser, p.scoring_parser, p.clip, p.scoring_clip)
    about: list[Any] = [names, [path_digest(resolve(n.removeprefix(LOCAL_DIR))) for n in names]]
    about += [p.parser_size, e.lpips, e.niqe_block, e.niqe_refit, code_digest(SCORING)]
    about += [data_digest(open_dataset(config, "train")) if e.niqe_refit else ""]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def write_frame(path: Path, table: DataFrame) -> None:
    """Write a table as CSV in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    table.to_csv(part, index=False)
    part.replace(path)
