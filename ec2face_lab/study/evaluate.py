"""Summaries of scores with 95 % intervals, and the command line that samples and scores.

    python -m ec2face_lab.study.evaluate --profile mini --variant both --split test
    python -m ec2face_lab.study.evaluate --profile mini --split test --images DIR --adapter uac

`generate.py` makes the pictures and `scoring.py` scores them; their functions are offered here,
too. Intervals are bootstrapped over images; a difference of two methods over the same images.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ec2face_core.config import (
    VARIANTS,
    Config,
    ConfigError,
    add_config_options,
    cli,
    config_from_args,
    resolve,
)
from ec2face_core.data import FaceDataset, Report, open_dataset, read_manifest
from ec2face_core.train import end_with_parent

from ..baselines import SYSTEMS
from ..baselines.official import ADAPTERS, SYSTEM_OF, adopt
from ..cache import write_frame
from ..plots.render_tables import METHODS, render_markdown
from .intervals import summarise
from .pictures import SOURCES, draw_split, evaluated_ids, generate_split, official_pictures
from .scores import score_folder

# --------------------------------------------------------------------------------- command line


@cli
def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, score and print; returns 0, or 2 for settings, pictures or weights that are wrong."""
    end_with_parent()
    options = _parser().parse_args(arguments)
    config = config_from_args(options)
    if options.images is None and (options.adapter or options.manifest):
        raise ConfigError("--adapter and --manifest are about pictures: name them by --images DIR")
    if options.images is None:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        of, folders = (options.split, options.out_dir, options.limit, (rank, world)), {}
        for variant in options.variant:
            draw = draw_split if variant in SYSTEMS else generate_split
            folders[variant] = draw(config, variant, *of)
            gc.collect()  # at paper scale two models do not fit
        if world > 1:
            from accelerate import PartialState

            from ec2face_core.train import leave_group

            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
            leave_group()
        print("pictures:", *folders.values(), sep="\n", flush=True)
        if options.sample_only or rank:
            return
    dataset = open_dataset(config, options.split)
    if options.images:
        method = SYSTEM_OF.get(options.adapter) or resolve(options.images).name
        folders = {method: _adopt(config, dataset, options)}
    for method, folder in folders.items():
        per_image = score_folder(folder, dataset, config, options.limit)
        seeds = str(config.sampling.seed) if method in VARIANTS else ""
        rows = summarise(per_image, "evaluation", method, dataset.root.name, config, seeds)
        target = config.run_dir / "evaluation" / f"{options.split}-{method}.csv"
        write_frame(target, rows)
        print(render_markdown(rows, f"{METHODS.get(method, method)}, {len(per_image)} faces."))
        print(f"rows: {target}")


def _adopt(config: Config, dataset: FaceDataset, options: argparse.Namespace) -> Path:
    """The pictures of --images as `{id}.png`; leaves `dataset` with the faces of --manifest."""
    rows = read_manifest(dataset.root)
    if options.manifest:
        known, rows = rows, read_manifest(resolve(options.manifest))
        report = Report(resolve(options.manifest), len(rows))
        for name in sorted(rows.keys() & set(dataset.ids)):
            if rows[name] != known[name]:
                report.add(
                    f"id {name}", f"{tuple(rows[name])}, but {tuple(known[name])} in {dataset.root}"
                )
        dataset.ids = [name for name in dataset.ids if name in rows]
        if not dataset.ids:
            report.add("ids", f"none of a face of {dataset.root}, split {options.split}")
        report.raise_if_bad()
    ids = evaluated_ids(config, dataset, options.limit)
    adapter, size = options.adapter or "plain", config.data.size
    folder = adopt(resolve(options.images), adapter, rows, ids, size, config.run_dir / "images")
    if adapter in SYSTEM_OF and not (options.limit or options.manifest):
        link = official_pictures(config, SYSTEM_OF[adapter], options.split)  # Tables 1 and 2
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(folder.resolve(), target_is_directory=True)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_lab.study.evaluate",
        description="Sample a split with adapters and score it, or score a folder of pictures. "
        "What is there already is neither sampled nor scored again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_config_options(parser)
    add = parser.add_argument
    add(
        "--variant",
        default=["both"],
        nargs="+",
        choices=(*SOURCES, *SYSTEMS),
        help="whose pictures",
    )
    add(
        "--split",
        default="test",
        choices=("test", "zero_shot", "validation", "train"),
        help="of which faces",
    )
    add("--images", type=Path, metavar="DIR", help="score these pictures instead of sampling")
    add("--adapter", choices=ADAPTERS, help="official repository that wrote --images (plain)")
    add("--manifest", type=Path, metavar="FILE", help="that it was given (default: the faces' own)")
    add("--out-dir", type=Path, help="where sampled pictures go (default: in runs/<profile>)")
    add("--limit", type=int, default=0, help="the first faces only (0: all)")
    add("--sample-only", action="store_true", help="stop after the pictures; works on N processes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
