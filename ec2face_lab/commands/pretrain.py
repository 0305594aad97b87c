"""Train the miniature's foundation model and perception models from nothing.

    python -m ec2face_lab pretrain vae                        # autoencoder
    python -m ec2face_lab pretrain latents                    # a pool of encoded faces
    python -m ec2face_lab pretrain flux                       # transformer and text encoders
    python -m ec2face_lab pretrain parser --role guiding      # face parser
    python -m ec2face_lab pretrain clip --role scoring        # CLIP

With `--data ROOT --out DIR` the same on photographs of faces. Every stage can be stopped and run
again. `make foundation` runs all of them.
"""

from __future__ import annotations

import argparse

import torch

from ec2face_core.config import ROOT, UserError, user_path

from ..world import pretrain, pretrain_perception
from ..world.sources import FolderFaces, ProceduralFaces

STAGES = {
    "vae": "the autoencoder",
    "latents": "a pool of encoded faces and dense conditions",
    "flux": "the transformer and its text encoders",
    "parser": "a face parser",
    "clip": "a CLIP",
}
SAMPLES = {"vae": 60_000, "latents": 24_576, "flux": 200_000, **pretrain_perception.SAMPLES}
BUNDLE = ROOT / "data" / "mini"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each stage."""
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, summary in STAGES.items():
        stage = stages.add_parser(name, help=summary, formatter_class=parser.formatter_class)
        stage.add_argument(
            "--data", type=user_path, metavar="ROOT",
            help="train on the training split of this folder, at 64 px, not on procedural faces",
        )  # fmt: skip
        stage.add_argument(
            "--out", type=user_path, metavar="DIR", default=BUNDLE, help="folder of the bundle"
        )
        stage.add_argument(
            "--samples", type=int, default=SAMPLES[name], help="faces to train on or to encode"
        )
        if name in ("vae", "flux"):
            stage.add_argument("--batch", type=int, default=16, help="samples a process and step")
        if name == "flux":
            stage.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
        if name == "latents":
            stage.add_argument("--part", type=int, default=0, help="number of this part")
            stage.add_argument("--parts", type=int, default=1, help="parts of the pool in all")
        if name in ("parser", "clip"):
            stage.add_argument(
                "--role", choices=tuple(pretrain_perception.ROLES), required=True,
                help="guiding: serves as a loss; scoring: serves as a metric",
            )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Train one stage; resumes if it was stopped."""
    out = options.out
    if options.data is None:
        source = ProceduralFaces()
    elif out == BUNDLE:
        raise UserError("--data needs --out DIR: data/mini is trained on procedural faces alone")
    else:
        source = FolderFaces(options.data)
    work = pretrain.work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    if options.stage == "vae":
        pretrain.train_vae(source, work, options.samples, options.batch)
    elif options.stage == "latents":
        pretrain.encode_pool(source, work, options.samples, options.part, options.parts)
    elif options.stage == "flux":
        pretrain.train_flux(source, out, options.samples, options.batch, options.lr)
    else:
        torch.set_num_threads(1)
        role = pretrain_perception.ROLES[options.role]
        if options.stage == "parser":
            target = out / f"parser_{options.role}.pt"
            pretrain_perception.train_parser(role, target, options.samples, source)
        else:
            target = out / f"clip_{options.role}"
            pretrain_perception.train_clip(role, target, options.samples, source)
