"""Summaries of scores with 95 % intervals, and the command line that samples and scores.

    python -m ec2face_core.evaluate --profile mini --variant both --split test
    python -m ec2face_core.evaluate --profile mini --split test --images DIR --adapter uac

`generate.py` makes the pictures and `scoring.py` scores them; their functions are offered here,
too. Intervals are bootstrapped over images; a difference of two methods over the same images.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .baselines import SYSTEMS
from .baselines.draw import draw_split, official_pictures
from .commands import add_config_options, chosen, told
from .config import VARIANTS, Config, ConfigError, resolve
from .datasets import FaceDataset, open_dataset
from .folders import ADAPTERS, SYSTEM_OF, adopt
from .generate import SOURCES, evaluated_ids, generate_split
from .launch import end_with_parent
from .results import COLUMNS
from .scoring import CRITICS, counts, load_critics, score_folder, write_frame
from .statistics import bootstrap_accuracy, bootstrap_interval, paired_accuracy_difference
from .tables import METHODS, render_markdown
from .validation import Report, read_manifest

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["generate_split", "load_critics", "score_folder", "summarise", "summarise_difference"]


def summarise(
    per_image: DataFrame, table: str, method: str, dataset: str, config: Config, seeds: str = ""
) -> DataFrame:
    """Long rows of a table with 95 % intervals over images (design: one row a cell).

    Args:
        per_image: rows of `score_folder`.
        table, method, dataset, seeds: written into every row.
    """
    how = (config.evaluation.bootstrap, config.seed)
    return _long_rows(
        lambda column: bootstrap_interval(per_image[column], *how),
        lambda critic: bootstrap_accuracy(*counts(per_image, critic), *how),
        table=table, method=method, dataset=dataset, seeds=seeds,
    )  # fmt: skip


def summarise_difference(
    first: DataFrame,
    second: DataFrame,
    table: str,
    method: str,
    dataset: str,
    config: Config,
    seeds: str = "",
) -> DataFrame:
    """Long rows of first - second on the same images; an interval without 0 is a difference.

    Raises:
        ValueError: the pictures are not of the same faces, in the same order.
    """
    if list(first["id"]) != list(second["id"]):
        raise ValueError("a paired difference needs the same faces in the same order")
    how = (config.evaluation.bootstrap, config.seed)

    def accuracy(critic: str) -> DataFrame:
        return paired_accuracy_difference(counts(first, critic), counts(second, critic), *how)

    return _long_rows(
        lambda column: bootstrap_interval(first[column] - second[column], *how), accuracy,
        table=table, method=method, dataset=dataset, seeds=seeds,
    )  # fmt: skip


def _long_rows(
    score: Callable[[str], Any], accuracy: Callable[[str], DataFrame], **every: str
) -> DataFrame:
    import pandas as pd

    rows = [{"metric": "Text", "critic": c, **score(f"text_{c}")._asdict()} for c in CRITICS]
    for critic in CRITICS:
        found = accuracy(critic).drop(columns="pixels")
        rows += found.assign(critic=critic).to_dict("records")
    rows += [{"metric": m, "critic": "", **score(m.lower())._asdict()} for m in ("LPIPS", "NIQE")]
    return pd.DataFrame(rows).assign(source="ours", **every)[list(COLUMNS)]


# --------------------------------------------------------------------------------- command line


@told
def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, score and print; returns 0, or 2 for settings, pictures or weights that are wrong."""
    end_with_parent()
    options = _parser().parse_args(arguments)
    config = chosen(options)
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

            from .distribution import leave_group

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
        prog="python -m ec2face_core.evaluate",
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
