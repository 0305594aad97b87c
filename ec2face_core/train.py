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

from .config import VARIANTS, Config, ConfigError, load_config, load_profile, parse_override
from .launch import end_with_parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for settings or data that cannot work."""
    end_with_parent()
    options = build_parser().parse_args(arguments)
    from .datasets import DataError
    from .distribution import leave_group
    from .latents import CacheError
    from .trainer import Trainer

    code = 0
    try:
        Trainer(read_config(options), options.variant, options.run_dir).fit()
    except (ConfigError, DataError, CacheError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    leave_group()
    return code


def build_parser() -> argparse.ArgumentParser:
    """The command line, documented."""
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_core.train",
        description="Train the mask branch's LoRA on cached latents. Run again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--profile", default="mini", help="profile: smoke, mini or paper")
    source.add_argument(
        "--config", type=Path, metavar="FILE", help="a config.yaml of an earlier run instead"
    )
    parser.add_argument(
        "--variant", default="both", choices=list(VARIANTS), help="row of Tables 3 and 4"
    )
    parser.add_argument(
        "--run-dir", type=Path, help="output folder (default: runs/<profile>/training/<variant>)"
    )
    parser.add_argument("--steps", type=int, help="short for --set trainer.steps=STEPS")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. loss.alpha_mask=1; repeatable",
    )
    return parser


def read_config(options: argparse.Namespace) -> Config:
    """The configuration that the options ask for.

    Raises:
        ConfigError: an unknown profile, file or setting.
    """
    overrides = {}
    for text in options.set:
        overrides |= parse_override(text)
    if options.steps is not None:
        overrides["trainer.steps"] = options.steps
    if options.config is None:
        return load_profile(options.profile, **overrides)
    if not options.config.is_file():
        raise ConfigError(f"--config {options.config}: no such file")
    return load_config(options.config, **overrides)


if __name__ == "__main__":
    sys.exit(main())
