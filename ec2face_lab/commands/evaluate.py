"""Generate a split and score it, or score a folder of pictures that exists.

    python -m ec2face_lab evaluate --profile mini --method both --split test
    python -m ec2face_lab evaluate --profile mini --split test --images DIR --layout uac

Several processes share the work: torchrun --nproc-per-node=8 -m ec2face_lab evaluate ...
What is there already is neither generated nor scored again. Summaries have 95 % intervals,
bootstrapped over images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ec2face_core.command_line import config_from_args
from ec2face_core.config import VARIANTS, Config, ConfigError
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.io.paths import user_path
from ec2face_core.io.report import Report
from ec2face_core.io.texts import read_manifest
from ec2face_core.train import leave_group

from ..baselines.official import LAYOUTS, SYSTEM_OF, adopt
from ..cache import write_frame
from ..plots.render_tables import markdown_name, render_markdown
from ..plots.save import headline
from ..study.distribution import FEWEST
from ..study.painters import REAL
from ..study.pictures import PictureSet, official_pictures
from ..study.scores import evaluated_ids, folder_features, score_folder, score_share
from ..study.summary import distance_rows, summarise
from . import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, and those for pictures that exist."""
    generate.add_arguments(parser)
    parser.add_argument(
        "--images", type=user_path, metavar="DIR", help="score these pictures; generate none"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS,
        help="the official repository that wrote --images; plain ({id}.png) if it is not given",
    )  # fmt: skip
    parser.add_argument(
        "--manifest", type=user_path, metavar="FILE",
        help="the manifest that the repository was given, if not the data root's own",
    )  # fmt: skip
    parser.add_argument(
        "--scores-only", action="store_true", help="keep the scores for the notebooks; no summary"
    )


def run(options: argparse.Namespace) -> None:
    """Score, write `runs/<profile>/evaluation/<split>-<method>.csv` and print its table."""
    config = config_from_args(options)
    if options.images is None and (options.layout or options.manifest):
        raise ConfigError("--layout and --manifest describe pictures: name them by --images DIR")
    rank, world = generate.process()
    dataset = open_dataset(config, options.split)
    if options.images is None:
        folders = generate.generate(config, options)
    else:
        method = SYSTEM_OF.get(options.layout) or options.images.name
        folders = {method: _adopt(config, dataset, options)}
    if world > 1:
        for folder in folders.values():
            score_share(folder, dataset, config, options.limit, rank, world)
        generate.wait_for_ranks()
    if rank == 0:  # joins what all have scored
        _summarise(config, options, dataset, folders)
    leave_group()


def _summarise(
    config: Config, options: argparse.Namespace, dataset: FaceDataset, folders: dict[str, Path]
) -> None:
    import pandas as pd

    for method, folder in folders.items():
        per_image = score_folder(folder, dataset, config, options.limit)
        if options.scores_only:
            continue
        labels = {"table": "evaluation", "method": method, "dataset": dataset.root.name}
        labels["seeds"] = str(config.sampling.seed) if method in VARIANTS else ""
        rows = summarise([per_image], config=config, **labels)
        features = folder_features(folder, dataset, config, options.limit)
        if method != REAL and options.manifest is None and len(per_image) >= FEWEST:
            real = PictureSet(config, REAL, options.split, options.limit).features()
            distances = distance_rows([[features]], real, config, **labels)
            rows = pd.concat([rows, distances], ignore_index=True)
        target = config.run_dir / "evaluation" / f"{options.split}-{method}.csv"
        write_frame(target, rows)
        shown = headline(rows, config)
        print(render_markdown(shown, f"{markdown_name(method)}, {len(per_image)} faces."))
        print(f"rows: {target}")


def _adopt(config: Config, dataset: FaceDataset, options: argparse.Namespace) -> Path:
    """The pictures of --images as `{id}.png`; leaves `dataset` with the faces of --manifest."""
    rows = read_manifest(dataset.root)
    if options.manifest:
        known = rows
        rows = read_manifest(options.manifest)
        report = Report(options.manifest, len(rows))
        for name in sorted(rows.keys() & set(dataset.ids)):
            if rows[name] != known[name]:
                report.add(
                    f"id {name}", f"{tuple(rows[name])}, but {tuple(known[name])} in {dataset.root}"
                )
        dataset.ids = [name for name in dataset.ids if name in rows]
        if not dataset.ids:
            report.add("ids", f"none is a face of {dataset.root}, split {options.split}")
        report.raise_if_bad()
    ids = evaluated_ids(config, dataset, options.limit)
    layout = options.layout or "plain"
    work = config.run_dir / "images"
    folder = adopt(options.images, layout, rows, ids, config.data.size, work)
    first = generate.process()[0] == 0
    if first and layout in SYSTEM_OF and not (options.limit or options.manifest):
        link = official_pictures(config, SYSTEM_OF[layout], options.split)  # Tables 1 and 2
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(folder.resolve(), target_is_directory=True)
    return folder
