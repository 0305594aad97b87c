"""Reproduce the paper: every numbered notebook in order through papermill, strict and resumable.

A notebook is skipped while everything that shapes it is unchanged (its code, its parameters, both
packages, the profile, the bundle, the kept LoRAs and the manifests) and its figures and tables are
those that it made, by content: what another run has replaced is made again. Papermill alone reports
several failures as success. Therefore a parameter that no notebook declares is refused, each
notebook runs in a child process whose exit code counts (a killed kernel leaves a copy that looks
complete), a cell that was not executed counts as a failure, and the stamp "up to date" is written
last.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ec2face_core
import ec2face_lab
from ec2face_core.config import Config, ConfigError, named
from ec2face_core.data import open_dataset
from ec2face_core.io.paths import ROOT, resolve
from ec2face_core.io.settings import read_yaml
from ec2face_core.runs import content_key, git_state, path_digest, remove_leftovers, write_json

from .cache import code_digest
from .gallery import tidy_file
from .launch import child_environment, stop, tied

ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # tags of cells that papermill adds

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended; `key` names everything that shaped it."""

    status: str  # done | up to date | elsewhere (of other profiles) | FAILED
    key: str
    parameters: Parameters
    seconds: float = 0.0
    memory: int = 0  # bytes, peak of the whole process tree
    artefacts: tuple[str, ...] = ()
    error: str = ""
    digests: tuple[str, ...] = ()  # of the executed copy and the artefacts
    commit: str | None = None
    dirty: bool | None = None  # whether the tree differed from the commit


def run_notebooks(
    assigned: Mapping[Path, Parameters],
    config: Config,
    force: bool = False,
    keep_going: bool = False,
) -> bool:
    """Run notebooks in order, one line of report each; returns whether all of them succeeded.

    Args:
        assigned: each notebook's parameters, from `assign`.
        config: names the output folders, and is part of every notebook's identity.
        force: run also notebooks that are up to date.
        keep_going: run the other notebooks after a failure.
    """
    out = config.run_dir / "notebooks"
    print(f"{len(assigned)} notebooks, profile {config.profile}; logs in {_shown(out)}", flush=True)
    started = time.monotonic()
    make_data(config)
    failed: list[str] = []
    width = max(len(notebook.stem) for notebook in assigned)
    for notebook, parameters in assigned.items():
        print(f"{notebook.stem:{width}}  ", end="", flush=True)
        outcome = run_notebook(notebook, parameters, config, force=force)
        print(_line(outcome), flush=True)
        if outcome.error:
            failed.append(notebook.stem)
            print(f"{outcome.error}\nexecuted copy and log: {_shown(out / notebook.stem)}.*")
            if not keep_going:
                break
    if git_state()[1]:
        print("note: uncommitted changes; the provenance of new results says `dirty`")
    print(f"figures and tables: {_shown(config.figure_dir)}; executed notebooks: {_shown(out)}")
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all up to date"
    print(f"{verdict} after {time.monotonic() - started:.0f} s", flush=True)
    return not failed


def make_data(config: Config) -> None:
    """Make the procedural faces of a profile, which are part of every notebook's identity."""
    if config.data.procedural:
        for split in ("test", "zero_shot", "rare"):
            if getattr(config.data, split):
                open_dataset(config, split)


def select(folder: Path, only: Iterable[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder in order, or those with the given numbers."""
    known = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    wanted = sorted({number.zfill(2) for number in only}) or list(known)
    if missing := [number for number in wanted if number not in known]:
        raise ConfigError(f"--only {' '.join(missing)}: no such notebook; known: {list(known)}")
    if not wanted:
        raise ConfigError(f"no numbered notebook (NN_name.ipynb) in {folder}")
    return [known[number] for number in wanted]


def assign(notebooks: Sequence[Path], requested: Mapping[str, str]) -> dict[Path, Parameters]:
    """The parameters of each notebook: of the requested ones those that it declares, typed.

    Args:
        notebooks: paths, in order.
        requested: name -> value as text; each has to be declared by a notebook.

    Returns:
        The parameters by notebook, in the same order.

    Raises:
        ConfigError: a name that no notebook declares, a value of another type, or a notebook
            without the parameter `profile`.
    """
    import papermill

    declared = {path: papermill.inspect_notebook(str(path)) for path in notebooks}
    names = sorted({name for parameters in declared.values() for name in parameters})
    for name in requested:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"no selected notebook has {name!r}{hint}; declared: {names}")
    for path, parameters in declared.items():
        if "profile" not in parameters:
            raise ConfigError(f"{path.name}: its `parameters` cell does not declare `profile`")
    return {
        path: {
            name: _typed(name, text, parameters[name]["inferred_type_name"])
            for name, text in requested.items()
            if name in parameters
        }
        for path, parameters in declared.items()
    }


def _typed(name: str, text: str, kind: str) -> Any:
    """A command-line value as the type that the notebook declares (1e-4 is a float, not text)."""
    choices = {"true": True, "false": False, "1": True, "0": False}
    if kind == "dict" and isinstance(value := read_yaml(text, f"parameter {name}"), dict):
        return named(value)  # settings that replace those of the profile
    try:
        if kind == "bool":
            return choices[text.lower()]
        if kind == "dict":
            raise TypeError
        return {"int": int, "float": float}.get(kind, str)(text)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"parameter {name}: expected {kind}, got {text!r}") from None


def run_notebook(
    notebook: Path, parameters: Parameters, config: Config, force: bool = False
) -> Outcome:
    """Execute a notebook into `runs/<profile>/notebooks/`, unless its stamp is up to date.

    Args:
        notebook: its path.
        parameters: from `assign`.
        config: names the output folders and is part of the identity.
        force: execute also an up-to-date notebook.
    """
    out = config.run_dir / "notebooks"
    stamp = out / f"{notebook.stem}.json"
    copy = out / notebook.name
    kept = None if force else up_to_date(notebook, config, parameters)
    if kept:
        return dataclasses.replace(kept, status="up to date")

    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(config.figure_dir)
    stamp.unlink(missing_ok=True)
    before = _modified(config.figure_dir)
    commit, dirty = git_state()
    key = identity(notebook, parameters, config)
    copy.unlink(missing_ok=True)
    started = time.monotonic()
    code, memory = _papermill(notebook, copy, parameters)
    seconds = round(time.monotonic() - started, 1)
    after = _modified(config.figure_dir)
    artefacts = tuple(sorted(name for name in after if after[name] != before.get(name)))
    elsewhere = _is_elsewhere(copy, code)
    error = "" if elsewhere else describe_failure(copy, code)
    if not error:
        tidy_file(copy)
    status = "FAILED" if error else "elsewhere" if elsewhere else "done"
    digests = _digests(copy, artefacts, config.figure_dir)
    outcome = Outcome(
        status, key, parameters, seconds, memory, artefacts, error, digests, commit, dirty
    )
    if not error:  # what the notebook itself has made, such as procedural faces, counts, too
        outcome = dataclasses.replace(outcome, key=identity(notebook, parameters, config))
        write_json(stamp, dataclasses.asdict(outcome))
    return outcome


def up_to_date(
    notebook: Path, config: Config, parameters: Parameters | None = None
) -> Outcome | None:
    """The kept outcome of a notebook, or None if it has to run.

    Args:
        notebook: its path.
        config: names the output folders and is part of the identity.
        parameters: that a run would have; None: those of the kept run.
    """
    out = config.run_dir / "notebooks"
    kept = _read_stamp(out / f"{notebook.stem}.json")
    if kept is None or kept.parameters != (kept.parameters if parameters is None else parameters):
        return None
    if kept.key != identity(notebook, kept.parameters, config):
        return None
    digests = _digests(out / notebook.name, kept.artefacts, config.figure_dir)
    return kept if digests == kept.digests else None


def identity(notebook: Path, parameters: Parameters, config: Config) -> str:
    """Sixteen hex digits of everything that shapes a notebook's results."""
    import nbformat
    import papermill

    cells = nbformat.read(notebook, as_version=4).cells
    inputs = [ROOT / "data/mini", ROOT / "data/paper"]
    roots = [resolve(root) for root in (config.data.root, config.data.zero_shot_root)]
    inputs += [root / "manifest.csv" for root in roots]
    if config.data.procedural:  # small, so every picture counts
        inputs += [root / kind for root in roots for kind in ("image", "mask")]
    if any("save_report" in cell.source for cell in cells):  # reads what the others wrote
        inputs += _earlier_tables(notebook, config.figure_dir)
    if "train" not in papermill.inspect_notebook(str(notebook)):
        # a notebook that trains writes these, so they are no inputs of it
        kept = ("adapters", "sweeps/sweeps.csv", "fairness/fairness.csv", "baselines")
        inputs += [config.run_dir / name for name in kept]
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    digests = [_packages_digest(), config.digest(), *(path_digest(path) for path in inputs)]
    return content_key([code, sorted(parameters.items()), digests], digits=16)


def _earlier_tables(notebook: Path, folder: Path) -> list[Path]:
    """The tables of a folder, but those of notebooks that run after this one."""
    tables = []
    for path in sorted(folder.glob("*.csv")):
        record = path.with_suffix(".json")
        author = json.loads(record.read_text())["notebook"] if record.is_file() else None
        if not author or author < notebook.stem:
            tables.append(path)
    return tables


@functools.cache
def _packages_digest() -> str:
    """`code_digest` of all modules of both packages."""
    modules = [
        module.name
        for package in (ec2face_core, ec2face_lab)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    return code_digest(["ec2face_core", *modules])


def describe_failure(copy: Path, code: int) -> str:
    """Which cell failed and how; '' for a complete copy and exit code 0."""
    import nbformat

    if not copy.exists():
        return f"papermill ended with code {code} before the first cell; see the log"
    try:
        executed_copy = nbformat.read(copy, as_version=4)
    except (OSError, ValueError) as error:  # NotJSONError is a ValueError
        reason = str(error).splitlines()[0][:100]
        return f"the executed copy cannot be read ({reason}): is the disk full? see the log"
    cells = [cell for cell in executed_copy.cells if not ADDED & set(cell.metadata.get("tags", ()))]
    executed = [
        i for i, cell in enumerate(cells, start=1)
        if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time")
    ]  # fmt: skip
    if code == 0:
        # `raise SystemExit(0)` ends a notebook silently, before its other cells are started
        for i, cell in enumerate(cells, start=1):
            if cell.cell_type == "code" and cell.source.strip() and i not in executed:
                return f"cell {i} `{_first_line(cell.source)}` was not executed"
        return ""
    if not executed:
        return f"papermill ended with code {code} before the first cell; see the log"
    cell = cells[executed[-1] - 1]
    errors = [output for output in cell.outputs if output.output_type == "error"]
    reason = f"papermill ended with code {code}: the kernel was killed (out of memory?)"
    if errors:
        reason = f"{errors[-1].ename}: {errors[-1].evalue}"
    return f"cell {executed[-1]} `{_first_line(cell.source)}`: {reason}"


def _is_elsewhere(copy: Path, code: int) -> bool:
    """Whether a notebook ended by saying that it does not belong to the profile."""
    import nbformat

    if code == 0 or not copy.exists():
        return False
    try:
        cells = nbformat.read(copy, as_version=4).cells
    except (OSError, ValueError):
        return False
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    errors = [output for output in outputs if output.output_type == "error"]
    return bool(errors) and errors[-1].ename == "NotInProfileError"


def _papermill(notebook: Path, copy: Path, parameters: Parameters) -> tuple[int, int]:
    """Run papermill as a child; returns its exit code and the peak memory of its process tree."""
    command = [sys.executable, "-m", "papermill", str(notebook), str(copy), "--cwd"]
    command += [str(notebook.parent), "-k", "python3", "--no-progress-bar", "--log-output"]
    for name, value in parameters.items():
        if isinstance(value, dict):
            command += ["-y", json.dumps({name: value})]  # JSON is YAML
        else:
            command += ["-r" if isinstance(value, str) else "-p", name, str(value)]
    environment = child_environment() | {"EC2FACE_NOTEBOOK": notebook.stem}
    with copy.with_suffix(".log").open("w") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=tied()
        )
        memory = 0
        try:
            while child.poll() is None:
                memory = max(memory, _tree_memory(child.pid))
                time.sleep(2.0)  # reading the maps of large processes takes a while
        except BaseException:  # interrupted: a papermill that is terminated ends its kernel, too
            stop(child)
            raise
    return child.returncode, memory


def _tree_memory(pid: int) -> int:
    """Resident bytes of a process and its descendants now; shared pages count once (on Linux)."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            memory = member.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    except psutil.Error:  # a process has just ended
        pass
    return total


def _read_stamp(path: Path) -> Outcome | None:
    """The outcome that a stamp holds; None if there is none, or another version wrote it."""
    try:
        kept = json.loads(path.read_text())
        lists = {name: tuple(kept[name]) for name in ("artefacts", "digests")}
        outcome = Outcome(**(kept | lists))
        _line(outcome)  # refuses numbers that are none
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return outcome


def _digests(copy: Path, artefacts: Sequence[str], folder: Path) -> tuple[str, ...]:
    return (path_digest(copy), *(path_digest(folder / name) for name in artefacts))


def _modified(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def _line(outcome: Outcome) -> str:
    """`done  34 s  1.2 GB  fig2, table1`"""
    names = ", ".join(sorted({Path(name).stem for name in outcome.artefacts}))
    return f"{outcome.status:10}  {outcome.seconds:6.0f} s  {outcome.memory / 1e9:5.1f} GB  {names}"


def _first_line(source: str) -> str:
    return source.strip().partition("\n")[0]


def _shown(path: Path) -> str:
    return os.path.relpath(path)
