"""Publish what a run wrote: figures/<profile>, docs/gallery, and the numbers in the pages.

    python -m ec2face_lab publish --profile mini [--pages]

It wants a clean tree and every notebook up to date, all of one commit. Commit the result.
With --pages it only writes the numbers and the list of notebooks in README and docs anew, from what
is published.
"""

from __future__ import annotations

import argparse

from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT, user_path

from ..publish import publish, update_pages
from ..reproduce import select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The profile, and the notebooks."""
    parser.add_argument("--profile", default="mini", help="smoke, mini, paper or photos64")
    parser.add_argument("--pages", action="store_true", help="write only the pages' numbers anew")
    parser.add_argument(
        "--notebooks", type=user_path, default=ROOT / "notebooks", metavar="DIR",
        help="folder of numbered notebooks",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Publish and print the manifest's path."""
    config = load_profile(options.profile)
    if options.pages:
        update_pages(config)
    else:
        print(publish(select(options.notebooks), config))
