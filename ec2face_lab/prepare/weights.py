"""Checks of weight files on disk: complete, unchanged, and in a format that cannot run code.

Nothing is loaded. A safetensors file states its length in its header. The hub's caches name a file
by its SHA-256, and some files carry the beginning of their hash in their own name. Pickles run code
when they are opened, so only TorchScript is accepted. That is a program, too: one whose code may
read or write files is refused (`ec2face_core.perception.check_torchscript`). Two trained networks
exist as pickled tensors only: LPIPS's AlexNet, which is known by its hash, and facer's
face detector, which torch's restricted reader opens (`check_tensors`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ec2face_core.backbone import is_hub_id
from ec2face_core.io.paths import resolve
from ec2face_core.perception import WeightsError, first_bytes
from ec2face_core.runs import file_sha256

# A FluxPipeline folder: `black-forest-labs/FLUX.1-dev` without its two single-file copies.
NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "vae")
TOKENIZERS = ("tokenizer", "tokenizer_2")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")  # a tokenizer has one of these
CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack")
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


def check_safetensors(path: Path, tensors: Collection[str] = ()) -> None:
    """Accept a complete safetensors file that holds these tensors; only its header is read.

    Raises:
        WeightsError: the file is missing, incomplete, damaged or of another kind, or lacks tensors.
    """
    from safetensors import SafetensorError, safe_open

    first_bytes(path)
    try:
        with safe_open(path, "np") as file:
            lost = [name for name in tensors if name not in set(file.keys())]
    except SafetensorError as error:
        raise WeightsError(f"{path}: {_damage(path, error)}") from error
    if lost:
        raise WeightsError(f"{path}: lacks {len(lost)} tensors, such as {lost[0]}")


def _damage(path: Path, error: Exception) -> str:
    """Why a safetensors file is refused; for an incomplete one the expected and found bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            return "is no safetensors file (a pickle by another name?)"
        header = file.read(length)
    if size < 8 + length:
        return f"half-downloaded, expected more than {8 + length:,} bytes, found {size:,}"
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        expected = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        return f"its safetensors header is damaged ({error})"
    if size == expected:
        return f"is damaged ({error})"
    word = "half-downloaded" if size < expected else "too long"
    return f"{word}, expected {expected:,} bytes, found {size:,}"


def check_tensors(path: Path) -> None:
    """Accept a pickled mapping of tensors only; torch's restricted unpickler reads it.

    Raises:
        WeightsError: the file is missing or incomplete, or holds more than tensors.
    """
    import torch

    first_bytes(path)
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch passes on the errors of pickle and zipfile
        raise WeightsError(
            f"{path}: is no mapping of tensors, or half of one ({str(error).splitlines()[0]}): "
            "download it again"
        ) from error


def check_hash(path: Path) -> None:
    """Read a file whose hash is recorded and compare; accept other files unread.

    Raises:
        WeightsError: the file is missing, or its content is not the recorded one.
    """
    first_bytes(path)
    expected = recorded_hash(path)
    if expected is None:
        return
    actual = file_sha256(path)[: len(expected)]
    if actual != expected:
        raise WeightsError(
            f"{path}: damaged, its SHA-256 is {actual}, not {expected}: delete it and download it "
            "again"
        )


def recorded_hash(path: Path) -> str | None:
    """SHA-256 (or its beginning) that the hub's cache or the file's own name records."""
    match = re.fullmatch(r"[0-9a-f]{64}|.*-([0-9a-f]{8})\.pth", path.resolve().name)
    if match:
        return match[1] or match[0]
    for folder in path.parents:  # `hf download --local-dir folder` keeps commit, hash and time here
        name = f"{path.relative_to(folder)}.metadata"
        record = folder / ".cache" / "huggingface" / "download" / name
        if record.is_file():
            match = re.search(r"^[0-9a-f]{64}$", record.read_text(), re.M)
            return match[0] if match else None
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; WeightsError where it is missing or no mapping."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: unreadable ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: unreadable (no mapping)")
    return content


def problems_of(check: Callable[..., object], *args: Any) -> list[str]:
    """The message of a check that fails; nothing where it passes."""
    try:
        check(*args)
    except (WeightsError, RuntimeError) as error:
        return [str(error)]
    return []


# ------------------------------------------------------------------------------- whole folders


def pipeline_problems(folder: Path) -> list[str]:
    """Everything that is missing, incomplete or refused in a FluxPipeline folder."""
    problems = problems_of(_check_flux, folder / "model_index.json")
    settings = [f"{name}/config.json" for name in NETWORKS]
    settings += [f"{name}/tokenizer_config.json" for name in TOKENIZERS]
    for name in (*settings, "scheduler/scheduler_config.json"):
        problems += problems_of(read_json, folder / name)
    for name in TOKENIZERS:
        if not any((folder / name / file).is_file() for file in VOCABULARIES):
            problems.append(f"{folder / name}: has none of {', '.join(VOCABULARIES)}")
    for name in NETWORKS:
        problems += _network_problems(folder / name)
    return problems


def clip_problems(folder: Path) -> list[str]:
    """Everything that is missing, incomplete or refused in an open_clip folder."""
    settings, weights = (folder / name for name in CLIP_FILES)
    problems = problems_of(read_json, settings) + problems_of(check_safetensors, weights)
    return problems if weights.exists() else problems + _pickles(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a FluxPipeline or open_clip folder that are loaded."""
    networks = [path for name in NETWORKS for path in sorted((folder / name).glob("*.safetensors"))]
    clip = folder / CLIP_FILES[1]
    return [*networks, clip] if clip.exists() else networks


def local_folder(name: str, marker: str) -> Path | None:
    """A configured folder, or a hub id's folder in the local cache; None if neither. Offline.

    marker: a file of the repository, because the cache finds repositories by their files only.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = resolve(name)
    if folder.is_dir() or not is_hub_id(name):
        return folder if folder.is_dir() else None
    file = try_to_load_from_cache(name, marker)
    return Path(file).parent if isinstance(file, str) else None


def unfinished(name: str) -> list[str]:
    """Interrupted downloads of a hub id in the local cache, one line per file."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if resolve(name).is_dir() or not is_hub_id(name):
        return []
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    return [
        f"{path}: half-downloaded, {path.stat().st_size:,} bytes so far"
        for path in sorted(cache.glob("blobs/*.incomplete"))
    ]


def _check_flux(index: Path) -> None:
    kind = read_json(index).get("_class_name")
    if kind not in (None, "FluxPipeline"):
        raise WeightsError(f"{index}: is a {kind}, not the FluxPipeline of FLUX.1-dev")


def _network_problems(folder: Path) -> list[str]:
    """Problems of one network: a single safetensors file, or shards with their index."""
    names = ("diffusion_pytorch_model.safetensors", "model.safetensors")
    singles = [folder / name for name in names if (folder / name).exists()]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not singles and not indices:
        return [f"{folder}: no safetensors weights", *_pickles(folder)]
    problems = [line for path in singles for line in problems_of(check_safetensors, path)]
    for index in indices:
        problems += problems_of(read_json, index) or _shard_problems(index)
    return problems


def _shard_problems(index: Path) -> list[str]:
    shards: dict[str, list[str]] = {}  # file -> names of its tensors
    for tensor, file in read_json(index).get("weight_map", {}).items():
        shards.setdefault(file, []).append(tensor)
    problems: list[str] = []
    for file, tensors in sorted(shards.items()):
        problems += problems_of(check_safetensors, index.with_name(file), tensors)
    return problems


def _pickles(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    return [f"{folder / name}: pickled weights are refused, take the safetensors" for name in names]
