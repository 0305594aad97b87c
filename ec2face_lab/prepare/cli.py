"""From raw downloads to what a profile needs: one report, verified data roots, checked weights.

    python -m ec2face_lab.prepare.cli --dry-run                 # what is there, what is missing
    python -m ec2face_lab.prepare.cli --downloads /data/raw     # convert, verify, report again

The report (`inventory.py`) needs no network, and the dry run writes nothing. Part files, photos and
captions become the data roots that the profile names; once these are complete the downloads may go.
Weights stay where they are.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ec2face_core.config import Config, add_config_options, cli, config_from_args, resolve
from ec2face_core.data import read_manifest
from ec2face_core.perception import FaceParser

from .convert import from_celebamask_hq, from_merged
from .inventory import (
    CELEBAMASK,
    DETECTOR,
    FARL,
    FFHQ_TEXT,
    IMAGES,
    PARTS,
    PHOTOS,
    RETINAFACE,
    TEXTS,
    Finding,
    captions_folder,
    ffhq_text_files,
    render,
    survey,
)
from .photos import face_detector, from_photos
from .validate import validate


@cli
def datasets_main(arguments: Sequence[str] | None = None) -> None:
    """Command line; returns the exit code: 0, or 2 after printing the report of bad data."""
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_lab.prepare.cli",
        description="Check folders of faces and convert foreign ones into the layout "
        "{image,mask,text}/{id}.* + manifest.csv (id,split,caption_index,caption).",
        epilog="Bad data: one report of every bad file on stderr, exit code 2, no target folder. "
        "An interrupted conversion resumes.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("validate", help="report everything wrong in ROOT")
    command.add_argument("root", type=Path, help="folder with image/ mask/ text/ manifest.csv")
    for name, text, train in (
        (
            "convert-celebamask",
            "raw CelebAMask-HQ (CelebA-HQ-img/, CelebAMask-HQ-mask-anno/)",
            "ids below this are the training split (27000, as in the paper)",
        ),
        (
            "convert-merged",
            "images/*.jpg and masks/*.png (ids, or colours of the palette)",
            "number of training faces (default: nine of ten)",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", type=Path, help=text)
        command.add_argument("out", type=Path, help="new folder")
        command.add_argument("--captions", type=Path, help="folder of {id}.txt, one caption a line")
        command.add_argument("--size", type=int, default=512, help="pixels (512)")
        default = 27000 if name == "convert-celebamask" else None
        command.add_argument("--train", type=int, default=default, help=train)
    options = parser.parse_args(arguments)
    if options.command == "validate":
        report = validate(options.root, progress=True)
        report.raise_if_bad()
        print(report)
    else:
        raw = options.command == "convert-celebamask"
        convert = from_celebamask_hq if raw else from_merged
        convert(options.source, options.out, options.captions, options.size, options.train)
        rows = read_manifest(options.out)
        print(f"{options.out}: {dict(Counter(row.split for row in rows.values()))}")


def prepare(config: Config, downloads: Path, dry_run: bool = False) -> list[Finding]:
    """Report what a profile needs; without `dry_run`, first make and verify its data roots.

    Args:
        config: names the data roots and the weights.
        downloads: folder with `CelebAMask-HQ/`, `multi-modal-celeba/`, `FFHQ-Text/`, `weights/`.
        dry_run: only look.

    Raises:
        DataError: files that cannot be used, all of them in one report.
        OSError: the disk is full; what is written is whole and is not made again.
    """
    findings = survey(config, downloads)
    if dry_run:
        return findings
    there = {finding.need for finding in findings if finding.state == "there"}
    root, zero_shot = resolve(config.data.root), resolve(config.data.zero_shot_root)
    for folder in (root, zero_shot):
        if folder.exists():
            validate(folder, progress=True).raise_if_bad()
    size = config.data.size
    if there >= {IMAGES, PARTS, TEXTS}:
        raw, texts = downloads / CELEBAMASK, captions_folder(downloads)
        from_celebamask_hq(raw, root, texts, size, config.data.train)
    if there >= {PHOTOS, FARL, RETINAFACE}:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parser = FaceParser.from_config(config.perception, device=device)
        detect = face_detector(downloads / DETECTOR, device)
        from_photos(*ffhq_text_files(downloads), zero_shot, parser, detect, size)
    return survey(config, downloads, content=True)


# --------------------------------------------------------------------------------- command line


@cli
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0 if everything is there, or 2 after saying what is not."""
    options = _parser().parse_args(arguments)
    config = config_from_args(options)
    if config.data.procedural:
        print("nothing to prepare: the faces are drawn, and the weights are part of the clone")
        return 0
    findings = prepare(config, options.downloads, options.dry_run)
    print(render(findings))
    complete = all(found.state == "there" for found in findings)
    if complete and options.dry_run and any(f.need in (IMAGES, PHOTOS) for f in findings):
        print("complete; the same command without --dry-run makes the data roots")
    return 0 if complete else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_lab.prepare.cli",
        description="Report what a profile needs and what of it is there; convert the downloads "
        "into its data roots and verify them. Run again to resume. data/README.md has the steps.",
        epilog="Exit code 0: everything is there. 2: something is missing, incomplete or refused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_config_options(parser, "paper")
    parser.add_argument(
        "--downloads", type=Path, metavar="DIR", default=resolve("data/raw"),
        help=f"folder that holds {CELEBAMASK}/, multi-modal-celeba/, {FFHQ_TEXT}/ and weights/",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only report; write nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
