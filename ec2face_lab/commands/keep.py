"""Put the LoRAs that a profile has trained in place of those that come with a clone.

    python -m ec2face_lab keep --profile mini --seeds 3

They are stored in half precision. Everything that is made of them has to be made again.
"""

from __future__ import annotations

import argparse

from ec2face_core.config import load_profile
from ec2face_core.guards.checks import number

from ..study.loras import keep_loras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The profile, and how many trainings of each variant."""
    parser.add_argument("--profile", default="mini", help="whose LoRAs")
    parser.add_argument("--seeds", type=number(1), default=3, help="trainings of each variant")


def run(options: argparse.Namespace) -> None:
    """Keep them and print the folders."""
    for folder in keep_loras(load_profile(options.profile), options.seeds):
        print(folder)
