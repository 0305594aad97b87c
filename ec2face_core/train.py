"""`python -m ec2face_core.train`: train one LoRA. The same command again resumes it.

SIGTERM and SIGINT end a training after its step, with a checkpoint and exit code 143 or 130; before
the first step they end it at once.
`--variant all` trains every variant, one after another.

On N processes, with or without GPUs:

    torchrun --standalone --nproc-per-node N -m ec2face_core.train ... --set trainer.num_processes=N

`ec2face_lab.launch` prints that line, also for several machines, and runs it.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Sequence

from torch import distributed

from .command_line import add_config_options, cli, config_from_args
from .config import VARIANTS, ConfigError
from .guards.checks import number
from .guards.parent import end_with_parent
from .guards.signals import on_signals
from .io.paths import user_path

ALL = "all"


@cli
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    options = build_parser().parse_args(arguments)
    settings = {} if options.steps is None else {"trainer.steps": options.steps}
    config = config_from_args(options, **settings)
    everything = options.variant == ALL
    if everything and options.run_dir:
        raise ConfigError("--run-dir is of one variant: leave it out, or name the variant")
    try:
        with on_signals(signal.SIG_DFL):
            from .trainer import Trainer  # takes seconds

            for variant in VARIANTS if everything else (options.variant,):
                Trainer(config, variant, options.run_dir).fit(stop_on_signals=True)
                gc.collect()  # its memory is free for the next
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
        "--variant", default="both", choices=[*VARIANTS, ALL],
        help="row of Tables 3 and 4, or all of them",
    )  # fmt: skip
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
