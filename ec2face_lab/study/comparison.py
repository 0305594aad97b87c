"""The comparison systems as experiments: training all, who leads by how much, what each costs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ec2face_core.config import Config, ConfigError, adapter_dir, resolve
from ec2face_core.data import open_dataset
from ec2face_core.mask_branch import LORA_FILE
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_core.runs import path_digest

from ..baselines import NEWER, PAPER, SYSTEMS, WEIGHTS, load, systems, trained, weights_dir
from ..baselines.origin import origin, shared_origin, stands_on
from ..baselines.storage import shared_file
from ..launch import run
from ..plots.render_tables import METHODS
from .pictures import available, official_pictures, weight_files
from .tables import difference_rows

if TYPE_CHECKING:
    from pandas import DataFrame, Series


OURS, MINUS = "both", "EC²Face - {}"


# ------------------------------------------------------------------------------------ training


def retrain_systems(
    config: Config, names: Sequence[str] = tuple(SYSTEMS), keep: Path | None = None
) -> None:
    """Train systems into `runs/<profile>/baselines`, one child process a core; resumes.

    Args:
        keep: folder to copy weights and provenance to, as `data/mini/baselines`.
    """
    classes, folder = systems(), config.run_dir / "baselines"
    settings = folder / "config.yaml"
    config.save(settings)

    def train(job: tuple[str, bool]) -> None:
        name, shared = job
        out = folder / SYSTEMS[name].partition(".")[0]
        if not (_shared_there(config, name, out) if shared else _finished(config, name, out)):
            run(
                "ec2face_lab", "baselines", "--config", str(settings), "--system", name,
                "--out", str(out), *(["--shared"] if shared else []),
            )  # fmt: skip

    first = {classes[n].shares[0]: n for n in names if classes[n].shares}  # one of each pair
    stands = [n for n in names if classes[n].shares]
    waves = [
        [*((n, True) for n in first.values()), *((n, False) for n in names if n not in stands)],
        [(n, False) for n in stands],
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for wave in waves:
            list(pool.map(train, wave))
    if keep is not None:
        for name in names:
            _check_others(config, name, names, keep)
        for name in names:
            _copy(config, name, keep)


def _shared_there(config: Config, name: str, out: Path) -> bool:
    """Is what a system shares trained here as this profile asks for, or was it brought here?"""
    path = shared_file(out, systems()[name].shares[0])
    return path.is_file() and stands_on(path.parent) in ({}, shared_origin(config))


def _finished(config: Config, name: str, out: Path) -> bool:
    if not (out / WEIGHTS).is_file() or not (out / "provenance.json").is_file():
        return False
    system = systems()[name]
    return stands_on(out) == origin(config, system, out, system.budget(config), config.seed)


def _check_others(config: Config, name: str, names: Sequence[str], target: Path) -> None:
    """Refuse to take from under the systems in `target` what they share with `name`.

    Raises:
        ConfigError: others than `names` are kept there, on another network that they share with it.
    """
    folder = weights_dir(config, name)
    for stage in systems()[name].shares[:1]:
        own, there = shared_file(folder, stage), shared_file(target / folder.name, stage)
        others = [
            other
            for other, system in systems().items()
            if stage in system.shares
            and other not in names
            and (target / SYSTEMS[other].partition(".")[0] / WEIGHTS).is_file()
        ]
        if others and there.is_file() and path_digest(there) != path_digest(own):
            raise ConfigError(
                f"{', '.join(others)} in {target} would stand on another network than {there}: "
                f"name them in --only as well"
            )


def _copy(config: Config, name: str, target: Path) -> None:
    """Weights and provenance of a system, and what it shares, to `target`."""
    folder = weights_dir(config, name)
    for source in (*weight_files(config, name), folder / "provenance.json"):
        copy = target / source.relative_to(folder.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy != source:
            shutil.copyfile(source, copy)


# ---------------------------------------------------------------------------- tables 1 and 2


def compared(config: Config, split: str) -> dict[str, str]:
    """Methods of Tables 1 and 2: name in the table -> whose pictures; ceilings last."""
    own = {name: name for name in available(config, split)}
    return own | {"EC2Face": OURS, "real": "real", "vae_round_trip": "vae_round_trip"}


def sources(config: Config, split: str) -> list[Path]:
    """Files that the compared pictures stand on: weights, or pictures that official code wrote."""
    files = [adapter_dir(config, OURS), resolve(config.backbone.path)]
    for name in available(config, split):
        pictures = official_pictures(config, name, split)
        files += [pictures] if pictures.is_dir() else weight_files(config, name)
    return list(dict.fromkeys(files))


def lead_rows(config: Config, table: str, split: str, seeds: int = 1) -> DataFrame:
    """EC²Face minus each system on the same faces, with intervals; empty without systems."""
    import pandas as pd

    pairs = {MINUS.format(name): (OURS, name) for name in available(config, split)}
    return difference_rows(config, table, pairs, split, seeds) if pairs else pd.DataFrame()


def describe_lead(
    rows: DataFrame, lead: DataFrame, metrics: Sequence[str] = ("Text", "OAA", "RFA")
) -> str:
    """A line a metric: EC²Face, the best of the paper's systems and the newer ones."""
    if lead.empty:
        return "No comparison system has pictures or weights here."
    lines = []
    for metric in metrics:
        of = rows[(rows["metric"] == metric) & (rows["critic"] == "independent")]
        of = of[of["source"] == "ours"].set_index("method")["value"]
        gap = lead[(lead["metric"] == metric) & (lead["critic"] == "independent")]
        gap = gap.set_index("method")

        def above(name: str, gap: DataFrame = gap, of: Series = of) -> str:
            row = gap.loc[MINUS.format(name)]
            span = f"[{row['ci_low']:+.1f}, {row['ci_high']:+.1f}]"
            return f"{name} {of[name]:.1f}: {row['value']:+.1f} {span}"

        line = f"{metric}: {METHODS['EC2Face']} {of['EC2Face']:.1f}"
        if here := [name for name in PAPER if name in of]:
            best = of[here].idxmax()
            times = of["EC2Face"] / of[best]
            behind = sum(gap["ci_low"][MINUS.format(name)] > 0 for name in here)
            line += (
                f", best of the paper's systems {above(best)}, {times:.2f} times as much; "
                f"{behind} of {len(here)} are lower by more than faces explain"
            )
        newer = [above(name) for name in NEWER if name in of]
        lines.append("; ".join([line, *newer]) + ".")
    return "\n".join(lines)


def system_facts(config: Config, split: str = "test") -> DataFrame:
    """Parameters, minutes of training, seconds a picture here, one row a system.

    Blank for an official repository's pictures; seconds are taken where miniatures are compared.
    A foundation's minutes are without the autoencoder, which all that draw latents have in common.
    """
    import pandas as pd

    rows, here, ours = [], trained(config), _own_facts(config)
    for name in available(config, split):
        path = weights_dir(config, name) / "provenance.json"
        official = official_pictures(config, name, split).is_dir()
        made = {}
        if path.is_file() and not official:
            made = json.loads(path.read_text())["parameters"]
        own, shared = (
            sum(stage["seconds"] for stage in made.get(k, {}).values())
            for k in ("stages", "shared")
        )
        took = sampling_seconds(config, name) if name in here and not official else 0
        foundation = ours[1] if "base" in made.get("stands_on", {}) else shared / 60
        rows.append((name, made.get("parameters", 0) / 1e6, foundation, own / 60, took))
    took = sampling_seconds(config, "EC2Face") if here else 0
    rows.append((METHODS["EC2Face"], *ours, took))
    columns = ["system", "parameters (M)", "foundation (min)", "training (min)", "sampling (s)"]
    table = pd.DataFrame(rows, columns=columns).set_index("system").round(3)
    return table.astype(object).where(table > 0, "")


def sampling_seconds(config: Config, name: str, count: int = 8) -> float:
    """Seconds a picture, `count` test faces at once, better of two; EC2Face as configured."""
    dataset, times = open_dataset(config, "test"), []
    ids = dataset.ids[:count]
    texts = [dataset.manifest_caption(i) for i in ids]
    masks = torch.stack([dataset.label_map(i) for i in ids])
    if name in SYSTEMS:
        system = load(config, name)

        def draw() -> None:
            system.generate(texts, masks, [torch.Generator().manual_seed(0) for _ in ids])

    else:
        s, pipe = config.sampling, EC2FacePipeline.from_config(config, variant=OURS)
        pipe.set_progress_bar_config(disable=True)

        def draw() -> None:
            guidance = {"text_guidance": s.text_guidance, "mask_guidance": s.mask_guidance}
            bf16 = s.mixed_precision == "bf16"
            with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
                pipe(texts, masks, num_inference_steps=s.steps, output_type="pt", **guidance)

    for _ in range(2):
        began = time.perf_counter()
        draw()
        times.append(time.perf_counter() - began)
    return min(times) / len(ids)


def _own_facts(config: Config) -> tuple[float, float, float]:
    """Millions of parameters, minutes of the base and of the adapter."""
    import numpy as np
    from safetensors import safe_open

    base, adapter = resolve(config.backbone.path), adapter_dir(config, OURS)
    files, count = list((base / "transformer").glob("*.safetensors")), 0
    for path in [*files, adapter / LORA_FILE] if files else []:  # none here: blank
        with safe_open(path, "pt") as file:
            count += sum(np.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    minutes = []
    for folder in (base, adapter):
        about = folder / "provenance.json"
        minutes.append(json.loads(about.read_text())["seconds"] / 60 if about.is_file() else 0.0)
    return count / 1e6, *minutes
