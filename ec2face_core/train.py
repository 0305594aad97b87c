"""`python -m ec2face_core.train`: train one LoRA. The same command again resumes it.

SIGTERM ends a training on one process after its step, with a checkpoint and exit code 143.

On N processes, with or without GPUs:

    torchrun --standalone --nproc-per-node N -m ec2face_core.train ... --set trainer.num_processes=N

`ec2face_lab.launch` prints that line, also for several machines, and runs it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from torch import distributed

from .config import VARIANTS, add_config_options, cli, config_from_args
from .guards.checks import number
from .guards.parent import end_with_parent
from .io.paths import user_path


@cli
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    options = build_parser().parse_args(arguments)
    settings = {} if options.steps is None else {"trainer.steps": options.steps}
    config = config_from_args(options, **settings)
    from .trainer import Trainer

    trainer = Trainer(config, options.variant, options.run_dir)
    before = signal.getsignal(signal.SIGTERM)
    if config.trainer.num_processes == 1:  # ranks would not stop after the same step
        signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
    try:
        trainer.fit()
    finally:
        signal.signal(signal.SIGTERM, before)
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
        "--run-dir", type=user_path,
        help="output folder (default: runs/<profile>/training/<variant>)",
    )  # fmt: skip
    parser.add_argument("--steps", type=number(1), help="short for --set trainer.steps=STEPS")
    return parser


def leave_group() -> None:
    """Leave the process group, if there is one: the last thing that a rank does.

    An interpreter that ends with an open group sometimes aborts (gloo's threads still run), and
    torchrun then reports the whole run as failed.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
