"""What a profile needs, and which of it is present: the report of `ec2face_lab prepare`.

Each entry names where a thing is expected, where it comes from, its licence, its size and what is
wrong with it. Data are counted. Weights are checked by their headers, on request by their recorded
hashes, and each parser is compared with known masks as soon as there are any. Nothing is written,
and no network is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ec2face_core.backbone import is_hub_id
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset, file_id, files_by_id, is_dropping, open_dataset
from ec2face_core.io.paths import resolve
from ec2face_core.io.pictures import IMAGE_SUFFIXES, read_image
from ec2face_core.io.report import DataError, Report
from ec2face_core.perception import LOCAL_DIR, FaceParser, WeightsError, check_torchscript

from . import weights
from .convert import PART_FOLDERS, celebamask_files, paint_parts
from .pairs import paired
from .photos import check_class_order
from .second_parser import SEGFORMER

CELEBAMASK = "CelebAMask-HQ"  # folders of the downloads
FFHQ_TEXT = "FFHQ-Text"
CAPTIONS = tuple(  # names in archives and in use; the report prints the first
    f"{folder}/{text}"
    for folder in ("multi-modal-celeba", CELEBAMASK)
    for text in ("text/celeba-caption", "celeba-caption", "text")
)
DETECTOR = "weights/mobilenet0.25_Final.pth"
REFERENCES = 4  # faces with known masks that a parser is compared with


class Need(NamedTuple):
    """One thing that a profile needs, and how to obtain it."""

    name: str
    source: str
    licence: str
    size: str


_RESEARCH = "CelebAMask-HQ agreement: non-commercial research, no redistribution of any portion"
_ZIP = "CelebAMask-HQ.zip, by the links of switchablenorms/CelebAMask-HQ on GitHub"
IMAGES = Need("CelebA-HQ-img", _ZIP, _RESEARCH, "about 3 GB, the whole zip")
PARTS = Need("CelebAMask-HQ-mask-anno", _ZIP, _RESEARCH, "in the same zip")
TEXTS = Need(
    "MM-CelebA-HQ captions",
    "folder text of Multi-Modal-CelebA-HQ (IIGROUP/MM-CelebA-HQ-Dataset on GitHub, on request)",
    "non-commercial research, with the images of CelebAMask-HQ",
    "30,000 files, 30 MB",
)
PHOTOS = Need(
    "FFHQ-Text",
    "request form of Yutong-Zhou-cv/FFHQ-Text_Dataset on GitHub",
    "CC BY-NC-SA 4.0; the photos keep their Flickr licences",
    "1 GB",
)
MM_CELEBA = Need(
    f"{IMAGES.name}, {PARTS.name}, {TEXTS.name} (data.root)", "this command", _RESEARCH, "10 GB"
)
MM_FFHQ = Need(
    f"{PHOTOS.name} with masks (data.zero_shot_root)", "this command", PHOTOS.licence, "0.3 GB"
)
FLUX = Need(
    "FLUX.1-dev (backbone.path)",
    "black-forest-labs/FLUX.1-dev on the Hugging Face hub (gated)",
    "FLUX.1 [dev] Non-Commercial License",
    "33.7 GB: transformer 23.8, T5-XXL 9.5, CLIP 0.2, VAE 0.2",
)
FARL = Need(
    "FaRL parser, TorchScript (perception.parser)",
    "face_parsing.farl.celebm.main_ema_181500_jit.pt, release models-v1 of FacePerceiver/facer "
    "on GitHub",
    "MIT; trained on CelebAMask-HQ",
    "0.6 GB",
)
SCORER = Need(
    "scoring parser, TorchScript (perception.scoring_parser)",
    f"this command, from a download of {SEGFORMER} (Hugging Face hub): `hf download {SEGFORMER}`",
    "NVIDIA SegFormer's, non-commercial; trained on CelebAMask-HQ",
    "0.3 GB",
)
RETINAFACE = Need(
    "RetinaFace detector (for the masks of FFHQ-Text)",
    "mobilenet0.25_Final.pth, release 0.0.1 of elliottzheng/face-detection on GitHub",
    "MIT",
    "2 MB",
)
CLIP = Need("CLIP ViT-L-14 (perception.clip)", "the Hugging Face hub", "MIT", "1.7 GB")
SCORING_CLIP = Need(
    "CLIP ViT-B-32 (perception.scoring_clip)", "the Hugging Face hub", "MIT", "0.6 GB"
)
ALEXNET = Need(
    "LPIPS trunk, AlexNet (evaluation.lpips)",
    "alexnet-owt-7be5be79.pth of torchvision; fetched at first use where there is a network",
    "BSD-3-Clause; trained on ImageNet",
    "244 MB",
)
NIQE = Need(
    "NIQE model (evaluation.niqe_refit)",
    "niqe_modelparameters.mat of chaofengc/IQA-PyTorch-Weights on the Hugging Face hub; fetched at "
    "first use where there is a network",
    "CC BY-NC-SA 4.0 (the repository's)",
    "11 kB",
)


@dataclass(frozen=True)
class Finding:
    """What is present of a need: nothing (`exists` is false), all of it, or all but `problems`."""

    need: Need
    where: Path | str
    exists: bool
    problems: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """there, incomplete or missing."""
        if not self.exists:
            return "missing"
        return "incomplete" if self.problems else "there"


def survey(config: Config, downloads: Path, content: bool = False) -> list[Finding]:
    """Look for everything that a profile needs, and write nothing.

    Args:
        config: names the data roots and the weights.
        downloads: folder of the raw downloads.
        content: also read all weights whose hash is recorded.

    Returns:
        One finding per need, in the order of the report.
    """
    findings = _celebamask(config, downloads) + _ffhq_text(config, downloads)
    findings += _hub_weights(config, content)
    return findings + _parsers(config, downloads) + _metric_weights(config)


def render(findings: Sequence[Finding]) -> str:
    """The report as text: one paragraph per need; problems begin with `!`."""
    lines = []
    for finding in findings:
        need = finding.need
        details = {"at": finding.where, "from": need.source, "terms": need.licence}
        details["size"] = need.size
        lines.append(f"{finding.state.upper():<12}{need.name}")
        lines += [f"{'':12}{key:<6}{value}" for key, value in details.items()]
        lines += [f"{'':12}!     {problem}" for problem in finding.problems]
    complete = sum(finding.state == "there" for finding in findings)
    return "\n".join([*lines, f"{complete} of {len(findings)} there"])


# ----------------------------------------------------------------------------------------- data


def _celebamask(config: Config, downloads: Path) -> list[Finding]:
    """The data root; before it exists, the downloads from which it is made."""
    root = resolve(config.data.root)
    if root.exists():
        return [Finding(MM_CELEBA, root, True, _root_problems(config, "train", "test"))]
    raw = downloads / CELEBAMASK
    texts = captions_folder(downloads)
    images, parts = _raw_files(raw)
    captions = files_by_id(texts, (".txt",), Report(texts))
    ids = [str(i) for i in range(config.data.train + config.data.test)]
    return [
        Finding(IMAGES, raw / "CelebA-HQ-img", bool(images), _missing(images, ids)),
        Finding(PARTS, raw / PART_FOLDERS[0], bool(parts), _missing(parts, ids)),
        Finding(TEXTS, texts, bool(captions), _missing(captions, ids)),
    ]


def _ffhq_text(config: Config, downloads: Path) -> list[Finding]:
    """The zero-shot root; before it exists, the photos and the detector that give it its masks."""
    root = resolve(config.data.zero_shot_root)
    if root.exists():
        return [Finding(MM_FFHQ, root, True, _root_problems(config, "zero_shot"))]
    photos, texts = ffhq_text_files(downloads)
    problems = _missing(texts, photos, "captions") + _missing(photos, texts, "photos")
    if len(photos) != config.data.zero_shot:
        problems += (f"{len(photos):,} photos, data.zero_shot asks for {config.data.zero_shot:,}",)
    return [
        Finding(PHOTOS, downloads / FFHQ_TEXT, bool(photos), problems),
        _file(RETINAFACE, downloads / DETECTOR, weights.check_tensors),
    ]


def _raw_files(raw: Path) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Images and part files by id; the converter reports files that are neither."""
    try:
        return celebamask_files(raw, Report(raw))
    except DataError:  # no folder of parts
        return files_by_id(raw / "CelebA-HQ-img", IMAGE_SUFFIXES, Report(raw)), {}


def captions_folder(downloads: Path) -> Path:
    """Folder of MM-CelebA-HQ's `{k}.txt`: a known one, else any other with `0.txt` but FFHQ-Text's.

    If there is none, the folder where the archive's own names place it.
    """
    known = [downloads / name for name in CAPTIONS]
    deeper = (downloads.glob(f"{'*/' * depth}0.txt") for depth in range(1, 5))
    others = (file.parent for files in deeper for file in sorted(files))
    foreign = downloads / FFHQ_TEXT
    candidates = itertools.chain(known, (f for f in others if foreign not in f.parents))
    return next((folder for folder in candidates if (folder / "0.txt").is_file()), known[0])


def ffhq_text_files(downloads: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Photos and captions of FFHQ-Text by id, from its folders Image and Text, at any depth."""
    suffixes = {"image": IMAGE_SUFFIXES, "text": (".txt",)}
    files: dict[str, dict[str, Path]] = {kind: {} for kind in suffixes}
    for folder in sorted((downloads / FFHQ_TEXT).glob("*/")):
        kind = folder.name.lower().rstrip("s")
        for path in sorted(folder.rglob("*")) if kind in files else ():
            dropping = is_dropping(path.relative_to(folder))
            if path.suffix.lower() in suffixes[kind] and not dropping:
                files[kind][file_id(path)] = path
    files["text"] = paired(files["image"], files["text"])
    return files["image"], files["text"]


def _missing(
    present: Collection[str], expected: Collection[str], what: str = "faces"
) -> tuple[str, ...]:
    """How many of the expected ids are missing, with the names of the first ones."""
    missing = [name for name in expected if name not in present]
    if not missing:
        return ()
    few = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
    return (f"{len(expected) - len(missing):,} of {len(expected):,} {what}; missing: {few}",)


def _root_problems(config: Config, *splits: str) -> tuple[str, ...]:
    """Whether a converted root opens and holds as many faces of each split as configured."""
    try:
        for split in splits:
            faces = len(open_dataset(config, split))
            expected = getattr(config.data, split)
            if faces != expected:
                return (f"{faces:,} faces of split {split}, data.{split} asks for {expected:,}",)
    except DataError as error:
        lines = str(error).splitlines()
        return (*lines[:6], *(["..."] if len(lines) > 6 else []))
    return ()


# -------------------------------------------------------------------------------------- weights


def _hub_weights(config: Config, content: bool) -> list[Finding]:
    """FLUX and the two CLIPs: folders, or repositories in the hub's local cache."""
    path = config.backbone.path
    remedy = _flux_remedy(path)
    findings = [_folder(FLUX, path, "model_index.json", weights.pipeline_problems, remedy)]
    names = {CLIP: config.perception.clip, SCORING_CLIP: config.perception.scoring_clip}
    for need, name in names.items():
        plain = name.removeprefix(LOCAL_DIR).removeprefix("hf-hub:")
        if plain == name:  # architecture/tag: the repository that open_clip takes it from
            plain = _clip_repository(name) or "./" + name
        remedy = f"`hf download {plain} {' '.join(weights.CLIP_FILES)}`"
        if plain.startswith("./"):
            remedy = (
                "open_clip knows no such name: write hf-hub:<owner/model> or local-dir:<folder>"
            )
        findings.append(_folder(need, plain, weights.CLIP_FILES[0], weights.clip_problems, remedy))
    return [_with_hashes(finding) for finding in findings] if content else findings


def _clip_repository(name: str) -> str:
    """The hub id of open_clip's `architecture/tag`; "" if it has none."""
    import open_clip

    architecture, _, tag = name.partition("/")
    return open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "").strip("/")


def _flux_remedy(path: str) -> str:
    """How to obtain FLUX.1-dev, or how to continue its download."""
    from huggingface_hub import get_token

    if not is_hub_id(path):
        return "copy the whole repository into this folder, or name another one in backbone.path"
    login = "" if get_token() else ", log in with `hf auth login` (no token is stored here)"
    return (
        f"gated: accept the licence on the model's page of the hub{login}, then `hf download "
        f"{path} --exclude flux1-dev.safetensors`; or name a folder that holds it in backbone.path"
    )


def _folder(
    need: Need, name: str, marker: str, check: Callable[[Path], list[str]], remedy: str
) -> Finding:
    """A folder of weights, or the cached repository of this hub id."""
    folder = weights.local_folder(name, marker)
    problems = check(folder) if folder else []
    if folder and not problems:
        return Finding(need, folder, True)
    begun = weights.unfinished(name)
    return Finding(need, folder or name, bool(folder or begun), (*problems, *begun, remedy))


def _with_hashes(finding: Finding) -> Finding:
    """The same finding after a comparison of its files with their recorded hashes."""
    from tqdm.auto import tqdm

    if finding.state != "there":
        return finding
    files = tqdm(weights.weight_files(Path(finding.where)), f"reading {finding.need.name}")
    problems = [line for file in files for line in weights.problems_of(weights.check_hash, file)]
    return replace(finding, problems=tuple(problems))


def _parsers(config: Config, downloads: Path) -> list[Finding]:
    """The guiding and the scoring parser: of the right kind, with classes in the right order."""
    perception = config.perception
    files = {FARL: resolve(perception.parser), SCORER: resolve(perception.scoring_parser)}
    faces = _references(config, downloads) if any(f.exists() for f in files.values()) else None

    def check(file: Path) -> None:
        check_torchscript(file)
        if faces is not None:
            check_class_order(FaceParser(file, perception.parser_size), *faces)

    return [_file(need, file, check) for need, file in files.items()]


def _references(config: Config, downloads: Path) -> tuple[Tensor, Tensor] | None:
    """A few faces and their known masks, from the data root or else from the raw download."""
    root = resolve(config.data.root)
    size = config.data.size
    try:
        if root.exists():
            faces = [*FaceDataset(root, None, size, limit=REFERENCES)]
            return torch.stack([f.image for f in faces]), torch.stack([f.label_map for f in faces])
        images, parts = _raw_files(downloads / CELEBAMASK)
        known = [name for name in images if name in parts][:REFERENCES]
        pictures = [read_image(images[name]).resize((size, size)) for name in known]
        masks = [Image.fromarray(paint_parts(parts[name])) for name in known]
    except DataError:  # damaged data are reported with the data
        return None
    if not known:
        return None
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    ids = np.stack([mask.resize((size, size), Image.Resampling.NEAREST) for mask in masks])
    return pixels / 127.5 - 1, torch.from_numpy(ids).long()


def _metric_weights(config: Config) -> list[Finding]:
    """Weights that LPIPS and NIQE download themselves; none where the profile has substitutes."""
    hub = Path(torch.hub.get_dir())
    findings = []
    if config.evaluation.lpips == "alex":
        trunk = hub / "checkpoints" / "alexnet-owt-7be5be79.pth"
        findings.append(_file(ALEXNET, trunk, weights.check_hash))
    if not config.evaluation.niqe_refit:
        findings.append(_file(NIQE, hub / "pyiqa" / "niqe_modelparameters.mat", _check_niqe))
    return findings


def _check_niqe(path: Path) -> None:
    from scipy.io import loadmat

    try:
        missing = {"mu_prisparam", "cov_prisparam"} - loadmat(path).keys()
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: unreadable ({error}): download it again") from error
    if missing:
        raise WeightsError(f"{path}: lacks {', '.join(sorted(missing))}: download it again")


def _file(need: Need, path: Path, check: Callable[[Path], object]) -> Finding:
    """A single file and the result of its check."""
    exists = path.exists()
    return Finding(need, path, exists, tuple(weights.problems_of(check, path)) if exists else ())
