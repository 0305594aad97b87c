"""A base under way, kept in the bundle: `runs/` is not in git, and its trainings take hours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ec2face_core.config import UserError, load_profile
from ec2face_core.io.sums import list_sums
from ec2face_core.runs import SUMS, provenance, whole_file, whole_folder, write_json

from .pretrain import parameters_of


def keep(out: Path, work: Path) -> None:
    """Copy the base under way and its autoencoder into the bundle, as `out/base`.

    Args:
        out: folder of the bundle.
        work: folder of the foundation under way.

    Raises:
        UserError: there is no base yet.
    """
    if not (work / "base.json").is_file():
        raise UserError(
            f"{work} holds no base yet: run `python -m ec2face_lab pretrain flux` first"
        )
    record = provenance(load_profile("mini128"), **json.loads((work / "base.json").read_text()))
    with whole_folder(out / "base") as part:
        shutil.copytree(
            work / "base", part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SUMS)
        )
        write_json(part / "provenance.json", record)
    list_sums(out / "base")


def restore(start: Path, work: Path) -> None:
    """Begin a foundation under way with the autoencoder and the base of a folder.

    Of a FLUX whose guidance is distilled, which is no base to go on from, only the autoencoder.

    Args:
        start: what `keep` or a distillation wrote.
        work: folder of the foundation under way.

    Raises:
        UserError: the folder lacks its provenance, or another foundation is under way.
    """
    restore_autoencoder(start, work)
    made = parameters_of(start)
    if "distillation" not in made:
        with whole_folder(work / "base") as folder:
            shutil.copytree(start, folder, dirs_exist_ok=True)
        list_sums(work / "base")
        write_json(work / "base.json", made)


def restore_autoencoder(start: Path, work: Path) -> None:
    """Begin a foundation under way with the autoencoder of a folder; as for `restore`."""
    from diffusers import AutoencoderKL

    made = parameters_of(start)
    if "autoencoder" not in made:
        raise UserError(f"{start} is no kept base: its provenance.json names no autoencoder")
    if (work / "vae.json").exists():
        raise UserError(f"another foundation is under way in {work}: remove that folder first")
    vae = AutoencoderKL.from_pretrained(start, subfolder="vae").float()
    work.mkdir(parents=True, exist_ok=True)
    with whole_file(work / "vae.pt") as part:
        torch.save(vae.state_dict(), part)
    write_json(work / "vae.json", made["autoencoder"])
