"""Reproduce the paper: every numbered notebook in order, strict and resumable.

    python -m ec2face_lab reproduce --profile mini [--only 06 07] [--force] [--train] [--sweeps]

Figures and tables are written to runs/<profile>/figures. A notebook is skipped while nothing that
shapes it has changed and its figures and tables are those that it made. In the end the tables are
compared with the published ones in figures/<profile>.

Exit code 0: all up to date. 1: a notebook failed. 2: the request cannot be met. 3: all is up to
date, but the verdict on a claim of the paper is not the published one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

from ec2face_core.command_line import parse_override
from ec2face_core.config import SETTINGS, ConfigError, load_profile
from ec2face_core.guards.checks import number
from ec2face_core.guards.ranks import locked
from ec2face_core.io.paths import CODE, user_path

from ..reproduce import assign, run_notebooks, select
from ..study.agreement import compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which notebooks, and their parameters."""
    add = parser.add_argument
    add("--profile", default="mini", help="smoke, mini, paper or photos64")
    add("--only", nargs="+", default=(), metavar="NN", help="numbers of notebooks, e.g. 06 07")
    add("--force", action="store_true", help="run also what is up to date")
    add("--train", action="store_true", help="retrain every LoRA instead of using the kept ones")
    add("--seeds", type=number(0), default=0, metavar="N", help="trainings a method that count")
    add("--sweeps", action="store_true", help="train and score every point of every sweep (hours)")
    add("--keep-going", action="store_true", help="run the other notebooks after a failure")
    add(
        "--notebooks", type=user_path, default=CODE / "notebooks", metavar="DIR",
        help="folder of numbered notebooks",
    )  # fmt: skip
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting of the profile in every notebook, e.g. sampling.num_processes=4; "
        "repeatable, the last one of a setting counts",
    )  # fmt: skip
    add(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="a parameter for every notebook that declares it; repeatable",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Return 0, 1 if a notebook failed, or 3 if a verdict is not the published one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running kernel ends too
    if any(name == "profile" for name, _ in options.parameter):
        raise ConfigError("-p profile: name the profile by --profile, which also names the folders")
    requested = {"profile": options.profile, **dict(options.parameter)}
    if options.train:
        requested["train"] = "True"
    if options.seeds:
        requested["seeds"] = str(options.seeds)
    if options.sweeps:
        requested["sweeps"] = "True"
    settings = {key: value for text in options.set for key, value in parse_override(text).items()}
    os.environ[SETTINGS] = json.dumps(settings)  # for this process and the notebooks
    config = load_profile(options.profile)
    assigned = assign(select(options.notebooks, options.only), requested)
    if options.train:  # first what the others need
        assigned = dict(sorted(assigned.items(), key=lambda item: "train" not in item[1]))
    with locked(config.run_dir / "notebooks", "reproduction"):
        complete = run_notebooks(assigned, config, options.force, options.keep_going)
    if not complete:
        return 1
    agreement = compare(config)
    print(agreement.text)
    return 3 if agreement.changed else 0
