"""Scores of folders of pictures: CLIP score, LPIPS, NIQE and the pixel counts of mask accuracy.

Parsers and CLIPs come in pairs: the `guiding` ones are losses of training, the `independent` ones
only evaluate. Scores are kept in `runs/<profile>/scores` by content, and beside them the CLIPs'
features of the pictures. Metrics are computed without gradients; images are `b 3 h w` in [-1, 1]
and scores `(b,)`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ec2face_core.attributes import CLASSES, pixel_counts
from ec2face_core.config import Config, ConfigError
from ec2face_core.data import FaceDataset, files_by_id, open_dataset, paired, report_missing
from ec2face_core.guards.checks import check_number, check_same_shape
from ec2face_core.io.paths import resolve
from ec2face_core.io.pictures import IMAGE_SUFFIXES, read_image
from ec2face_core.io.report import DataError, Report
from ec2face_core.io.texts import LostWordsWarning, describe_loss
from ec2face_core.metrics import mask_counts
from ec2face_core.perception import LOCAL_DIR, ClipScorer, FaceParser
from ec2face_core.runs import content_key, parallel, path_digest, whole_file

from ..cache import code_digest, data_digest, is_whole, record_hash, write_frame
from .png import read_picture

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..world.facts import FactNet


class Lpips:
    """LPIPS with AlexNet, calibrated heads included in the package.

    `evaluation.lpips: alex` uses the trunk trained on ImageNet. `alex-random` initialises the
    trunk's weights from a fixed seed, for places where the trained ones are not available: its
    values rank distortions but are not comparable with published ones.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        name = config.evaluation.lpips
        if name not in ("alex", "alex-random"):
            raise ConfigError(f"evaluation.lpips: {name!r} is none of alex, alex-random")
        import lpips

        generator = torch.default_generator  # torchvision's initialisers know no other
        state = generator.get_state()
        try:
            generator.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips calls torchvision in an old manner
                self.net = lpips.LPIPS(net="alex", pnet_rand=name == "alex-random", verbose=False)
        except OSError as error:
            raise RuntimeError(
                "evaluation.lpips: the trunk 'alex' needs torchvision's AlexNet weights "
                "(alexnet-owt-7be5be79.pth in $TORCH_HOME/hub/checkpoints); put the file there, "
                "or choose 'alex-random'"
            ) from error
        finally:
            generator.set_state(state)
        self.net.requires_grad_(False).to(device)
        self.device = device

    @torch.no_grad()
    def score(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of each image to its reference, `(b,)`; at least 31 px wide and high."""
        check_same_shape(images=images, references=references)
        return self.net(images.to(self.device), references.to(self.device)).flatten()

    __call__ = score


class Niqe:
    """NIQE: how far the statistics of an image's blocks are from those of pristine images.

    The published model has blocks of 96 px and wants images of 192 px or more. For others, say the
    miniature's 64 px, `fit` takes the statistics from pristine images at `evaluation.niqe_block`
    px: the same formula, on a scale of its own, to be labelled so and never set beside published
    values. Features are pyiqa's; double precision, on the CPU.
    """

    def __init__(self, config: Config, pristine: Tensor | None = None) -> None:
        """Fit to pristine images `n 3 h w` if given, else load the published model.

        With `evaluation.niqe_refit` and no pristine images, `fit` has to be called before `score`.
        """
        self.block = config.evaluation.niqe_block
        self.mean: Tensor | None = None
        self.covariance: Tensor | None = None
        if pristine is not None:
            self.fit(pristine)
        elif not config.evaluation.niqe_refit:
            self._load_published()

    def fit(self, images: Tensor) -> Niqe:
        """Take the pristine model from the sharp blocks of `n 3 h w` images (n of 100 or more)."""
        rows = []
        for chunk in images.split(64):
            y = self._luminance(chunk)
            features = self._features(y)
            sharpness = self._sharpness(y)
            sharp = sharpness > 0.75 * sharpness.amax(1, keepdim=True)
            rows.append(features[sharp & features.isfinite().all(-1)])
        pristine = torch.cat(rows)
        if len(pristine) <= pristine.shape[1]:
            raise ValueError(
                f"NIQE: {len(pristine)} sharp blocks cannot give a covariance of "
                f"{pristine.shape[1]} features; fit to more images"
            )
        self.mean = pristine.mean(0)
        self.covariance = pristine.T.cov()
        return self

    def score(self, images: Tensor) -> Tensor:
        """NIQE of each image, `(b,)` float64, lower is better; NaN where no block has structure."""
        if self.mean is None:
            raise RuntimeError("NIQE has no pristine model yet: call fit(training images) first")
        luminance = (self._luminance(chunk) for chunk in images.split(64))
        return torch.cat([self._distance(self._features(y)) for y in luminance])

    __call__ = score

    def _distance(self, features: Tensor) -> Tensor:
        """Eq. 10 of Mittal et al. (2012) for block features `b n 36`."""
        usable = features.isfinite().all(-1, keepdim=True)
        count = usable.sum(1)
        features = features.where(usable, 0)
        mean = features.sum(1) / count.clamp(min=1)
        centred = (features - mean[:, None]) * usable
        covariance = centred.mT @ centred / (count - 1).clamp(min=1)[..., None]

        difference = (mean - self.mean)[:, None]
        inverse = torch.linalg.pinv((self.covariance + covariance) / 2)
        distance = (difference @ inverse @ difference.mT).flatten().clamp(min=0).sqrt()
        return distance.where(count[:, 0] > 0, torch.nan)

    def _luminance(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> luminance `b 1 h w` in whole numbers 0-255, cut to whole blocks."""
        from pyiqa.utils.color_util import to_y_channel

        rows, columns = (side // self.block * self.block for side in images.shape[-2:])
        if 0 in (rows, columns):
            raise ConfigError(
                f"evaluation.niqe_block: images of {tuple(images.shape[-2:])} px hold no block of "
                f"{self.block} px; set a smaller block together with evaluation.niqe_refit"
            )
        y = to_y_channel((images.detach().cpu().float().clamp(-1, 1) + 1) / 2, 255, "yiq")
        return y.round().double()[..., :rows, :columns]

    def _features(self, y: Tensor) -> Tensor:
        """The 36 features of each of the n blocks, `b n 36`; not finite where a block is flat."""
        from pyiqa.archs.func_util import normalize_img_with_gauss
        from pyiqa.archs.niqe_arch import compute_feature
        from pyiqa.matlab_utils import blockproc, imresize

        half = imresize(y / 255, scale=0.5, antialiasing=True) * 255
        features = []
        for size, scaled in ((self.block, y), (self.block // 2, half)):
            normalised = normalize_img_with_gauss(scaled, padding="replicate")
            features.append(blockproc(normalised, [size, size], fun=compute_feature))
        return torch.cat(features, -1)

    def _sharpness(self, y: Tensor) -> Tensor:
        """Mean local deviation of each block, `b n`, in the order of the features."""
        from pyiqa.matlab_utils import fspecial, imfilter

        kernel = fspecial(7, 7 / 6, 1).to(y)
        mean = imfilter(y, kernel, padding="replicate")
        deviation = (imfilter(y**2, kernel, padding="replicate") - mean**2).abs().sqrt()
        return F.avg_pool2d(deviation, self.block).mT.flatten(1)  # blocks run column first

    def _load_published(self) -> None:
        if self.block != 96:
            raise ConfigError(
                f"evaluation.niqe_block: {self.block} px needs evaluation.niqe_refit, since the "
                "published model is for 96 px"
            )
        from pyiqa.archs.niqe_arch import NIQE

        try:
            published = NIQE()
        except OSError as error:
            raise RuntimeError(
                "NIQE's published model could not be loaded; put niqe_modelparameters.mat into "
                "$TORCH_HOME/hub/pyiqa, or set evaluation.niqe_refit"
            ) from error
        self.mean = published.mu_pris_param
        self.covariance = published.cov_pris_param


ROLES = ("independent", "guiding")  # of the two pairs of perception models: evaluators, guides

FACT = "fact_"  # begins the columns of facts

BATCH = 32  # pictures scored at once

PRISTINE = 1000  # training faces that NIQE is refitted to

SCORING = (  # modules that decide a score
    "ec2face_core.attributes",
    "ec2face_core.metrics",
    "ec2face_core.perception",
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


def _scored(folder: Path, dataset: FaceDataset, config: Config, limit: int, progress: bool) -> Path:
    """The CSV of a folder's scores, with the features beside it; made if it is not there."""
    import pandas as pd

    ids = evaluated_ids(config, dataset, limit)
    files, report = _named_files(folder, dataset, ids)
    if report.problems:  # the one report also names unreadable pictures
        _check_pictures(report, files, config.data.size)
    cache = config.run_dir / "scores" / f"{folder.name}-{_score_key(files, dataset, config)}.csv"
    features_file = cache.with_suffix(".npz")
    if is_whole(cache) and is_whole(features_file):
        return cache
    _check_pictures(report, files, config.data.size)

    from tqdm.auto import tqdm

    models = perception_models(config)
    captions = [dataset.manifest_caption(name) for name in ids]
    for role, clip in models.clips.items():
        if lost := clip.lost_texts(captions):
            message = describe_loss(lost, len(captions), f"the {role} CLIP")
            warnings.warn(message, LostWordsWarning, stacklevel=2)
    starts = range(0, len(ids), BATCH)
    bar = tqdm(starts, f"scoring {folder.name}", mininterval=1, disable=not progress)
    parts = [_score(models, files, ids[start : start + BATCH], dataset) for start in bar]
    columns = _columns(models)
    table = pd.DataFrame(torch.cat([scores for scores, _ in parts]).numpy(), columns=columns)
    table = table.astype({name: int for name in columns if is_count(name)})
    table = pd.concat([pd.Series(ids, name="id"), table], axis=1)
    features = {role: torch.cat([rows[role] for _, rows in parts]).numpy() for role in ROLES}
    with whole_file(features_file) as part, part.open("wb") as file:
        np.savez(file, **features)
    write_frame(cache, table)
    record_hash(features_file)
    record_hash(cache)
    return cache


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of a few pictures in the order of `_columns`, float64; features by role."""
    images = torch.stack([read_picture(files[name]) for name in ids]).to(models.device)
    real = torch.stack([dataset.image(name) for name in ids]).to(models.device)
    target = torch.stack([dataset.label_map(name) for name in ids]).to(models.device)
    captions = [dataset.manifest_caption(name) for name in ids]
    values = [models.clips[role].score(images, captions) for role in ROLES]
    values += [models.lpips(images, real), models.niqe(images)]
    parsed = [models.parsers[role].parse(images) for role in ROLES]
    tables = [value[:, None] for value in values]
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
