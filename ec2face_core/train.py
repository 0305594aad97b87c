"""`python -m ec2face_core.train`: train one adapter. The same command again resumes it.

On N processes: `torchrun --standalone --nproc-per-node N -m ec2face_core.train ... --set
trainer.num_processes=N`, also without a GPU; `launch.command` writes that line, also for several
machines, and `launch.run` runs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import add_config_options, chosen, told
from .config import VARIANTS, Config
from .launch import end_with_parent


@told
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    options = build_parser().parse_args(arguments)
    from .distribution import leave_group
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
    return chosen(options, **({} if options.steps is None else {"trainer.steps": options.steps}))


if __name__ == "__main__":
    sys.exit(main())
