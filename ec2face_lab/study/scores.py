"""Scores of folders of pictures: CLIP score, LPIPS, NIQE and the pixel counts of mask accuracy.

The pictures are scored in parts of `BATCH`, each of which is kept as soon as it is computed: a
stopped run is completed by the same call, and several processes share the work (`score_share`).

Parsers and CLIPs come in pairs: the `guiding` ones are losses of training, the `independent` ones
only evaluate. Scores are kept in `runs/<profile>/scores` by content, and beside them the CLIPs'
features of the pictures. Metrics are computed without gradients; images are `b 3 h w` in [-1, 1].
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ec2face_core.attributes import CLASSES, pixel_counts
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset, files_by_id, open_dataset, report_missing
from ec2face_core.guards.checks import check_number
from ec2face_core.io.paths import resolve
from ec2face_core.io.pictures import IMAGE_SUFFIXES, read_image
from ec2face_core.io.report import DataError, Report
from ec2face_core.io.texts import LostWordsWarning, describe_loss
from ec2face_core.metrics import mask_counts
from ec2face_core.perception import LOCAL_DIR, ClipScorer, FaceParser
from ec2face_core.runs import content_key, parallel, path_digest, whole_file

from ..cache import code_digest, data_digest, is_whole, record_hash, write_frame
from ..prepare.pairs import paired
from ..workers import in_processes
from .png import read_picture
from .quality import Lpips, Niqe

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..world.facts import FactNet


ROLES = ("independent", "guiding")  # of the two pairs of perception models: evaluators, guides

FACT = "fact_"  # begins the columns of facts

BATCH = 32  # pictures scored at once

SPARE_CORES = 4  # of a process: with so many NIQE has worker processes

PRISTINE = 1000  # training faces that NIQE is refitted to

SCORING = (  # modules that decide a score
    "ec2face_core.attributes",
    "ec2face_core.metrics",
    "ec2face_core.perception",
    "ec2face_lab.study.quality",
    "ec2face_lab.study.scores",
)

FACTS_CODE = ("ec2face_lab.prepare.captions", "ec2face_lab.world.facts")


@dataclass(frozen=True)
class PerceptionModels:
    """Everything that scores, loaded once; parsers and CLIPs by their role, one of `ROLES`.

    facts: tells the facts that captions mention, or None where `perception.scoring_facts` is empty.
    """

    parsers: Mapping[str, FaceParser]
    clips: Mapping[str, ClipScorer]
    lpips: Lpips
    niqe: Niqe
    facts: FactNet | None
    device: torch.device


def perception_models(config: Config) -> PerceptionModels:
    """The perception models of a configuration; the same objects at every call in this process.

    Raises:
        FileNotFoundError: weights are missing; the message says where they come from.
    """
    return _load(
        Config(data=config.data, perception=config.perception, evaluation=config.evaluation)
    )


@functools.lru_cache(maxsize=1)
def _load(config: Config) -> PerceptionModels:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scoring = {role: role == "independent" for role in ROLES}
    niqe = Niqe(config)
    if config.evaluation.niqe_refit:
        train = open_dataset(config, "train")
        niqe.fit(torch.stack(list(parallel(train.image, train.ids[:PRISTINE]))))
    return PerceptionModels(
        {k: FaceParser.from_config(config.perception, s, device) for k, s in scoring.items()},
        {k: ClipScorer.from_config(config.perception, s, device) for k, s in scoring.items()},
        Lpips(config, device),
        niqe,
        _load_facts(config, device),
        device,
    )


def _load_facts(config: Config, device: torch.device) -> FactNet | None:
    if not config.perception.scoring_facts:
        return None
    from ..world.facts import load_facts

    return load_facts(resolve(config.perception.scoring_facts), device)


def evaluated_ids(config: Config, dataset: FaceDataset, limit: int = 0) -> list[str]:
    """The ids that count: the first `limit`, else `evaluation.limit`, else all of the dataset."""
    check_number(limit, "limit", 0, whole=True)
    return dataset.ids[: limit or config.evaluation.limit or None]


def score_folder(
    folder: Path,
    dataset: FaceDataset,
    config: Config,
    limit: int = 0,
    progress: bool = True,
) -> DataFrame:
    """Score the pictures `{id}.*` of a folder against their faces.

    Args:
        folder: pictures as large as the dataset's; other files than pictures are ignored.
        dataset: gives masks, manifest captions and the real images.
        config: names the perception models and the metrics' settings.
        limit: the first faces only; 0 takes `evaluation.limit`, and 0 there means all.
        progress: show a bar.

    Returns:
        One row for each picture: id; text_<role> (percent); lpips (against the real image); niqe;
        support_<class>, correct_<role>_<class> and predicted_<role>_<class> (pixels); and with
        `perception.scoring_facts` fact_<name>: 100 where a fact of the caption is found in the
        picture, 0 where it is not, NaN where the caption does not mention it.

    Raises:
        DataError: pictures are missing, unreadable, of another size or of unknown faces; one
            report names them all.
    """
    import pandas as pd

    cache = _scored(folder, dataset, config, limit, progress)
    table = pd.read_csv(cache, float_precision="round_trip")
    names = pd.read_csv(cache, usecols=["id"], dtype=str, keep_default_na=False)
    return table.assign(id=names["id"])  # 0012 and NA are names, neither a number nor nothing


def folder_features(
    folder: Path,
    dataset: FaceDataset,
    config: Config,
    limit: int = 0,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """The CLIPs' features of the pictures of a folder, role -> `(n, d)` float32 of unit length.

    Rows are in the order of `score_folder`, whose arguments and errors are these, too.
    """
    cache = _scored(folder, dataset, config, limit, progress)
    with np.load(cache.with_suffix(".npz")) as arrays:
        return {role: arrays[role] for role in ROLES}


def counts(per_image: DataFrame, role: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(correct, support, predicted) of the rows of `score_folder`, each `(n, 19)`."""
    names = (f"correct_{role}", "support", f"predicted_{role}")
    correct, support, predicted = (
        per_image[[f"{name}_{c}" for c in CLASSES]].to_numpy() for name in names
    )
    return correct, support, predicted


def is_count(column: str) -> bool:
    """Whether a column of `score_folder` counts pixels."""
    return column.startswith(("support_", "correct_", "predicted_"))


def is_scored(folder: Path, dataset: FaceDataset, config: Config, limit: int = 0) -> bool:
    """Whether `score_folder` would only read; false where pictures are missing."""
    ids = evaluated_ids(config, dataset, limit)
    files, report = _named_files(folder, dataset, ids)
    return not report.problems and _is_kept(_score_file(folder, files, dataset, config))


def score_share(
    folder: Path, dataset: FaceDataset, config: Config, limit: int, rank: int, world: int
) -> None:
    """Score one process's share of a folder; `score_folder` joins the shares of all.

    Args:
        folder: as for `score_folder`, whose errors are these, too.
        dataset: likewise.
        config: likewise.
        limit: likewise.
        rank: of this process, from 0.
        world: number of processes.
    """
    ids, files, cache = _checked(folder, dataset, config, limit)
    if not _is_kept(cache):
        _score_parts(cache, files, ids, dataset, config, rank == 0, rank, world)


def _scored(folder: Path, dataset: FaceDataset, config: Config, limit: int, progress: bool) -> Path:
    """The CSV of a folder's scores, with the features beside it; made if it is not there."""
    import pandas as pd

    ids, files, cache = _checked(folder, dataset, config, limit)
    if _is_kept(cache):
        return cache
    parts = _score_parts(cache, files, ids, dataset, config, progress)
    models = perception_models(config)
    captions = [dataset.manifest_caption(name) for name in ids]
    for role, clip in models.clips.items():
        if lost := clip.lost_texts(captions):
            message = describe_loss(lost, len(captions), f"the {role} CLIP")
            warnings.warn(message, LostWordsWarning, stacklevel=2)
    arrays = [dict(np.load(part)) for part in parts]
    columns = _columns(models)
    table = pd.DataFrame(np.concatenate([a["scores"] for a in arrays]), columns=columns)
    table = table.astype({name: int for name in columns if is_count(name)})
    table = pd.concat([pd.Series(ids, name="id"), table], axis=1)
    features_file = cache.with_suffix(".npz")
    with whole_file(features_file) as part, part.open("wb") as file:
        np.savez(file, **{role: np.concatenate([a[role] for a in arrays]) for role in ROLES})
    write_frame(cache, table)
    record_hash(features_file)
    record_hash(cache)
    shutil.rmtree(_parts_folder(cache))
    return cache


def _checked(
    folder: Path, dataset: FaceDataset, config: Config, limit: int
) -> tuple[list[str], dict[str, Path], Path]:
    """Ids, their pictures, and where the scores are kept; bad pictures are refused.

    Pictures whose scores are kept were checked when they were scored.
    """
    ids = evaluated_ids(config, dataset, limit)
    files, report = _named_files(folder, dataset, ids)
    if report.problems:  # the one report also names unreadable pictures
        _check_pictures(report, files, config.data.size)
    cache = _score_file(folder, files, dataset, config)
    if not _is_kept(cache):
        _check_pictures(report, files, config.data.size)
    return ids, files, cache


def _score_file(
    folder: Path, files: Mapping[str, Path], dataset: FaceDataset, config: Config
) -> Path:
    key = _score_key(files, dataset, config)
    return config.run_dir / "scores" / f"{folder.name}-{key}.csv"


def _is_kept(cache: Path) -> bool:
    return is_whole(cache) and is_whole(cache.with_suffix(".npz"))


def _parts_folder(cache: Path) -> Path:
    return cache.with_suffix(".parts")


def _score_parts(
    cache: Path,
    files: Mapping[str, Path],
    ids: Sequence[str],
    dataset: FaceDataset,
    config: Config,
    progress: bool,
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    """Score every n-th part that is missing; the files of all parts, in order."""
    from tqdm.auto import tqdm

    starts = range(0, len(ids), BATCH)
    parts = {start: _parts_folder(cache) / f"{start:06d}.npz" for start in starts}
    mine = [start for start in starts[rank::world] if not parts[start].is_file()]
    if not mine:
        return list(parts.values())
    models = perception_models(config)
    batches = [ids[start : start + BATCH] for start in mine]
    quality = _niqe_of(models.niqe, [[files[name] for name in batch] for batch in batches], world)
    bar = tqdm(mine, f"scoring {cache.stem}", mininterval=1, disable=not progress)
    for start, batch, niqe in zip(bar, batches, quality, strict=True):
        scores, features = _score(models, files, batch, dataset, niqe)
        with whole_file(parts[start]) as part, part.open("wb") as file:
            np.savez(file, scores=scores.numpy(), **{k: v.numpy() for k, v in features.items()})
    return list(parts.values())


def _niqe_of(niqe: Niqe, batches: list[list[Path]], world: int) -> Iterator[Tensor]:
    """NIQE of each batch; it takes the CPU 0.15 s a picture of 512 px, so spare cores share it."""
    function = functools.partial(_niqe_of_files, niqe)
    if (os.cpu_count() or 1) // world < SPARE_CORES:
        return map(function, batches)
    return in_processes(function, batches)


def _niqe_of_files(niqe: Niqe, files: Sequence[Path]) -> Tensor:
    return niqe(torch.stack([read_picture(file) for file in files]))


def _columns(models: PerceptionModels) -> list[str]:
    names = [f"text_{role}" for role in ROLES] + ["lpips", "niqe"]
    names += [f"support_{c}" for c in CLASSES]
    kinds = [f"{kind}_{role}" for kind in ("correct", "predicted") for role in ROLES]
    names += [f"{kind}_{c}" for kind in kinds for c in CLASSES]
    return names + [f"{FACT}{name}" for name in (models.facts.names if models.facts else ())]


@torch.no_grad()
def _score(
    models: PerceptionModels,
    files: Mapping[str, Path],
    ids: Sequence[str],
    dataset: FaceDataset,
    niqe: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of a few pictures in the order of `_columns`, float64; features by role."""
    images = torch.stack([read_picture(files[name]) for name in ids]).to(models.device)
    real = torch.stack([dataset.image(name) for name in ids]).to(models.device)
    target = torch.stack([dataset.label_map(name) for name in ids]).to(models.device)
    captions = [dataset.manifest_caption(name) for name in ids]
    values = [models.clips[role].score(images, captions) for role in ROLES]
    values += [models.lpips(images, real), niqe]
    parsed = [models.parsers[role].parse(images) for role in ROLES]
    tables = [value.cpu()[:, None] for value in values]
    tables += [pixel_counts(target), *(mask_counts(maps, target)[0] for maps in parsed)]
    tables += [pixel_counts(maps) for maps in parsed]
    if models.facts is not None:
        tables.append(_found_facts(models.facts, images, captions))
    features = {role: models.clips[role].image_features(images).cpu() for role in ROLES}
    return torch.cat([table.double().cpu() for table in tables], dim=1), features


def _found_facts(facts: FactNet, images: Tensor, captions: Sequence[str]) -> Tensor:
    """100 or 0 for each fact that a caption mentions, NaN for the others: `(b, facts)`."""
    from ..prepare.captions import caption_facts

    mentioned = [set(caption_facts(caption)) for caption in captions]
    asked = torch.tensor([[name in words for name in facts.names] for words in mentioned])
    found = 100 * facts.holds(images).double()
    return found.where(asked.to(found.device), torch.nan)


def _named_files(
    folder: Path, dataset: FaceDataset, ids: Sequence[str]
) -> tuple[dict[str, Path], Report]:
    """The picture of each id that has one, and a report of missing ones and of those of no face."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of pictures: name one that exists")
    report = Report(folder, len(ids))
    known = set(dataset.ids)
    files = files_by_id(folder, IMAGE_SUFFIXES, report)
    files = paired(known, files)
    missing = [name for name in ids if name not in files]
    report_missing(folder, "image", missing, report)
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
    """Twelve hex digits of pictures, faces, perception models, settings and code."""
    pictures = list(parallel(path_digest, files.values()))
    return content_key([models_digest(config), data_digest(dataset), list(files), pictures])


def models_digest(config: Config) -> str:
    """Twelve hex digits of the perception models, the metrics' settings and the scoring code."""
    p = config.perception
    e = config.evaluation
    names = (p.parser, p.scoring_parser, p.clip, p.scoring_clip)
    weights = [path_digest(resolve(name.removeprefix(LOCAL_DIR))) for name in names]
    settings = [p.parser_size, e.lpips, e.niqe_block, e.niqe_refit]
    pristine = data_digest(open_dataset(config, "train")) if e.niqe_refit else ""
    parts = [names, weights, settings, code_digest(SCORING), pristine]
    if p.scoring_facts:
        parts += [path_digest(resolve(p.scoring_facts)), code_digest(FACTS_CODE)]
    return content_key(parts)
