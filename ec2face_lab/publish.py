"""Make what a run wrote the published results: figures, tables, report, gallery and pages.

A run writes to `runs/<profile>`; `figures/<profile>`, `docs/gallery` and the marked parts of the
pages change here alone. Everything published comes from one commit, and a manifest lists the hash
of each file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ec2face_core.config import Config, UserError
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import git_state, write_json

from .gallery import render
from .reproduce import Outcome, up_to_date
from .study.claims import judged
from .study.pages import DOCS, GALLERY, MANIFEST, PAGES, SHOWN, update
from .study.verdicts import Results

PLAIN = {"profile", "train", "seeds", "sweeps"}  # parameters that leave the experiment as it is


class PublishError(UserError, ValueError):
    """Results that may not be published; the message names every reason."""


def gallery_dir(config: Config) -> Path:
    """Folder of a profile's rendered notebooks."""
    return GALLERY if config.profile == SHOWN else DOCS / f"gallery-{config.profile}"


def publish(notebooks: Sequence[Path], config: Config) -> Path:
    """Publish a run into `figures/<profile>` and the gallery; returns the manifest.

    The pages show profile `SHOWN`, so a run of it writes their numbers, too.

    Args:
        notebooks: all of them, in order.
        config: the profile.

    Raises:
        PublishError: the tree is not clean, a notebook is not up to date, or they are not of one
            commit.
    """
    outcomes = checked(notebooks, config)
    made = {name for outcome in outcomes.values() for name in outcome.artefacts}
    fresh = config.published_dir.with_name(f"{config.published_dir.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in sorted(made):
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config.figure_dir / name, fresh / name)
    write_json(fresh / MANIFEST, manifest(fresh, outcomes, config))
    old = config.published_dir.with_name(f"{config.published_dir.name}.old")
    if config.published_dir.exists():
        os.replace(config.published_dir, old)
    os.replace(fresh, config.published_dir)
    shutil.rmtree(old, ignore_errors=True)
    gallery = gallery_dir(config)
    _prune(gallery, make_gallery(notebooks, config, gallery))
    update_pages(config)
    return config.published_dir / MANIFEST


def update_pages(config: Config) -> None:
    """Write the numbers in the pages anew, if they show this profile."""
    for page in PAGES if config.profile == SHOWN else ():
        update(ROOT / page, config)


def checked(notebooks: Sequence[Path], config: Config) -> dict[str, Outcome]:
    """The kept outcome of each notebook, all up to date and of one clean commit.

    Raises:
        PublishError: see `publish`.
    """
    commit, dirty = git_state()
    reasons = []
    if commit is None or dirty is None:
        reasons.append("this is no git repository, so nothing names the commit of the results")
    elif dirty:
        reasons.append("the tree has uncommitted changes: `git status` lists them")
    outcomes = {}
    for notebook in notebooks:
        outcome = up_to_date(notebook, config)
        if outcome is None:
            reasons.append(f"{notebook.stem} is not up to date")
        else:
            outcomes[notebook.stem] = outcome
            if outcome.dirty is not False:
                reasons.append(f"{notebook.stem} ran with uncommitted changes")
            if changed := sorted(set(outcome.parameters) - PLAIN):
                reasons.append(f"{notebook.stem} ran with other parameters: {', '.join(changed)}")
    commits = sorted({str(outcome.commit)[:8] for outcome in outcomes.values()})
    if len(commits) > 1:
        reasons.append(f"the notebooks ran at several commits: {', '.join(commits)}")
    if reasons:
        remedy = f"`make reproduce PROFILE={config.profile} FORCE=1` in a clean tree runs all anew"
        raise PublishError("\n".join(["nothing was published:", *reasons, remedy]))
    return outcomes


def manifest(folder: Path, outcomes: Mapping[str, Outcome], config: Config) -> dict[str, Any]:
    """Where each published file comes from, its hash, and the verdict of each claim."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    source = {name: stem for stem, outcome in outcomes.items() for name in outcome.artefacts}
    names = {path.relative_to(folder).as_posix(): path for path in files if path.name != MANIFEST}
    verdicts = judged(Results(config, folder))
    return {
        "profile": config.profile,
        "commit": next((outcome.commit for outcome in outcomes.values()), None),
        "config": config.digest(),
        "notebooks": {
            stem: {"parameters": o.parameters, "seconds": o.seconds, "memory": o.memory}
            for stem, o in outcomes.items()
        },
        "files": {
            name: {"notebook": source.get(name), "sha256": sha256(path)}
            for name, path in names.items()
        },
        "verdicts": {key: answer.verdict for key, answer in verdicts.items()},
    }


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_gallery(notebooks: Sequence[Path], config: Config, out: Path) -> list[Path]:
    """Render the executed copies of a run and return the written files.

    Args:
        notebooks: whose copies are rendered.
        config: the profile.
        out: the folder.

    Raises:
        PublishError: a notebook has no executed copy.
    """
    copies = {notebook: config.run_dir / "notebooks" / notebook.name for notebook in notebooks}
    if missing := [notebook.stem for notebook, copy in copies.items() if not copy.is_file()]:
        raise PublishError(f"no executed copy of {', '.join(missing)}: `make reproduce` makes them")
    return [path for notebook, copy in copies.items() for path in render(copy, out, notebook)]


def _prune(folder: Path, kept: Sequence[Path]) -> None:
    """Remove every other file, and folders that this leaves empty."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path not in kept:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
