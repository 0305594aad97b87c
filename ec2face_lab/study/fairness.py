"""Is the comparison fair? The systems trained otherwise, and after EC²Face's autoencoder.

Each comparison system is trained with half and with twice its own time, and with masks as its
authors feed them where those differ; the same call resumes. What two systems share (30 of 45
minutes in profile mini, for four of the six) stays as it is. All are scored on validation faces,
and those of Table 1 once more after the autoencoder of EC²Face, which shows what would remain of
them if they generated latents, too. Test faces are never looked at. Systems on EC²Face's own base
are left out: they share its foundation, its autoencoder and its masks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ec2face_core.backbone import load_backbone
from ec2face_core.config import Config, adapter_dir
from ec2face_core.io.lora_file import LORA_FILE
from ec2face_core.io.paths import resolve
from ec2face_core.io.sums import list_sums
from ec2face_core.runs import path_digest

from ..baselines import PAPER, systems, weights_dir
from ..baselines.int8_weights import shared_file
from ..cache import kept_file
from ..plots.differences import fairness_figure
from ..plots.save import read_rows, save_rows
from ..plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY
from .comparison import MINUS, OURS, retrain_systems
from .painters import through_autoencoder, weight_files
from .pictures import PictureSet, batches
from .png import load_pictures, save_picture
from .scores import score_folder
from .summary import summarise, summarise_difference
from .tables import MAIN
from .verdicts import verdict_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


FACTORS = {"half": 0.5, "once": 1.0, "double": 2.0}  # of a system's own training time

PUBLISHED = "published"
AUTOENCODED = "autoencoded"

WAYS = (*FACTORS, PUBLISHED, AUTOENCODED)

SPLIT = "validation"

STANDINGS = {"higher": "leads", "not significant": "level with", "lower": "behind"}

# way -> (label, marker, colour)
MARKS = {
    "once": ("as in Table 1", "o", BLUE),
    AUTOENCODED: ("after EC²Face's autoencoder", "D", ORANGE),
    PUBLISHED: ("masks as published", "s", GREEN),
    "half": ("half its own training time", "<", SKY),
    "double": ("twice its own training time", ">", PURPLE),
}


def varied(config: Config, way: str) -> Config:
    """The configuration of systems trained otherwise; `config` itself for `once`.

    Args:
        config: the profile.
        way: one of `FACTORS`, `PUBLISHED`, or `AUTOENCODED`: the same systems.
    """
    if way in ("once", AUTOENCODED):
        return config
    budget = config.baselines
    folder = f"{config.profile}/fairness/{way}"
    changed = {"published_masks": True}
    if way in FACTORS:
        seconds = {"seconds": budget.seconds, "foundation_seconds": budget.foundation_seconds}
        changed = {key: FACTORS[way] * value for key, value in seconds.items()}
    return config.replace(profile=folder, adapters=f"runs/{folder}/adapters", baselines=changed)


def run_fairness(
    config: Config,
    names: Sequence[str] = tuple(PAPER),
    ways: Sequence[str] = WAYS,
) -> Path:
    """Train systems otherwise, score on validation faces, write `fairness.csv`.

    Long rows of table `fairness`; methods are `<system>, <half | once | ...>`, and each again as
    `EC²Face - <system>, ...`: paired differences. Kept rows of other systems and ways stay, unless
    settings or weights behind any of them changed.

    Args:
        config: the profile.
        names: some of `PAPER`.
        ways: some of `WAYS`.

    Returns:
        The path of the CSV.
    """
    import pandas as pd

    ours = PictureSet(config, OURS, SPLIT)
    our_scores = ours.scores()
    labels = (ours.dataset.root.name, config)
    path = config.run_dir / "fairness" / "fairness.csv"
    others, files = _kept(config)
    parts = [summarise([our_scores], "fairness", "EC2Face", *labels)]
    inputs = [adapter_dir(config, OURS) / LORA_FILE, resolve(config.backbone.path) / "vae"]
    for way in ways:
        members = [name for name in names if way != PUBLISHED or systems()[name].own_masks]
        other = varied(config, way)
        if other is not config:
            _copy_shared(config, other, members)
            retrain_systems(other, members)
        for name in members:
            pictures = PictureSet(other, name, SPLIT)
            if way == AUTOENCODED:
                scores = score_folder(autoencoded(pictures), pictures.dataset, config)
            else:
                scores = pictures.scores()
            inputs += weight_files(other, name)
            lead = f"{MINUS.format(name)}, {way}"
            parts.append(summarise([scores], "fairness", f"{name}, {way}", *labels))
            sides = ([our_scores], [scores])
            parts.append(summarise_difference(*sides, "fairness", lead, *labels))
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows["metric"].isin(MAIN)]
    if others is not None:
        rows = pd.concat([others[~others["method"].isin(rows["method"])], rows], ignore_index=True)
    inputs += [resolve(file) for file in files if resolve(file).exists()]
    gone = {file: digest for file, digest in files.items() if not resolve(file).exists()}
    save_rows(rows, path, config, inputs=sorted(set(inputs)), gone=gone)
    return path


def _copy_shared(config: Config, other: Config, names: Sequence[str]) -> None:
    """Copy what systems share with others, so that only their own training differs."""
    for name in names:
        for stage in systems()[name].shares[:1]:
            kept = shared_file(weights_dir(config, name), stage)
            copy = shared_file(other.run_dir / "baselines" / name, stage)
            if path_digest(copy) != path_digest(kept):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(kept, copy)
                list_sums(copy)


def _kept(config: Config) -> tuple[DataFrame | None, dict[str, str]]:
    """Kept rows and the digests of the weights behind them; no rows if these or settings changed.

    Weights in `runs/` may have been deleted while the rows are kept in git: the rows stay valid,
    and the digests stay on record.
    """
    if (kept := kept_fairness(config)) is None:
        return None, {}
    rows, path = kept
    record = json.loads(path.with_suffix(".json").read_text())
    known = record["inputs"] | record["parameters"].get("gone", {})
    now = {file: path_digest(resolve(file)) for file in known}
    changed = [file for file in known if now[file] not in (known[file], "absent")]
    if record["config_hash"] != config.digest():
        changed.append("settings")
    if changed:
        print(f"{path} is computed again, since {', '.join(changed)} changed")
        return None, {}
    return rows, known


def autoencoded(pictures: PictureSet) -> Path:
    """A folder of a system's pictures after encoding and decoding, as if it generated latents."""
    config = pictures.config
    source = pictures.generate()
    folder = config.run_dir / "fairness" / source.name
    vae = load_backbone(config.backbone, ("vae",)).vae
    title = f"{pictures.method}, autoencoder"
    for ids in batches(pictures.ids, config.sampling.batch_size, title, True):
        images = through_autoencoder(vae, load_pictures(source, ids))
        for name, image in zip(ids, images, strict=True):
            chunks = {"Source": f"{source.name}, {name}"}
            save_picture(folder / f"{name}.png", image / 2 + 0.5, chunks)
    return folder


def kept_fairness(config: Config) -> tuple[DataFrame, Path] | None:
    """The rows of `run_fairness` and their file (see `kept_file`), or None."""
    path = kept_file(config, "fairness")
    return (read_rows(path), path) if path.is_file() else None


def describe_fairness(rows: DataFrame, metrics: Sequence[str] = ("OAA", "RFA", "Text")) -> str:
    """One line for each metric and way: the systems that EC²Face leads, and the others.

    A lead in attributes is one in recall and in F1, where the rows have it. Each side was trained
    once, so intervals are over faces.

    Args:
        rows: those of `run_fairness`.
        metrics: in this order.
    """
    independent = rows[rows["critic"] == "independent"]
    lines = []
    for metric in metrics:
        table = independent[independent["metric"] == metric].set_index("method")
        ours, faces = table.loc["EC2Face", ["value", "n"]]
        lines.append(f"{metric}, EC²Face {ours:.1f}, {faces:.0f} faces (EC²Face minus system):")
        for way, (words, *_) in MARKS.items():
            standing: dict[str, list[str]] = {word: [] for word in STANDINGS.values()}
            for name in PAPER:
                if f"{name}, {way}" in table.index:
                    label = f"{MINUS.format(name)}, {way}"
                    gap, low, high = (table.loc[label, k] for k in ("value", "ci_low", "ci_high"))
                    verdict = verdict_of(independent, label, metric)
                    value = table.loc[f"{name}, {way}", "value"]
                    standing.setdefault(STANDINGS.get(verdict, verdict), []).append(
                        f"{name} {value:.1f} ({gap:+.1f} [{low:+.1f}, {high:+.1f}])"
                    )
            groups = [
                f"{verdict} {', '.join(names)}" for verdict, names in standing.items() if names
            ]
            lines.append(f"- {words}: {'; '.join(groups) or 'not trained here'}.")
    return "\n".join(lines)


def plot_fairness(rows: DataFrame) -> Figure:
    """EC²Face minus every system that was scored, in every way; independent perception models."""
    scores = rows[rows["critic"] == "independent"]
    names = [name for name in PAPER if f"{name}, once" in set(scores["method"])]
    return fairness_figure(scores, {name: MINUS.format(name) for name in names}, MARKS)
