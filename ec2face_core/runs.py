"""What a run leaves on disk: whole files, content hashes, the metrics log, and provenance.

    metrics.jsonl   one line per optimiser step

Files and folders appear whole or not at all: they are written beside their place and then renamed
(metrics.jsonl, which is appended to, may end with half a line, which readers ignore). What a killed
process has left beside it is removed by `remove_leftovers`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import Config
from .io.paths import CODE, ROOT, resolve, user_path

_T = TypeVar("_T")
_R = TypeVar("_R")

# --------------------------------------------------------------------- whole files, content hashes


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write; it gets the name `path` when the block ends without an error.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing half-written stays.
    """
    from safetensors import SafetensorError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    part = part_name(path)
    try:
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it replaces `path` when the block ends without an error.

    Raises:
        OSError: as for `whole_file`.
    """
    from safetensors import SafetensorError

    remove_leftovers(path.parent)
    part = part_name(path)
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            remove(path)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def part_name(path: Path) -> Path:
    """Where this process writes what will become `path`."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine were writing in a folder (`part_name`)."""
    ending = re.compile(rf"\..+\.{re.escape(platform.node())}\.(\d+)")
    for path in folder.glob(".*") if folder.is_dir() else ():
        match = ending.fullmatch(path.name)
        if match and not _is_running(match[1]):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link (not what it leads to); what is gone stays gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)  # signal 0 only asks whether the process exists
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _cannot_write(path: Path, error: Exception) -> OSError:
    free = shutil.disk_usage(path.parent).free / 1e9
    return OSError(
        f"cannot write {path}: {error} ({free:.1f} GB free). What was written before stays valid: "
        "make room and run the same command again"
    )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented, in one move."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one move; equal content gives equal bytes.

    Raises:
        OSError: as for `whole_file`.
    """
    from safetensors.torch import save_file

    with whole_file(path) as part:
        flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(flat, part, dict(metadata or {}))
        _sort_metadata(part)


def tensors_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of contiguous CPU tensors by name, and of what is said of them."""
    total = hashlib.sha256(json.dumps(dict(metadata or {}), sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].numpy().data)
    return total.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata, which it writes in any order, in one order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # else it stays as it is, which is valid, too
            file.seek(8)
            file.write(text.ljust(length))


def content_key(parts: Any, digits: int = 12) -> str:
    """First hex digits of the SHA-256 of JSON-ready values: a key for what derives from them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:digits]


SUMS = "SHA256SUMS"  # lists of hashes, see `io/sums.py`
LARGE = 32 * 2**20  # bytes above which a file is known by samples of its content
FRESH = 2 * 10**9  # nanoseconds in which a second change of a file might not show in its times
SAMPLES = 33  # of 1 MB each, the first and the last among them


def path_digest(path: Path) -> str:
    """Sixteen hex digits of a file's content, or of every file under a folder ("absent" if none).

    Of a file above 32 MB the size and 33 MB that are spread evenly count, so that a copy on another
    disk has the same digest, and FLUX.1-dev's takes a second.
    """
    if not path.exists():
        return "absent"
    files = [path]
    if path.is_dir():  # a list of hashes adds nothing to the content
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.name != SUMS)
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        content = _sampled(file, size) if size > LARGE else file_digest(file)
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        total.update(name.encode() + b"\0" + content)
    return total.hexdigest()[:16]


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file; read again only when its size or one of its times changes.

    Times advance in small steps, so a file that has just been written is read each time.
    """
    stat = path.stat()
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < FRESH:
        return bytes.fromhex(file_sha256(path))
    state = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return _digest_of(path.absolute(), *state)


@functools.lru_cache(maxsize=500_000)
def _digest_of(path: Path, *_: int) -> bytes:
    return bytes.fromhex(file_sha256(path))


def _sampled(path: Path, size: int) -> bytes:
    total = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for k in range(SAMPLES):
            file.seek((size - 2**20) * k // (SAMPLES - 1))
            total.update(file.read(2**20))
    return total.digest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- metrics log


METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"  # a row for each drawing of validation faces


def read_metrics(run_dir: Path | str, name: str = METRICS_FILE) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, in order; broken lines are left out.

    A row has step, samples (so far, over all processes), lr, seconds (of the step),
    samples_per_second, peak_memory_gb (of rank 0 so far), grad_norm (before clipping) and means
    over the computed samples: t, total, flow, text, mask, beta (the parts of Eq. 12) and
    unweighted_flow (Eq. 3 whatever the weights are).
    """
    path = user_path(run_dir) / name
    rows: list[dict[str, float]] = []
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def cut_metrics(run_dir: Path, step: int, name: str = METRICS_FILE) -> None:
    """Drop the rows after `step`: a resumed run does these steps again."""
    rows = [row for row in read_metrics(run_dir, name) if row["step"] <= step]
    with whole_file(run_dir / name) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_metrics(
    run_dir: Path, rows: Sequence[Mapping[str, float]], name: str = METRICS_FILE
) -> None:
    """Append rows."""
    path = run_dir / name
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise _cannot_write(path, error) from error


def progress_line(rows: Sequence[Mapping[str, float]], steps: int) -> str:
    """One line for a terminal about some steps of a training of `steps` steps: their means."""
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}
    step = int(rows[-1]["step"])
    return (
        f"step {step}/{steps}  loss {mean['total']:.4f}  flow {mean['flow']:.4f}  "
        f"text {mean['text']:.4f}  mask {mean['mask']:.4f}  gradient {mean['grad_norm']:.3f}  "
        f"lr {rows[-1]['lr']:.1e}  {mean['seconds']:.3f} s/step  "
        f"{mean['samples_per_second']:.1f} samples/s  {rows[-1]['peak_memory_gb']:.1f} GB  "
        f"{(steps - step) * mean['seconds'] / 60:.1f} min left"
    )


# -------------------------------------------------------------------------------------- provenance

PACKAGES = (
    "ec2face-core", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate",
    "open_clip_torch", "pyfacer", "lpips", "pyiqa", "numpy", "pandas", "matplotlib",
)  # fmt: skip


def provenance(
    config: Config,
    *,
    notebook: str | None = None,
    seconds: float | None = None,
    inputs: Iterable[str | Path] = (),
    **parameters: Any,
) -> dict[str, Any]:
    """What made a result, as JSON-ready values.

    Args:
        config: the experiment.
        notebook: its name; default: what the runner or JupyterLab says it is.
        seconds: how long the computation took.
        inputs: files and folders that were read; each is recorded by name and content hash.
        parameters: whatever else shaped the result (the notebook's parameters, variants, ...).
    """
    commit, dirty = git_state()
    running = os.environ.get("EC2FACE_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME") or ""
    return {
        "notebook": notebook or Path(running).name or None,
        "profile": config.profile,
        "seeds": {
            "run": config.seed, "data": config.data.seed, "sampling": config.sampling.seed,
        },
        "parameters": parameters,
        "commit": commit,
        "dirty": dirty,
        "config_hash": config.digest(),
        "inputs": {_relative(resolve(path)): path_digest(resolve(path)) for path in inputs},
        "packages": {"python": platform.python_version(), **_versions()},
        "device": _device(),
        "seconds": None if seconds is None else round(seconds, 2),
    }  # fmt: skip


def git_state() -> tuple[str | None, bool | None]:
    """The commit, and whether the tree differs from it.

    A copy of a tree says its commit in the environment's EC2FACE_COMMIT. Outside a repository:
    that one or None, and None.
    """

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *command], cwd=CODE, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain")
    commit = os.environ.get("EC2FACE_COMMIT") or git("rev-parse", "--verify", "HEAD")
    return commit, None if changed is None else bool(changed)


def _relative(path: Path) -> str:
    """A path as results record it: below the repository root, else the bare name."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


# ----------------------------------------------------------------------------------- parallel work


def parallel(
    function: Callable[[_T], _R], items: Iterable[_T], progress: str | None = None
) -> Iterator[_R]:
    """Map over items on threads, in order, with a progress bar.

    Args:
        function: releases the interpreter lock, as decoding images does. Results wait in memory for
            a slow consumer, so it should return little; and lists rather than tensors, for small
            tensors that lie between freed large ones keep the large ones' memory.
        items: the work.
        progress: label of the bar; None: no bar.
    """
    from tqdm.auto import tqdm

    items = list(items)
    with ThreadPoolExecutor() as pool:
        results = pool.map(function, items)
        hidden = progress is None
        yield from tqdm(results, progress, len(items), mininterval=1.0, disable=hidden)
