"""Is the comparison fair? The systems trained otherwise, and seen through EC²Face's autoencoder.

    python -m ec2face_core.fairness --profile mini [--only UaC] [--ways half double]

trains each comparison system with half and with twice its time, and with masks as its authors feed
them where those differ; the same call again resumes. What two systems share stays as it is. All are
scored on validation faces, and those of Table 1 once more after the autoencoder that EC²Face draws
through: what would be left if they, too, drew latents. Test faces are never looked at here.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .backbone import decode_latents, encode_images, load_backbone
from .baselines import SYSTEMS, systems, weights_dir
from .baselines.draw import draw_split
from .baselines.storage import shared_file
from .comparison import OURS, retrain_systems
from .config import Config, ConfigError, load_profile, resolve
from .datasets import DataError, open_dataset
from .effects import fairness_figure
from .evaluate import summarise
from .experiments import scored
from .generate import evaluated_ids, load_pictures, save_picture
from .plotting import BLUE, GREEN, ORANGE, PINK
from .results import read_rows, save_rows
from .scoring import score_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FACTORS = {"half": 0.5, "once": 1.0, "double": 2.0}  # of a system's own training time
PUBLISHED, AUTOENCODED = "published", "autoencoded"
WAYS = (*FACTORS, PUBLISHED, AUTOENCODED)
SPLIT = "validation"


def varied(config: Config, how: str) -> Config:
    """The configuration of systems trained otherwise; `config` itself for `once`.

    Args:
        how: one of `FACTORS`, `PUBLISHED`, or `AUTOENCODED`: the same systems.
    """
    if how in ("once", AUTOENCODED):
        return config
    own, folder = config.baselines, f"{config.profile}/fairness/{how}"
    changed = {"published_masks": True}
    if how in FACTORS:
        seconds = {"seconds": own.seconds, "foundation_seconds": own.foundation_seconds}
        changed = {what: FACTORS[how] * value for what, value in seconds.items()}
    return config.replace(profile=folder, adapters=f"runs/{folder}/adapters", baselines=changed)


def run_fairness(
    config: Config,
    names: Sequence[str] = tuple(SYSTEMS),
    ways: Sequence[str] = WAYS,
) -> Path:
    """Train systems otherwise, score on validation faces, write `fairness.csv`.

    Long rows of table `fairness`; methods are `<system>, <half | once | ...>`. Rows that the file
    has of other systems and ways stay in it.
    """
    import pandas as pd

    dataset, parts, classes = open_dataset(config, SPLIT), [], systems()
    path = config.run_dir / "fairness" / "fairness.csv"
    for how in ways:
        of = [name for name in names if how != PUBLISHED or classes[name].own_masks]
        other = varied(config, how)
        if other is not config:
            for name in of:
                for stage in classes[name].shares[:1]:
                    kept = shared_file(weights_dir(config, name), stage)
                    copy = shared_file(other.run_dir / "baselines" / name, stage)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(kept, copy)
            retrain_systems(other, of)
        for name in of:
            about = ("fairness", f"{name}, {how}", dataset.root.name, config)
            if how == AUTOENCODED:
                scores = score_folder(through_autoencoder(config, name, SPLIT), dataset, config)
            else:
                scores = scored(other, name, SPLIT)
            parts.append(summarise(scores, *about))
    ours = scored(config, OURS, SPLIT)
    parts.append(summarise(ours, "fairness", "EC2Face", dataset.root.name, config))
    rows = pd.concat(parts, ignore_index=True)
    if path.is_file():
        others = read_rows(path)
        rows = pd.concat([others[~others["method"].isin(rows["method"])], rows], ignore_index=True)
    save_rows(rows, path, config, inputs=[weights_dir(config, name) for name in names])
    return path


@torch.no_grad()
def through_autoencoder(config: Config, name: str, split: str) -> Path:
    """A folder of a system's pictures after encoding and decoding: as if it drew latents."""
    ids = evaluated_ids(config, open_dataset(config, split))
    source = draw_split(config, name, split)
    folder, size = config.run_dir / "fairness" / source.name, config.sampling.batch_size
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_backbone(config.backbone, ("vae",)).vae
    for some in (ids[k : k + size] for k in range(0, len(ids), size)):
        images = decode_latents(vae, encode_images(vae, load_pictures(source, some)))
        for i, image in zip(some, images, strict=True):
            save_picture(folder / f"{i}.png", image / 2 + 0.5, {"Source": f"{source.name}, {i}"})
    return folder


def kept_fairness(config: Config) -> tuple[DataFrame, Path] | None:
    """The rows of `run_fairness` and their file: this profile's own, else the kept, else None."""
    own = config.run_dir / "fairness" / "fairness.csv"
    path = own if own.is_file() else resolve(config.adapters).with_name("fairness.csv")
    return (read_rows(path), path) if path.is_file() else None


def describe_fairness(rows: DataFrame, metrics: Sequence[str] = ("OAA", "RFA")) -> str:
    """Lines for each metric: the best with twice the time, what else changes and for whom."""
    own = rows[rows["critic"] == "independent"]
    lines = []
    for metric in metrics:
        of = own[own["metric"] == metric].set_index("method")["value"]
        if twice := {n: of[f"{n}, double"] for n in SYSTEMS if f"{n}, double" in of}:
            best = max(twice, key=twice.get)
            lines.append(
                f"{metric}, twice the time for all but EC²Face: best {best} {twice[best]:.1f} "
                f"(once {of[f'{best}, once']:.1f}), EC²Face {of['EC2Face']:.1f}."
            )
        ways = {"masks as published": PUBLISHED, "through the autoencoder": AUTOENCODED}
        for words, how in ways.items():
            changes = [
                f"{n} {of[f'{n}, {how}']:.1f} (was {of[f'{n}, once']:.1f})"
                for n in SYSTEMS
                if f"{n}, {how}" in of
            ]
            if changes:
                lines.append(f"{metric}, {words}: {', '.join(changes)}.")
    return "\n".join(lines)


def draw_fairness(rows: DataFrame) -> Figure:
    """Every system that was scored, in every way, beside EC²Face; the independent critics."""
    own = rows[rows["critic"] == "independent"]
    names = [name for name in SYSTEMS if f"{name}, once" in set(own["method"])]
    ways = {
        "once": ("as in Table 1, 95 % interval", "o", BLUE),
        AUTOENCODED: ("after EC²Face's autoencoder", "D", ORANGE),
        PUBLISHED: ("masks as published", "s", GREEN),
        "half": ("half the training time", "<", PINK),
        "double": ("twice the training time", ">", PINK),
    }
    return fairness_figure(own, names, ways, ("EC²Face", "EC2Face"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 for settings or data that cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_core.fairness",
        description="Train and score the comparison systems otherwise. Run again to resume.",
    )
    parser.add_argument("--profile", default="mini", help="smoke, mini or photos64 (default: mini)")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), help="some of the systems")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="some of the ways")
    options = parser.parse_args(arguments)
    try:
        config = load_profile(options.profile)
        print(run_fairness(config, options.only or list(SYSTEMS), options.ways))
    except (ConfigError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
