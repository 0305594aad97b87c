"""What a run leaves on disk: whole files, checkpoints, the metrics log, and provenance.

    checkpoints/step_000250/{state.safetensors, state.json}   training state with its SHA-256
    metrics.jsonl                                             one line per optimiser step

Files and folders appear whole or not at all: they are written beside their place and then renamed
(metrics.jsonl, which is appended to, may end with half a line, which readers ignore).
A checkpoint that was damaged later is recognised by its hash, named, and the one before it is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import ROOT, Config, ConfigError, digest_values, resolve, user_path
from .paths import CODE

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

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
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

    for left in path.parent.glob(f".{path.name}.*"):
        if not _is_running(left.suffix[1:]):  # a process was killed here
            shutil.rmtree(left, ignore_errors=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            shutil.rmtree(path)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


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


def content_key(parts: Any, digits: int = 12) -> str:
    """First hex digits of the SHA-256 of JSON-ready values: a key for what derives from them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:digits]


LARGE = 32 * 2**20  # bytes above which a file is known by size and time instead of its content


def path_digest(path: Path) -> str:
    """Sixteen hex digits of a file's content, or of every file under a folder ("absent" if none).

    Files above 32 MB count by size and modification time.
    """
    if not path.exists():
        return "absent"
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        stat = file.stat()
        content = f"{stat.st_size} {stat.st_mtime_ns}".encode()
        if stat.st_size <= LARGE:
            content = hashlib.sha256(file.read_bytes()).digest()
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        total.update(name.encode() + b"\0" + content)
    return total.hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- checkpoints

TENSORS = "state.safetensors"
STATE = "state.json"

# Settings that may change when a training is resumed.
MAY_CHANGE = {
    "profile", "adapters", "data.validation", "sampling", "evaluation", "baselines",
    "perception.scoring_parser", "perception.scoring_clip", "perception.scoring_facts",
    "trainer.steps", "trainer.batch_size", "trainer.accumulation", "trainer.num_processes",
    "trainer.gradient_checkpointing", "trainer.recompute_every", "trainer.compile",
    "trainer.shard", "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.log_every",
}  # fmt: skip


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder/step_<step>` and delete all but the newest `keep` checkpoints.

    Args:
        folder: the checkpoints of one training.
        step: optimiser steps done.
        tensors: the training state, see `training_tensors`.
        about: further JSON-ready state.
        keep: checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full; the checkpoints that are there stay valid.
    """
    from safetensors.torch import save_file

    path = folder / f"step_{step:06d}"
    with whole_folder(path) as part:
        contiguous = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
        save_file(contiguous, part / TENSORS)
        state = {**about, "step": step, "sha256": file_sha256(part / TENSORS)}
        (part / STATE).write_text(json.dumps(state, indent=2) + "\n")
    for old in _newest_first(folder)[max(1, keep) :]:
        shutil.rmtree(old)
    return path


def newest_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and JSON of the newest valid checkpoint; None if there is none.

    Warns about every damaged one, by name.
    """
    from safetensors.torch import load_file

    for path in _newest_first(folder):
        try:
            state = json.loads((path / STATE).read_text())
            if file_sha256(path / TENSORS) != state["sha256"]:
                raise ValueError(f"the content of {TENSORS} does not have the recorded hash")
            return load_file(path / TENSORS), state
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(
                f"checkpoint {path} is damaged and is not used: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"), key=lambda p: int(p.name.split("_")[1]), reverse=True)


def training_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Parameters and their optimiser state by name: `<parameter>/value`, `<parameter>/exp_avg` ...

    parameters: in the order in which the optimiser received them.
    """
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()["state"]
    for i, (name, p) in enumerate(parameters.items()):
        tensors[f"{name}/value"] = p
        tensors |= {f"{name}/{key}": value for key, value in state[i].items()}
    return tensors


def restore_training(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `training_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(parameters))}
    number = {name: i for i, name in enumerate(parameters)}
    for key, value in tensors.items():
        name, _, quantity = key.partition("/")
        if quantity == "value":
            parameters[name].data.copy_(value)
        else:
            state[number[name]][quantity] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def training_identity(config: Config) -> dict[str, Any]:
    """The settings that a resumed training must share, flat: `{"loss.alpha_text": 0.5, ...}`."""

    def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if prefix + key not in MAY_CHANGE:
                nested = isinstance(value, dict)
                flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return flat

    flat = flatten(digest_values(config))
    if config.trainer.schedule == "cosine":  # then the length decides every step's rate
        flat["trainer.steps"] = config.trainer.steps
    return flat


def compare_identities(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Refuse to resume a training of other settings: ConfigError that names them.

    A setting that an older checkpoint does not record had the effect of its default.
    """
    before = training_identity(Config()) | before
    other = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if other:
        changes = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in other)
        raise ConfigError(
            f"{run_dir} holds a training with other settings ({changes}): use these, or another "
            "--run-dir, or delete it"
        )


# ------------------------------------------------------------------------------------- metrics log


def read_metrics(run_dir: Path | str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, in order; a half-written last line is left out.

    A row has step, samples (so far, over all processes), lr, seconds (of the step),
    samples_per_second, grad_norm (before clipping) and batch means: t, total, flow, text, mask,
    beta (the parts of Eq. 12) and unweighted_flow (Eq. 3 whatever the weights are).
    """
    path = user_path(run_dir) / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut_metrics(run_dir: Path, step: int) -> None:
    """Drop the rows after `step`: a resumed run does these steps again."""
    rows = [row for row in read_metrics(run_dir) if row["step"] <= step]
    with whole_file(run_dir / "metrics.jsonl") as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_metrics(run_dir: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Append rows."""
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


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
    commit, dirty = _git_state()
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


def _git_state() -> tuple[str | None, bool | None]:
    """The commit, and whether anything but `figures` differs from it.

    Outside a repository: the commit that the environment's EC2FACE_COMMIT names, or None; and None.
    """

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *command], cwd=CODE, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # A figure that was just saved must not make the next one look dirty.
    changed = git("status", "--porcelain", "--", ".", ":!figures")
    commit = git("rev-parse", "--verify", "HEAD") or os.environ.get("EC2FACE_COMMIT")
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
    function: Callable[[_T], _R],
    items: Iterable[_T],
    progress: str | None = None,
    processes: bool = False,
) -> Iterator[_R]:
    """Map over items, in order, with a progress bar.

    Args:
        function: results wait in memory for a slow consumer, so it should return little.
        items: the work.
        progress: label of the bar; None: no bar.
        processes: False: threads, for work that releases the interpreter lock (decoding images);
            True: processes; function, items and results have to be picklable.

    Raises:
        OSError: a process was killed.
    """
    from tqdm.auto import tqdm

    items = list(items)
    pool: Executor
    if processes:
        affinity = getattr(os, "sched_getaffinity", None)  # a cluster may lend fewer cores
        workers = min(len(items), len(affinity(0)) if affinity else os.cpu_count() or 1)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        pool = ProcessPoolExecutor(max(1, workers), context, torch.set_num_threads, (1,))
    else:
        pool = ThreadPoolExecutor()
    with pool:
        results = pool.map(function, items, chunksize=8)
        hidden = progress is None
        try:
            yield from tqdm(results, progress, len(items), mininterval=1.0, disable=hidden)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, most likely because memory ran out: run the same "
                "command again, it continues where it stopped"
            ) from error
