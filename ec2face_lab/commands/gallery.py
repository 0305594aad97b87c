"""Render the executed notebooks of a run as Markdown with small pictures.

    python -m ec2face_lab gallery --profile mini [--only 02 05] [--out DIR]

`publish` does this, too; alone it serves to look at the pages.
"""

from __future__ import annotations

import argparse

from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT, user_path

from ..publish import gallery_dir, make_gallery
from ..reproduce import select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which notebooks, and where to."""
    add = parser.add_argument
    add("--profile", default="mini", help="smoke, mini, paper or photos64")
    add("--only", nargs="+", default=(), metavar="NN", help="numbers of notebooks, e.g. 05 06")
    add(
        "--out",
        type=user_path,
        metavar="DIR",
        help="folder of the pages; docs/gallery if not given",
    )


def run(options: argparse.Namespace) -> None:
    """Write the pages, and print how many and how large they are."""
    notebooks = select(ROOT / "notebooks", options.only)
    config = load_profile(options.profile)
    out = options.out or gallery_dir(config)
    files = make_gallery(notebooks, config, out)
    size = sum(path.stat().st_size for path in files)
    print(f"{out}: {len(notebooks)} pages, {len(files)} files, {size / 1e6:.1f} MB")
