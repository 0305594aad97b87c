"""What a profile needs, and what of it is there: the report of `prepare.py`. Looks only, offline.

Each need says where it is expected, where it comes from, under which licence, how large it is and
what is wrong with it. Data are counted; weights are checked by their headers, on demand by their
recorded hashes, and each parser is held against faces whose masks are known, once there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ec2face_core.config import Config, resolve
from ec2face_core.data import (
    IMAGE_SUFFIXES,
    DataError,
    FaceDataset,
    Report,
    files_by_id,
    open_dataset,
    read_image,
)
from ec2face_core.perception import LOCAL_DIR, FaceParser, WeightsError

from . import weights
from .convert import PART_FOLDERS, celebamask_files, paint_parts
from .photos import check_class_order

CELEBAMASK, FFHQ_TEXT = "CelebAMask-HQ", "FFHQ-Text"  # folders of the downloads

CAPTIONS = tuple(  # as archives and their users name it; the report names the first
    f"{folder}/{text}"
    for folder in ("multi-modal-celeba", CELEBAMASK)
    for text in ("text/celeba-caption", "celeba-caption", "text")
)

DETECTOR = "weights/mobilenet0.25_Final.pth"

REFERENCES = 4  # faces that a parser is held against


class Need(NamedTuple):
    """One thing that a profile needs, and how a user comes by it."""

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
    "any second parser, exported in FaRL's contract: [0, 1] `b 3 h w` -> (logits `b 19 h w`, {})",
    "that of the parser you choose",
    "that of the parser you choose",
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
    """What is there of a need: nothing (`exists` is false), all of it, or all but `problems`."""

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

    content: also read all weights whose hash is recorded.
    """
    data, hub = _data(config, downloads), _hub_weights(config, content)
    return data + hub + _parsers(config, downloads) + _metrics(config)


def render(findings: Sequence[Finding]) -> str:
    """The report as text: one paragraph a need, with `!` before all that is wrong."""
    lines = []
    for found in findings:
        need = found.need
        about = {"at": found.where, "from": need.source, "terms": need.licence, "size": need.size}
        lines.append(f"{found.state.upper():<12}{need.name}")
        lines += [f"{'':12}{key:<6}{value}" for key, value in about.items()]
        lines += [f"{'':12}!     {problem}" for problem in found.problems]
    there = sum(found.state == "there" for found in findings)
    return "\n".join([*lines, f"{there} of {len(findings)} there"])


# ----------------------------------------------------------------------------------------- data


def _data(config: Config, downloads: Path) -> list[Finding]:
    """The two data roots; for one that does not exist yet, the downloads that make it."""
    root, zero_shot = resolve(config.data.root), resolve(config.data.zero_shot_root)
    findings: list[Finding] = []
    if root.exists():
        problems = _root_problems(config, ("train", "test"))
        findings.append(Finding(MM_CELEBA, root, True, problems))
    else:
        raw, texts = downloads / CELEBAMASK, captions_folder(downloads)
        images, parts = _celebamask(raw)
        found = (
            (IMAGES, raw / "CelebA-HQ-img", images),
            (PARTS, raw / PART_FOLDERS[0], parts),
            (TEXTS, texts, files_by_id(texts, (".txt",), Report(texts))),
        )
        expected = [str(i) for i in range(config.data.train + config.data.test)]
        findings += [
            Finding(need, where, bool(ids), _missing(ids, expected)) for need, where, ids in found
        ]
    if zero_shot.exists():
        problems = _root_problems(config, ("zero_shot",))
        return [*findings, Finding(MM_FFHQ, zero_shot, True, problems)]
    photos, texts = ffhq_text_files(downloads)
    problems = (*_missing(texts, photos, "captions"), *_missing(photos, texts, "photos"))
    if len(photos) != config.data.zero_shot:
        problems += (f"{len(photos):,} photos, data.zero_shot asks for {config.data.zero_shot:,}",)
    findings.append(Finding(PHOTOS, downloads / FFHQ_TEXT, bool(photos), problems))
    return [*findings, _file(RETINAFACE, downloads / DETECTOR, weights.check_tensors)]


def _celebamask(raw: Path) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Images and part files by id; what is no part file is the converter's to report."""
    try:
        return celebamask_files(raw, Report(raw))
    except DataError:  # no folder of parts
        return files_by_id(raw / "CelebA-HQ-img", IMAGE_SUFFIXES, Report(raw)), {}


def captions_folder(downloads: Path) -> Path:
    """Folder of MM-CelebA-HQ's `{k}.txt`: the first known one that exists, else the usual one."""
    known = [downloads / name for name in CAPTIONS]
    return next((folder for folder in known if any(folder.glob("0.txt"))), known[0])


def ffhq_text_files(downloads: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Photos and captions of FFHQ-Text by id, from its folders Image and Text, at any depth."""
    found: dict[str, dict[str, Path]] = {"image": {}, "text": {}}
    for folder in sorted((downloads / FFHQ_TEXT).glob("*/")):
        kind = folder.name.lower().rstrip("s")
        suffixes = (".txt",) if kind == "text" else IMAGE_SUFFIXES
        files = sorted(folder.rglob("*")) if kind in found else []
        found.get(kind, {}).update({p.stem: p for p in files if p.suffix.lower() in suffixes})
    return found["image"], found["text"]


def _missing(
    found: Collection[str], expected: Collection[str], what: str = "faces"
) -> tuple[str, ...]:
    """How many of the expected ids are not there, the first ones by name."""
    missing = [name for name in expected if name not in found]
    if not missing:
        return ()
    few = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
    return (f"{len(expected) - len(missing):,} of {len(expected):,} {what}; missing: {few}",)


def _root_problems(config: Config, splits: Iterable[str]) -> tuple[str, ...]:
    """Whether a converted root opens and holds as many faces of each split as it should."""
    try:
        for split in splits:
            found, expected = len(open_dataset(config, split)), getattr(config.data, split)
            if found != expected:
                return (f"{found:,} faces of split {split}, data.{split} asks for {expected:,}",)
    except DataError as error:
        lines = str(error).splitlines()
        return (*lines[:6], *(["..."] if len(lines) > 6 else []))
    return ()


# -------------------------------------------------------------------------------------- weights


def _hub_weights(config: Config, content: bool) -> list[Finding]:
    """FLUX and the two CLIPs: folders, or repositories in the hub's local cache."""
    perception = config.perception
    path, gate = config.backbone.path, _gated_remedy(config.backbone.path)
    findings = [_folder(FLUX, path, "model_index.json", weights.pipeline_problems, gate)]
    for need, name in ((CLIP, perception.clip), (SCORING_CLIP, perception.scoring_clip)):
        plain = name.removeprefix(LOCAL_DIR).removeprefix("hf-hub:")
        remedy = f"`hf download {plain} {' '.join(weights.CLIP_FILES)}`"
        if plain == name:  # architecture/tag
            remedy = "write hf-hub:<owner/model> or local-dir:<folder>, other names are not checked"
            plain = "./" + name
        findings.append(_folder(need, plain, weights.CLIP_FILES[0], weights.clip_problems, remedy))
    return [_hashed(found) for found in findings] if content else findings


def _gated_remedy(path: str) -> str:
    """How to come by FLUX.1-dev, or how to go on with its download."""
    from huggingface_hub import get_token

    if not weights.is_hub_id(path):
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
    if folder is None:
        begun = weights.unfinished(name)
        return Finding(need, name, bool(begun), (*begun, remedy))
    problems = check(folder)
    begun = weights.unfinished(name) if problems else ()
    return Finding(need, folder, True, (*problems, *begun, remedy) if problems else ())


def _hashed(found: Finding) -> Finding:
    """The same finding, with the hashes of its files compared where they are recorded."""
    from tqdm.auto import tqdm

    if found.state != "there":
        return found
    files = tqdm(weights.weight_files(Path(found.where)), f"reading {found.need.name}")
    problems = [line for file in files for line in _problems(weights.check_hash, file)]
    return Finding(found.need, found.where, True, tuple(problems))


def _parsers(config: Config, downloads: Path) -> list[Finding]:
    """The guiding and the scoring parser: of the right kind, with classes in the right order."""
    perception = config.perception
    files = {FARL: resolve(perception.parser), SCORER: resolve(perception.scoring_parser)}
    faces = _references(config, downloads) if any(f.exists() for f in files.values()) else None

    def check(file: Path) -> None:
        weights.check_torchscript(file)
        if faces is not None:
            check_class_order(FaceParser(file, perception.parser_size), *faces)

    return [_file(need, file, check) for need, file in files.items()]


def _references(config: Config, downloads: Path) -> tuple[Tensor, Tensor] | None:
    """A few faces and their known masks, from the data root or else from the raw download."""
    root, size = resolve(config.data.root), config.data.size
    try:
        if root.exists():
            faces = [*FaceDataset(root, None, size, limit=REFERENCES)]
            return torch.stack([f.image for f in faces]), torch.stack([f.label_map for f in faces])
        images, parts = _celebamask(downloads / CELEBAMASK)
        known = [name for name in images if name in parts][:REFERENCES]
        pixels = [read_image(images[name]).resize((size, size)) for name in known]
        maps = [Image.fromarray(paint_parts(parts[name])) for name in known]
    except DataError:  # damaged data: reported with the data
        return None
    if not known:
        return None
    nearest = [m.resize((size, size), Image.Resampling.NEAREST) for m in maps]
    stack = torch.from_numpy(np.stack([np.array(x) for x in pixels])).permute(0, 3, 1, 2)
    return stack / 127.5 - 1, torch.from_numpy(np.stack([np.array(x) for x in nearest])).long()


def _metrics(config: Config) -> list[Finding]:
    """Weights that LPIPS and NIQE fetch themselves; none where the profile has substitutes."""
    hub, findings = Path(torch.hub.get_dir()), []
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
    """A single file and what its check says."""
    return Finding(need, path, path.exists(), _problems(check, path) if path.exists() else ())


def _problems(check: Callable[[Path], object], path: Path) -> tuple[str, ...]:
    """What a check of a file says; nothing where it passes."""
    try:
        check(path)
    except (WeightsError, RuntimeError) as error:
        return (str(error),)
    return ()
