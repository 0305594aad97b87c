"""Generate the pictures of a split; a picture that is there already is not generated again.

    python -m ec2face_lab generate --profile mini --method both --split test

Several processes share the work: torchrun --nproc-per-node=8 -m ec2face_lab generate ...
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import torch

from ec2face_core.command_line import add_config_options, config_from_args
from ec2face_core.config import Config
from ec2face_core.guards.checks import number
from ec2face_core.io.paths import user_path
from ec2face_core.train import leave_group

from ..study.painters import METHODS
from ..study.pictures import PictureSet

SPLITS = ("test", "zero_shot", "validation", "rare", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is generated, and where to."""
    add_config_options(parser)
    parser.add_argument(
        "--method", nargs="+", default=["both"], choices=METHODS, metavar="METHOD",
        help=f"some of {', '.join(METHODS)}; both if it is not given",
    )  # fmt: skip
    parser.add_argument("--split", default="test", choices=SPLITS, help="the faces")
    parser.add_argument(
        "--out", type=user_path, metavar="DIR",
        help="folder of the pictures; inside runs/<profile> if it is not given",
    )  # fmt: skip
    parser.add_argument("--limit", type=number(0), default=0, help="the first faces only; 0: all")
    parser.add_argument("--quiet", action="store_true", help="do not print the folders")


def run(options: argparse.Namespace) -> None:
    """Generate, and print the folders unless `--quiet` is given."""
    generate(config_from_args(options), options)
    leave_group()


def generate(config: Config, options: argparse.Namespace) -> dict[str, Path]:
    """Generate this process's share of the pictures; returns the folder of each method."""
    rank, world = process()
    folders = {}
    for method in options.method:
        pictures = PictureSet(config, method, options.split, options.limit, options.out)
        folders[method] = pictures.generate((rank, world))
        del pictures
        gc.collect()  # at paper scale two models do not fit
    wait_for_ranks()
    if not options.quiet:
        print("pictures:", *folders.values(), sep="\n", flush=True)
    return folders


def process() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait_for_ranks() -> None:
    """Return when all ranks have come here."""
    if process()[1] > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
