"""Weight files on disk: whole, untouched, and of a kind that runs no code. Nothing is loaded.

A safetensors file says in its header how long it is. The hub's caches name a file by its SHA-256,
and some files carry the beginning of theirs in their own name. Pickles run code when they are
opened, so none is accepted but TorchScript, whose code cannot leave torch. Two trained networks
exist as pickled tensors only: LPIPS's AlexNet, known by its hash, and facer's face detector, which
torch's restricted reader opens (`check_tensors`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ec2face_core.backbone import is_hub_id
from ec2face_core.config import resolve
from ec2face_core.perception import WeightsError, _refuse_pointer, _size

# A FluxPipeline folder: `black-forest-labs/FLUX.1-dev` without its two single-file copies.
NETWORKS = ("transformer", "text_encoder", "text_encoder_2", "vae")

TOKENIZERS = ("tokenizer", "tokenizer_2")

CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack")


def check_safetensors(path: Path) -> set[str]:
    """Names of the tensors of a whole safetensors file, from its header alone.

    Raises:
        WeightsError: no such file, another kind of file, or its size is not the header's.
    """
    size = _size(path)
    with open(path, "rb") as file:
        start = file.read(8)
        _refuse_pointer(path, start, file)
        length = int.from_bytes(start, "little")
        if length > 100_000_000:  # the format's own limit
            raise WeightsError(f"{path}: is no safetensors file (a pickle by another name?)")
        text = file.read(length)
    if len(text) < length:
        raise WeightsError(
            f"{path}: half-downloaded, expected more than {8 + length:,} bytes, found {size:,}"
        )
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise WeightsError(f"{path}: its safetensors header is damaged ({error})") from error
    if (expected := 8 + length + end) != size:
        word = "half-downloaded" if size < expected else "too long"
        raise WeightsError(f"{path}: {word}, expected {expected:,} bytes, found {size:,}")
    return set(tensors)


def check_tensors(path: Path) -> None:
    """Accept a pickled mapping of tensors only; read by torch's restricted unpickler.

    Raises:
        WeightsError: no such file, half of one, or one that holds more than tensors.
    """
    import torch

    _size(path)
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises what it meets: pickle's, zip's or its own
        raise WeightsError(
            f"{path}: is no mapping of tensors, or half of one ({str(error).splitlines()[0]}): "
            "download it again"
        ) from error


def recorded_hash(path: Path) -> str | None:
    """SHA-256 (or its beginning) that the hub's cache or the file's own name records."""
    found = re.fullmatch(r"[0-9a-f]{64}|.*-([0-9a-f]{8})\.pth", path.resolve().name)
    if found:
        return found[1] or found[0]
    for folder in path.parents:  # `hf download --local-dir folder` keeps commit, hash and time here
        relative = path.relative_to(folder)
        about = folder / ".cache" / "huggingface" / "download" / f"{relative}.metadata"
        if about.is_file():
            found = re.search(r"^[0-9a-f]{64}$", about.read_text(), re.M)
            return found[0] if found else None
    return None


def check_hash(path: Path) -> None:
    """Read a file whose hash is recorded and compare; other files pass.

    Raises:
        WeightsError: no such file, or the content is another one, as where a download left holes.
    """
    _size(path)
    if (expected := recorded_hash(path)) is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise WeightsError(
            f"{path}: damaged, its SHA-256 is {found[: len(expected)]}, not {expected}: delete it "
            "and download it again"
        )


def pipeline_problems(folder: Path) -> list[str]:
    """Everything that is missing, incomplete or refused in a FluxPipeline folder."""
    problems: list[str] = []
    index = folder / "model_index.json"
    kind = _json(index, problems).get("_class_name")
    if kind not in (None, "FluxPipeline"):
        problems.append(f"{index}: is a {kind}, not the FluxPipeline of FLUX.1-dev")
    wanted = [f"{name}/config.json" for name in NETWORKS]
    wanted += [f"{name}/tokenizer_config.json" for name in TOKENIZERS]
    for name in (*wanted, "scheduler/scheduler_config.json"):
        _json(folder / name, problems)
    for name in TOKENIZERS:
        words = ("tokenizer.json", "vocab.json", "spiece.model")
        if not any((folder / name / file).is_file() for file in words):
            problems.append(f"{folder / name}: has none of {', '.join(words)}")
    for name in NETWORKS:
        problems += _network_problems(folder / name)
    return problems


def clip_problems(folder: Path) -> list[str]:
    """Everything that is missing, incomplete or refused in an open_clip folder."""
    config, weights = (folder / name for name in CLIP_FILES)
    problems: list[str] = []
    _json(config, problems)
    _check(check_safetensors, weights, problems)
    if not weights.exists():
        problems += _pickles(folder)
    return problems


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a FluxPipeline or open_clip folder that are loaded."""
    networks = [path for name in NETWORKS for path in sorted((folder / name).glob("*.safetensors"))]
    clip = folder / CLIP_FILES[1]
    return [*networks, clip] if clip.exists() else networks


def local_folder(name: str, marker: str) -> Path | None:
    """A configured folder, or a hub id's folder in the local cache; None if neither. Offline.

    marker: a file that the repository has, for the cache knows repositories by their files only.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    folder = resolve(name)
    if folder.is_dir() or not is_hub_id(name):
        return folder if folder.is_dir() else None
    found = try_to_load_from_cache(name, marker, cache_dir=constants.HF_HUB_CACHE)
    return Path(found).parent if isinstance(found, str) else None


def unfinished(name: str) -> list[str]:
    """What the local cache holds of a hub id's interrupted downloads, one line a file."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if resolve(name).is_dir() or not is_hub_id(name):
        return []
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    return [
        f"{path}: half-downloaded, {path.stat().st_size:,} bytes so far"
        for path in sorted(cache.glob("blobs/*.incomplete"))
    ]


def _network_problems(folder: Path) -> list[str]:
    """Problems of one network: a single safetensors file, or shards with their index."""
    problems: list[str] = []
    singles = [folder / f"{stem}.safetensors" for stem in ("diffusion_pytorch_model", "model")]
    singles = [path for path in singles if path.exists()]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    for path in singles:
        _check(check_safetensors, path, problems)
    for index in indices:
        placed = _json(index, problems).get("weight_map", {})
        for shard in sorted(set(placed.values())):
            names = _check(check_safetensors, folder / shard, problems)
            lost = [k for k, file in placed.items() if file == shard and k not in (names or (k,))]
            if lost:
                problems.append(f"{folder / shard}: lacks {len(lost)} tensors, such as {lost[0]}")
    if not singles and not indices:
        problems.append(f"{folder}: no safetensors weights")
        problems += _pickles(folder)
    return problems


def _pickles(folder: Path) -> Iterable[str]:
    found = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
    return [f"{folder / name}: pickled weights are refused, take the safetensors" for name in found]


def _check(check: Callable[[Path], set[str]], path: Path, problems: list[str]) -> set[str] | None:
    try:
        return check(path)
    except WeightsError as error:
        problems.append(str(error))
        return None


def _json(path: Path, problems: list[str]) -> dict:
    """Content of a JSON file; {} and a problem where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        raise ValueError("no mapping")
    except FileNotFoundError:
        problems.append(f"{path}: missing")
    except (OSError, ValueError) as error:
        problems.append(f"{path}: unreadable ({error})")
    return {}
