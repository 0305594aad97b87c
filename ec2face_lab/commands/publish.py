"""Publish what a run wrote: figures/<profile>, docs/gallery, and the numbers in the pages.

    python -m ec2face_lab publish --profile mini

It wants a clean tree and every notebook up to date, all of one commit. Commit the result.
"""

from __future__ import annotations

import argparse

from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT, user_path

from ..publish import publish
from ..reproduce import select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The profile, and the notebooks."""
    parser.add_argument("--profile", default="mini", help="smoke, mini, paper or photos64")
    parser.add_argument(
        "--notebooks", type=user_path, default=ROOT / "notebooks", metavar="DIR",
        help="folder of numbered notebooks",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Publish and print the manifest's path."""
    print(publish(select(options.notebooks), load_profile(options.profile)))
