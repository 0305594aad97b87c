"""Several processes: accelerate's DDP over the LoRA, or the frozen base in shards.

By default every process holds the whole frozen base, and DDP averages the LoRA's gradients (44 MB
at paper scale). `trainer.shard` is for GPUs that cannot hold the base (24 GB for FLUX.1-dev in
bfloat16): FSDP2 leaves each process 1/n of it and gathers one block at a time. The LoRA stays whole
on every process, so that optimiser, checkpoints and files are the same in both.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import distributed

from .config import VARIANTS, Config, add_config_options, cli, config_from_args


def leave_group() -> None:
    """End this process's part in the group, if there is one: the last thing that a rank does.

    An interpreter that ends with an open group aborts now and then (gloo's threads still run), and
    torchrun then calls the whole run failed.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


END_WITH_PARENT = "EC2FACE_END_WITH_PARENT"  # set for our children; `end_with_parent` obeys it

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Make this process end when its parent does, if `run` started it (Linux; elsewhere nothing).

    The ranks of a training are children of accelerate's launcher, so each asks for it itself.
    """
    if sys.platform == "linux" and os.environ.get(END_WITH_PARENT):
        _end_with(os.getppid())()


def _end_with(parent: int):
    """A function that, called in a child, ties it to the process `parent`."""
    libc = ctypes.CDLL(None)  # loaded before the fork: little is safe to do after it

    def tie() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the line above took effect
            os._exit(1)

    return tie


@cli
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    options = build_parser().parse_args(arguments)
    from .trainer import Trainer

    try:
        Trainer(read_config(options), options.variant, options.run_dir).fit()
    finally:
        leave_group()


def build_parser() -> argparse.ArgumentParser:
    """The command line, documented."""
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_core.train",
        description="Train the mask branch's LoRA on cached latents. Run again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_config_options(parser)
    parser.add_argument(
        "--variant", default="both", choices=list(VARIANTS), help="row of Tables 3 and 4"
    )
    parser.add_argument(
        "--run-dir", type=Path, help="output folder (default: runs/<profile>/training/<variant>)"
    )
    parser.add_argument("--steps", type=int, help="short for --set trainer.steps=STEPS")
    return parser


def read_config(options: argparse.Namespace) -> Config:
    """The configuration that the options ask for.

    Raises:
        ConfigError: an unknown profile, file or setting.
    """
    return config_from_args(
        options, **({} if options.steps is None else {"trainer.steps": options.steps})
    )


if __name__ == "__main__":
    sys.exit(main())
