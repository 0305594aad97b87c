"""Train and score every point of the sweeps: one setting is varied at a time.

    python -m ec2face_lab sweeps --profile mini [--only weights beta] [--list]

The same command again resumes. Scores are on validation faces; test faces are never looked at.
"""

from __future__ import annotations

import argparse

from ec2face_core.command_line import add_config_options, config_from_args

from ..study.sweeps import SWEEPS, run_sweeps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which sweeps."""
    add_config_options(parser)
    parser.add_argument(
        "--only", nargs="+", choices=list(SWEEPS), metavar="SWEEP",
        help=f"some of {', '.join(SWEEPS)}",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the points; train nothing")


def run(options: argparse.Namespace) -> None:
    """Print the points, or the file of the scores."""
    sweeps = options.only or list(SWEEPS)
    if options.list:
        for sweep in sweeps:
            for name, point in SWEEPS[sweep].items():
                print(f"{sweep}-{name:20} {point.method:13} {point.settings}")
    else:
        print(run_sweeps(config_from_args(options), sweeps))
