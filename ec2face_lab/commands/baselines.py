"""Train the comparison systems in miniature, or study whether the comparison is fair.

    python -m ec2face_lab baselines [--only UaC] [--keep DIR]         # all, one on each core
    python -m ec2face_lab baselines --system UaC --out DIR            # one of them
    python -m ec2face_lab baselines --fairness [--ways half double]   # trained otherwise

The same command again resumes. What two systems share is trained once, into `shared` beside --out;
`--shared` trains only that, which is necessary before both are trained at the same time.
"""

from __future__ import annotations

import argparse

import torch

from ec2face_core.command_line import add_config_options, config_from_args
from ec2face_core.config import ConfigError
from ec2face_core.guards.checks import number
from ec2face_core.io.paths import user_path

from ..baselines import PAPER, SYSTEMS
from ..baselines.train import train_system


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, and where to."""
    add_config_options(parser)
    parser.add_argument(
        "--only", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM",
        help=f"some of {', '.join(SYSTEMS)}",
    )  # fmt: skip
    parser.add_argument("--keep", type=user_path, metavar="DIR", help="copy the weights there")
    study = parser.add_argument_group("fairness study")
    study.add_argument("--fairness", action="store_true", help="train and score otherwise")
    study.add_argument(
        "--ways", nargs="+", metavar="WAY",
        help="some of half, once, double, published, autoencoded; all if not given",
    )  # fmt: skip
    one = parser.add_argument_group("one system")
    one.add_argument("--system", choices=list(SYSTEMS), metavar="SYSTEM", help="row of Table 1")
    one.add_argument("--out", type=user_path, metavar="DIR", help="folder of weights and state")
    one.add_argument("--shared", action="store_true", help="train only what it shares")
    one.add_argument(
        "--seconds", type=number(0, whole=False), default=0.0,
        help="training time on one core; 0: what the profile gives every system",
    )  # fmt: skip
    one.add_argument("--seed", type=number(0, 2**40), default=42, help="of weights and noise")
    one.add_argument("--threads", type=number(1), default=1, help="of torch")
    one.add_argument("--device", help="cpu or cuda; default: a GPU if there is one, else the CPU")


def run(options: argparse.Namespace) -> None:
    """Train, and print where the results are."""
    config = config_from_args(options)
    if options.system:
        if options.out is None:
            raise ConfigError("--system needs --out DIR, the folder of its weights and state")
        torch.set_num_threads(options.threads)
        train_system(
            config, options.system, options.out, options.seconds, options.seed, options.shared,
            options.device,
        )  # fmt: skip
    elif options.fairness:
        from ..study.fairness import WAYS, run_fairness

        ways = options.ways or WAYS
        if unknown := sorted(set(ways) - set(WAYS)):
            raise ConfigError(f"--ways {' '.join(unknown)}: unknown; known: {', '.join(WAYS)}")
        names = options.only or list(PAPER)
        print(run_fairness(config, names, ways))
    else:
        from ..study.comparison import retrain_systems

        retrain_systems(config, options.only or list(SYSTEMS), options.keep)
        print(config.run_dir / "baselines")
