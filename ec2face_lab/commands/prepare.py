"""Report what a profile needs and what of it is there; convert the downloads and verify them.

    python -m ec2face_lab prepare --dry-run                 # what is there, what is missing
    python -m ec2face_lab prepare --downloads /data/raw     # convert, verify, report again
    python -m ec2face_lab prepare validate ROOT             # check a folder of faces
    python -m ec2face_lab prepare --profile mini validate ROOT   # and count captions that are cut
    python -m ec2face_lab prepare convert-merged SRC OUT    # convert your own faces
    python -m ec2face_lab prepare export-parser             # the second parser, from the hub

The report needs no network, and the dry run writes nothing. Part files, photos and captions become
the data roots that the profile names; once these are complete the downloads may be deleted. Weights
stay where they are; the second parser is exported from a downloaded SegFormer. An interrupted
conversion resumes. docs/data.md has the steps.

Exit code 0: everything is there. 2: something is missing, incomplete or refused.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch

from ec2face_core.command_line import add_config_options, config_from_args
from ec2face_core.config import Config
from ec2face_core.guards.checks import number
from ec2face_core.io.paths import ROOT, resolve, user_path
from ec2face_core.io.texts import read_manifest
from ec2face_core.perception import FaceParser

from ..prepare.convert import from_celebamask_hq, from_merged
from ..prepare.inventory import (
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
from ..prepare.photos import face_detector, from_photos
from ..prepare.second_parser import SEGFORMER, export_segformer
from ..prepare.validate import check_folder, note_long_captions, validate
from ..prepare.weights import local_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The inventory's options, and sub-commands for single folders."""
    add_config_options(parser, "paper")
    parser.add_argument(
        "--downloads", type=user_path, metavar="DIR", default=ROOT / "data" / "raw",
        help=f"folder that holds {CELEBAMASK}/, multi-modal-celeba/, {FFHQ_TEXT}/ and weights/",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only report; write nothing")
    actions = parser.add_subparsers(dest="action", title="single folders", metavar="ACTION")
    check = actions.add_parser("validate", help="report every bad file of a folder of faces")
    check.add_argument("root", type=user_path, help="folder with image/ mask/ text/ manifest.csv")
    export = actions.add_parser(
        "export-parser", help="a SegFormer of 19 classes, to perception.scoring_parser"
    )
    export.add_argument(
        "source", nargs="?", default=SEGFORMER, help=f"hub id or folder; {SEGFORMER} by default"
    )
    for name, layout, train, default in (
        (
            "convert-celebamask",
            "raw CelebAMask-HQ (CelebA-HQ-img/, CelebAMask-HQ-mask-anno/)",
            "ids below this are the training split",
            27000,
        ),
        (
            "convert-merged",
            "images/*.jpg and masks/*.png (ids, or colours of the palette)",
            "number of training faces; nine of ten if it is not given",
            None,
        ),
    ):
        convert = actions.add_parser(
            name, help=layout, description=layout, formatter_class=parser.formatter_class
        )
        convert.add_argument("source", type=user_path, help=layout)
        convert.add_argument("out", type=user_path, help="new folder")
        convert.add_argument(
            "--captions", type=user_path, help="folder of {id}.txt, one caption a line"
        )
        convert.add_argument("--size", type=number(16, 65_536), default=512, help="pixels")
        convert.add_argument("--train", type=number(1), default=default, help=train)
        convert.add_argument(
            "--skip-bad", action="store_true",
            help="leave out faces that cannot be used; OUT/left_out.csv lists them",
        )  # fmt: skip
        if name == "convert-merged":
            convert.add_argument(
                "--snap-edges", action="store_true",
                help="give smooth edges of colour masks to the neighbour with the nearest colour",
            )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Return 0 if everything is there, or 2 after a report of what is not."""
    if options.action == "validate":
        report = validate(options.root, progress=True)
        note_long_captions(options.root, config_from_args(options), report)
        report.raise_if_bad()
        print(report)
        return 0
    if options.action == "export-parser":
        file = resolve(config_from_args(options).perception.scoring_parser)
        print(f"{export_segformer(options.source, file)}: exported from {options.source}")
        return 0
    if options.action is not None:
        raw = options.action == "convert-celebamask"
        convert = from_celebamask_hq if raw else from_merged
        asked = {"skip_bad": options.skip_bad}
        if not raw:
            asked["snap_edges"] = options.snap_edges
        report = convert(
            options.source, options.out, options.captions, options.size, options.train, **asked
        )
        if report.problems or report.notes:
            print(report)
        rows = read_manifest(options.out)
        print(f"{options.out}: {dict(Counter(row.split for row in rows.values()))}")
        return 0
    if options.downloads.is_file():
        check_folder(options.downloads)
    config = config_from_args(options)
    if config.data.procedural:
        print("nothing to prepare: the faces are procedural, and the weights come with the clone")
        return 0
    findings = prepare(config, options.downloads, options.dry_run)
    print(render(findings))
    complete = all(finding.state == "there" for finding in findings)
    if complete and options.dry_run and any(f.need in (IMAGES, PHOTOS) for f in findings):
        print("complete; the same command without --dry-run makes the data roots")
    return 0 if complete else 2


def prepare(config: Config, downloads: Path, dry_run: bool = False) -> list[Finding]:
    """Report what a profile needs; without `dry_run`, first make and verify its data roots.

    Args:
        config: names the data roots and the weights.
        downloads: folder with `CelebAMask-HQ/`, `multi-modal-celeba/`, `FFHQ-Text/`, `weights/`.
        dry_run: only look.

    Returns:
        One finding for each need, in the order of the report.

    Raises:
        DataError: files that cannot be used, all of them in one report.
        OSError: the disk is full; finished files are whole and are not made again.
    """
    findings = survey(config, downloads)
    if dry_run:
        return findings
    there = {finding.need for finding in findings if finding.state == "there"}
    root = resolve(config.data.root)
    zero_shot = resolve(config.data.zero_shot_root)
    for folder in (root, zero_shot):
        if folder.exists():
            validate(folder, progress=True).raise_if_bad()
    size = config.data.size
    if there >= {IMAGES, PARTS, TEXTS}:
        texts = captions_folder(downloads)
        from_celebamask_hq(downloads / CELEBAMASK, root, texts, size, config.data.train)
    scorer = resolve(config.perception.scoring_parser)
    downloaded = local_folder(SEGFORMER, "config.json")
    if downloaded and not scorer.exists():
        export_segformer(downloaded, scorer)
    if there >= {PHOTOS, FARL, RETINAFACE}:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parser = FaceParser.from_config(config.perception, device=device)
        detect = face_detector(downloads / DETECTOR, device)
        from_photos(*ffhq_text_files(downloads), zero_shot, parser, detect, size)
    elif PHOTOS in there:
        lacking = ", ".join(need.name for need in (FARL, RETINAFACE) if need not in there)
        print(f"{zero_shot} is not made: the masks of {PHOTOS.name} need {lacking}")
    return survey(config, downloads, content=True)
