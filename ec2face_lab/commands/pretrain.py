"""Train the miniature's foundation model and perception models from nothing.

    python -m ec2face_lab pretrain vae                        # autoencoder
    python -m ec2face_lab pretrain captions                   # token ids of a pool's captions
    python -m ec2face_lab pretrain latents                    # the pool: encoded faces
    python -m ec2face_lab pretrain flux                       # transformer and text encoders
    python -m ec2face_lab pretrain distill                    # guidance into its embedding
    python -m ec2face_lab pretrain parser --role guiding      # face parser
    python -m ec2face_lab pretrain clip --role scoring        # CLIP
    python -m ec2face_lab pretrain facts                      # attribute evaluator
    python -m ec2face_lab pretrain gates                      # are they good enough?
    python -m ec2face_lab pretrain keep                       # the base under way, into the bundle
    python -m ec2face_lab pretrain restore --from DIR         # and back, where `runs/` is gone

On two cores two ranks do vae, latents, flux and distill faster than one process does:
`torchrun --nproc-per-node 2 -m ec2face_lab pretrain flux`.

With `--data ROOT --out DIR` the same on photographs of faces. Every stage can be stopped and run
again. `make foundation` runs all of them.
"""

from __future__ import annotations

import argparse

import torch

from ec2face_core.config import UserError, load_profile
from ec2face_core.guards.checks import number
from ec2face_core.io.paths import ROOT, user_path
from ec2face_core.runs import whole_file

from ..world import kept, pool, pretrain, pretrain_flux, pretrain_perception
from ..world.ranks import join_ranks, rank_of
from ..world.sources import DataSource, FolderFaces, Portraits

STAGES = {
    "vae": "the autoencoder",
    "captions": "token ids of the captions of a pool of faces",
    "latents": "a pool of encoded faces and dense conditions",
    "flux": "the transformer and its text encoders",
    "distill": "classifier-free guidance, into the guidance embedding",
    "parser": "a face parser",
    "clip": "a CLIP",
    "facts": "the attribute evaluator",
    "gates": "measure all of them on faces that none has seen: gates.csv in the bundle",
    "keep": "copy the base under way and its autoencoder into the bundle: base/",
    "restore": "go on from the autoencoder and the base of a folder",
}
SAMPLES = {
    "vae": 320_000,  # on the CPU most of them are quarters of pictures
    "captions": 49_152,
    "latents": 49_152,
    "flux": 1_000_000,
    "distill": 60_000,
    **pretrain_perception.SAMPLES,
}
BATCH = {
    "cpu": {"vae": 16, "flux": 32, "distill": 32},
    "cuda": {"vae": 128, "flux": 512, "distill": 512},
}
RATE = {"vae": 2e-3, "flux": 1.2e-3, "distill": 3e-4}
SHARED = ("vae", "latents", "flux", "distill")  # by the ranks of torchrun
BUNDLE = ROOT / "data" / "mini128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each stage."""
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, summary in STAGES.items():
        stage = stages.add_parser(name, help=summary, formatter_class=parser.formatter_class)
        if name not in {"keep", "restore"}:
            stage.add_argument(
                "--device", default="cpu", choices=("cpu", "cuda"),
                help="where faces are rendered and networks run",
            )  # fmt: skip
        if name == "gates":
            continue
        stage.add_argument(
            "--out", type=user_path, metavar="DIR", default=BUNDLE, help="folder of the bundle"
        )
        if name in {"vae", "flux", "restore"}:
            stage.add_argument(
                "--from", dest="start", type=user_path, metavar="DIR", required=name == "restore",
                help="FLUX folder whose weights are trained further",
            )  # fmt: skip
        if name in {"keep", "restore"}:
            continue
        stage.add_argument(
            "--data", type=user_path, metavar="ROOT",
            help="train on the training split of this folder, not on procedural faces",
        )  # fmt: skip
        stage.add_argument(
            "--size", type=int, choices=tuple(pretrain.PLANS), default=128,
            help="side in pixels of the faces of --data",
        )  # fmt: skip
        stage.add_argument(
            "--samples",
            type=number(1),
            default=SAMPLES[name],
            help="faces to train on or to encode",
        )
        if name not in {"captions", "latents"}:
            stage.add_argument(
                "--seconds", type=number(0, whole=False), default=0.0,
                help="train for so long instead of on --samples faces; 0: no limit",
            )  # fmt: skip
        if name in RATE:
            stage.add_argument(
                "--batch",
                type=number(0),
                default=0,
                help="samples of a step; 0: what suits the device",
            )
            stage.add_argument(
                "--lr",
                type=number(0, whole=False),
                default=RATE[name],
                help="peak learning rate",
            )
        if name == "captions":
            stage.add_argument(
                "--processes", type=number(1), default=1, help="that tokenise captions"
            )
        if name in {"parser", "clip"}:
            stage.add_argument(
                "--role", choices=tuple(pretrain_perception.ROLES), required=True,
                help="guiding: serves as a loss; scoring: serves as a metric",
            )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Train one stage; resumes if it was stopped."""
    if options.stage == "keep":
        kept.keep(options.out, pretrain.work_folder(options.out))
        return
    if options.stage == "restore":
        kept.restore(options.start, pretrain.work_folder(options.out))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA GPU; leave the option out")
    if options.stage == "gates":
        _gates(options.device)
        return
    source: DataSource
    if options.data is None:
        source = Portraits(options.device)
    elif options.out == BUNDLE:
        raise UserError("--data needs --out DIR: the bundle is trained on procedural faces alone")
    else:
        source = FolderFaces(options.data, options.size, options.device)
    join_ranks()
    if rank_of()[1] > 1 and options.stage not in SHARED:
        raise UserError(
            f"stage {options.stage} cannot be shared by ranks: start it without torchrun"
        )
    work = pretrain.work_folder(options.out)
    work.mkdir(parents=True, exist_ok=True)
    if options.stage in {"parser", "clip", "facts"}:
        _perception(options, source)
    else:
        _foundation(options, source)


def _foundation(options: argparse.Namespace, source: DataSource) -> None:
    work = pretrain.work_folder(options.out)
    samples = options.samples
    if options.stage == "captions":
        pool.encode_captions(source, work, samples, options.processes)
        return
    if options.stage == "latents":
        pool.encode_pool(source, work, samples)
        return
    batch = options.batch or {**BATCH["cpu"], **BATCH[options.device]}[options.stage]
    if options.stage == "vae":
        crop = source.size // 2 if options.device == "cpu" else 0
        parser = options.out / "parser_guiding.pt"
        if not parser.is_file():
            raise UserError(
                f"{parser} does not exist; the autoencoder needs it: run "
                "`python -m ec2face_lab pretrain parser --role guiding` with the same --out first"
            )
        pretrain.train_vae(
            source, work, samples, batch, options.seconds, crop, parser, options.lr, options.start
        )
        return
    plan = (samples, batch, options.lr, options.seconds)
    if options.stage == "flux":
        pretrain_flux.train_flux(source, work, *plan, options.start)
    else:
        pretrain_flux.distill_guidance(source, options.out, work, *plan)


def _perception(options: argparse.Namespace, source: DataSource) -> None:
    if options.device == "cpu":
        torch.set_num_threads(1)
    out = options.out
    plan = (options.samples, source, options.seconds)
    if options.stage == "facts":
        pretrain_perception.train_facts(out / "facts.safetensors", *plan)
        return
    role = pretrain_perception.ROLES[options.role]
    if options.stage == "parser":
        pretrain_perception.train_parser(role, out / f"parser_{options.role}.pt", *plan)
    else:
        pretrain_perception.train_clip(role, out / f"clip_{options.role}", *plan)


def _gates(device: str) -> None:
    from ..study.gates import measure_gates

    table = measure_gates(load_profile("mini128"), device=device)
    with whole_file(BUNDLE / "gates.csv") as part:
        table.to_csv(part, index=False)
    print(table.to_string(index=False))
