"""Is the comparison fair? The systems trained otherwise, and seen through EC²Face's autoencoder.

    python -m ec2face_lab baselines --fairness [--only UaC] [--ways half double]

trains each comparison system with half and with twice its own time, and with masks as its authors
feed them where those differ; the same call again resumes. What two systems share (30 of 45 minutes
in profile mini, for four of the six) stays as it is. All are scored on validation faces, and those
of Table 1 once more after the autoencoder that EC²Face draws through: what would be left if they,
too, drew latents. Test faces are never looked at here. The systems that stand on EC²Face's own base
are not asked: they share its foundation, its autoencoder and what it sees of a mask.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ec2face_core.backbone import decode_latents, encode_images, load_backbone
from ec2face_core.config import Config, adapter_dir, resolve
from ec2face_core.data import open_dataset
from ec2face_core.mask_branch import LORA_FILE
from ec2face_core.runs import path_digest

from ..baselines import PAPER, systems, weights_dir
from ..baselines.storage import shared_file
from ..cache import kept_file
from ..plots.differences import fairness_figure
from ..plots.save import read_rows, save_rows
from ..plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY
from .comparison import MINUS, OURS, retrain_systems
from .intervals import summarise, summarise_difference
from .pictures import batches, draw_split, evaluated_ids, load_pictures, save_picture, weight_files
from .scores import score_folder
from .tables import MAIN, scored

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


FACTORS = {"half": 0.5, "once": 1.0, "double": 2.0}  # of a system's own training time

PUBLISHED, AUTOENCODED = "published", "autoencoded"

WAYS = (*FACTORS, PUBLISHED, AUTOENCODED)

SPLIT = "validation"

# way -> (what to print, marker, colour)
MARKS = {
    "once": ("as in Table 1", "o", BLUE),
    AUTOENCODED: ("after EC²Face's autoencoder", "D", ORANGE),
    PUBLISHED: ("masks as published", "s", GREEN),
    "half": ("half its own training time", "<", SKY),
    "double": ("twice its own training time", ">", PURPLE),
}


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
    names: Sequence[str] = tuple(PAPER),
    ways: Sequence[str] = WAYS,
) -> Path:
    """Train systems otherwise, score on validation faces, write `fairness.csv`.

    Long rows of table `fairness`; methods are `<system>, <half | once | ...>`, and each again as
    `EC²Face - <system>, ...`: paired differences. Rows that are kept of other systems and ways
    stay, unless settings or weights behind any of them changed.
    """
    import pandas as pd

    dataset, classes = open_dataset(config, SPLIT), systems()
    path, about = config.run_dir / "fairness" / "fairness.csv", (dataset.root.name, config)
    others, files = _kept(config)
    ours = scored(config, OURS, SPLIT)
    parts = [summarise(ours, "fairness", "EC2Face", *about)]
    inputs = [adapter_dir(config, OURS) / LORA_FILE, resolve(config.backbone.path) / "vae"]
    for how in ways:
        of = [name for name in names if how != PUBLISHED or classes[name].own_masks]
        other = varied(config, how)
        if other is not config:
            for name in of:
                for stage in classes[name].shares[:1]:
                    kept = shared_file(weights_dir(config, name), stage)
                    copy = shared_file(other.run_dir / "baselines" / name, stage)
                    if path_digest(copy) != path_digest(kept):
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(kept, copy)
            retrain_systems(other, of)
        for name in of:
            if how == AUTOENCODED:
                scores = score_folder(through_autoencoder(config, name, SPLIT), dataset, config)
            else:
                scores = scored(other, name, SPLIT)
            inputs += weight_files(other, name)
            lead = f"{MINUS.format(name)}, {how}"
            parts.append(summarise(scores, "fairness", f"{name}, {how}", *about))
            parts.append(summarise_difference(ours, scores, "fairness", lead, *about))
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows["metric"].isin(MAIN)]
    if others is not None:
        rows = pd.concat([others[~others["method"].isin(rows["method"])], rows], ignore_index=True)
    inputs += [resolve(file) for file in files if resolve(file).exists()]
    gone = {file: digest for file, digest in files.items() if not resolve(file).exists()}
    save_rows(rows, path, config, inputs=sorted(set(inputs)), gone=gone)
    return path


def _kept(config: Config) -> tuple[DataFrame | None, dict[str, str]]:
    """Kept rows and the digests of the weights behind them; no rows if these or settings changed.

    Weights in `runs/` may be gone while the rows are kept in git: the rows still hold, and the
    digests stay on record.
    """
    if (found := kept_fairness(config)) is None:
        return None, {}
    rows, path = found
    record = json.loads(path.with_suffix(".json").read_text())
    known = record["inputs"] | record["parameters"].get("gone", {})
    now = {file: path_digest(resolve(file)) for file in known}
    changed = [file for file in known if now[file] not in (known[file], "absent")]
    if record["config_hash"] != config.digest():
        changed.append("settings")
    if changed:
        print(f"{path}: made anew, since {', '.join(changed)} changed")
        return None, {}
    return rows, known


@torch.no_grad()
def through_autoencoder(config: Config, name: str, split: str) -> Path:
    """A folder of a system's pictures after encoding and decoding: as if it drew latents."""
    ids = evaluated_ids(config, open_dataset(config, split))
    source = draw_split(config, name, split)
    folder = config.run_dir / "fairness" / source.name
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_backbone(config.backbone, ("vae",)).vae
    for some in batches(ids, config.sampling.batch_size, f"{name}, autoencoder", True):
        images = decode_latents(vae, encode_images(vae, load_pictures(source, some)))
        for i, image in zip(some, images, strict=True):
            save_picture(folder / f"{i}.png", image / 2 + 0.5, {"Source": f"{source.name}, {i}"})
    return folder


def kept_fairness(config: Config) -> tuple[DataFrame, Path] | None:
    """The rows of `run_fairness` and their file: this profile's own, else the kept, else None."""
    path = kept_file(config, "fairness")
    return (read_rows(path), path) if path.is_file() else None


def describe_fairness(rows: DataFrame, metrics: Sequence[str] = ("OAA", "RFA", "Text")) -> str:
    """A line for each metric and way: whom EC²Face leads by more than faces explain, and whom not.

    Args:
        rows: those of `run_fairness`.
    """
    own, lines = rows[rows["critic"] == "independent"], []
    for metric in metrics:
        of = own[own["metric"] == metric].set_index("method")
        ours, faces = of.loc["EC2Face", ["value", "n"]]
        lines.append(f"{metric}, EC²Face {ours:.1f}, {faces:.0f} faces (EC²Face minus system):")
        for how, (words, *_) in MARKS.items():
            standing: dict[str, list[str]] = {"leads": [], "level with": [], "behind": []}
            for name in PAPER:
                if f"{name}, {how}" in of.index:
                    minus = of.loc[f"{MINUS.format(name)}, {how}"]
                    gap, low, high = (minus[k] for k in ("value", "ci_low", "ci_high"))
                    which = "leads" if low > 0 else "behind" if high < 0 else "level with"
                    value = of.loc[f"{name}, {how}", "value"]
                    standing[which].append(
                        f"{name} {value:.1f} ({gap:+.1f} [{low:+.1f}, {high:+.1f}])"
                    )
            found = [f"{which} {', '.join(who)}" for which, who in standing.items() if who]
            lines.append(f"- {words}: {'; '.join(found) or 'not trained here'}.")
    return "\n".join(lines)


def draw_fairness(rows: DataFrame) -> Figure:
    """EC²Face minus every system that was scored, in every way; the independent critics."""
    own = rows[rows["critic"] == "independent"]
    names = [name for name in PAPER if f"{name}, once" in set(own["method"])]
    return fairness_figure(own, {name: MINUS.format(name) for name in names}, MARKS)
