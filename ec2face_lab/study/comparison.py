"""The comparison systems as experiments: their training, EC²Face's lead, and their cost.

They are trained in miniature, as many at a time as there are cores; the same call resumes.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config, ConfigError, adapter_dir
from ec2face_core.data import open_dataset
from ec2face_core.io.lora_file import LORA_FILE
from ec2face_core.io.paths import resolve
from ec2face_core.io.sums import list_sums
from ec2face_core.runs import path_digest

from ..baselines import NEWER, PAPER, SYSTEMS, WEIGHTS, systems, trained, weights_dir
from ..baselines.int8_weights import shared_file
from ..baselines.system import SIDES
from ..baselines.training_inputs import recorded_inputs, shared_inputs, training_inputs
from ..launch import run, side_by_side
from ..plots.render_tables import METHODS
from .ablation import parameter_count
from .painters import painter, weight_files
from .pictures import available, official_pictures
from .summary import F1_OF, cell_of, with_holm
from .tables import describe_intervals, difference_rows
from .verdicts import verdict_of

if TYPE_CHECKING:
    from pandas import DataFrame, Series


OURS = "both"
MINUS = "EC²Face - {}"  # label of a difference to a system


# ------------------------------------------------------------------------------------ training


def retrain_systems(
    config: Config, names: Sequence[str] = tuple(SYSTEMS), keep: Path | None = None
) -> None:
    """Train systems into `runs/<profile>/baselines`, one child process for each core; resumes.

    Args:
        config: data, time budgets and seed.
        names: some of `SYSTEMS`.
        keep: folder to copy weights and provenance to, as `data/mini/baselines`.
    """
    if config.data.size not in SIDES:
        print(
            f"The comparison systems are written for miniatures of {SIDES} px. At "
            f"{config.data.size} px score the pictures of the official repositories: "
            f"`python -m ec2face_lab evaluate --profile {config.profile} --images DIR --layout ...`"
        )
        return
    classes = systems()
    folder = config.run_dir / "baselines"
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

    # what two systems share is trained first, by one of them, and beside the independent systems
    sharing = [name for name in names if classes[name].shares]
    first = {classes[name].shares[0]: name for name in sharing}
    jobs = [(name, True) for name in first.values()]
    jobs += [(name, False) for name in names if name not in sharing]
    with side_by_side() as pool:
        list(pool.map(train, jobs))
        list(pool.map(train, [(name, False) for name in sharing]))
    if keep is not None:
        for name in names:
            _check_others(config, name, names, keep)
        for name in names:
            _copy(config, name, keep)


def _shared_there(config: Config, name: str, out: Path) -> bool:
    """Whether what a system shares was trained for this profile, or was copied here."""
    path = shared_file(out, systems()[name].shares[0])
    return path.is_file() and recorded_inputs(path.parent) in ({}, shared_inputs(config))


def _finished(config: Config, name: str, out: Path) -> bool:
    if not (out / WEIGHTS).is_file() or not (out / "provenance.json").is_file():
        return False
    system = systems()[name]
    inputs = training_inputs(config, system, out, system.budget(config), config.seed)
    return recorded_inputs(out) == inputs


def _check_others(config: Config, name: str, names: Sequence[str], target: Path) -> None:
    """Refuse to replace in `target` a network that systems kept there share with `name`.

    Raises:
        ConfigError: others than `names` are kept there, on another network that they share with it.
    """
    folder = weights_dir(config, name)
    for stage in systems()[name].shares[:1]:
        new = shared_file(folder, stage)
        kept = shared_file(target / folder.name, stage)
        others = [
            other
            for other, system in systems().items()
            if stage in system.shares
            and other not in names
            and (target / SYSTEMS[other].partition(".")[0] / WEIGHTS).is_file()
        ]
        if others and kept.is_file() and path_digest(kept) != path_digest(new):
            raise ConfigError(
                f"{', '.join(others)} in {target} were trained on {kept}, which would be replaced: "
                "name them in --only as well"
            )


def _copy(config: Config, name: str, target: Path) -> None:
    """Weights and provenance of a system, and what it shares, to `target`."""
    folder = weights_dir(config, name)
    for source in (*weight_files(config, name), folder / "provenance.json"):
        copy = target / source.relative_to(folder.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy != source:
            shutil.copyfile(source, copy)
            list_sums(copy)


# ---------------------------------------------------------------------------- tables 1 and 2


def compared(config: Config, split: str) -> dict[str, str]:
    """Methods of Tables 1 and 2: name in the table -> method; ceilings last."""
    systems_here = {name: name for name in available(config, split)}
    return systems_here | {"EC2Face": OURS, "real": "real", "vae_round_trip": "vae_round_trip"}


def compared_files(config: Config, split: str) -> list[Path]:
    """Files that shape the compared pictures: weights, or pictures that official code wrote."""
    files = [adapter_dir(config, OURS), resolve(config.backbone.path)]
    for name in available(config, split):
        pictures = official_pictures(config, name, split)
        files += [pictures] if pictures.is_dir() else weight_files(config, name)
    return list(dict.fromkeys(files))


def lead_rows(config: Config, table: str, split: str, seeds: int = 1) -> DataFrame:
    """EC²Face minus each system on the same faces, with intervals; empty without systems.

    The p-values of `summary.with_holm` are those of this table's claims.
    """
    import pandas as pd

    pairs = {MINUS.format(name): (OURS, name) for name in available(config, split)}
    if not pairs:
        return pd.DataFrame()
    return with_holm(difference_rows(config, table, pairs, split, seeds))


def describe_lead(
    rows: DataFrame, lead: DataFrame, metrics: Sequence[str] = ("Text", "OAA", "RFA")
) -> str:
    """A line for each metric: EC²Face, the best of the paper's systems, and the newer ones.

    A system counts as lower if it is so in recall and in F1, after Holm's adjustment.

    Args:
        rows: those of a table.
        lead: those of `lead_rows`.
        metrics: one line each.
    """
    if lead.empty:
        return "No comparison system has pictures or weights here."
    lines = []
    for metric in metrics:
        values = rows[(rows["metric"] == metric) & (rows["critic"] == "independent")]
        values = values[values["source"] == "ours"].set_index("method")["value"]

        def compare(name: str, metric: str = metric, values: Series = values) -> str:
            gaps = []
            for one in (metric, F1_OF.get(metric)):
                row = cell_of(lead, MINUS.format(name), one, "independent") if one else None
                if row is not None:
                    interval = f"[{row['ci_low']:+.1f}, {row['ci_high']:+.1f}]"
                    label = "" if one == metric else f"{one} "
                    gaps.append(f"{label}{row['value']:+.1f} {interval}")
            return f"{name} {values[name]:.1f}: {', '.join(gaps)}"

        line = f"{metric}: {METHODS['EC2Face']} {values['EC2Face']:.1f}"
        if present := [name for name in PAPER if name in values]:
            best = values[present].idxmax()
            factor = values["EC2Face"] / values[best]
            verdicts = [verdict_of(lead, MINUS.format(name), metric) for name in present]
            lower = verdicts.count("higher")
            line += (
                f", best of the paper's systems {compare(best)}, a factor of {factor:.2f}; "
                f"{lower} of {len(present)} are significantly lower"
            )
        newer = [compare(name) for name in NEWER if name in values]
        lines.append("; ".join([line, *newer]) + ".")
    return "\n".join([*lines, describe_intervals(lead)])


def system_facts(config: Config, split: str = "test") -> DataFrame:
    """Parameters, minutes of training and seconds for each picture, one row for each system.

    Minutes are summed over the cores of a training, or over its GPUs. A foundation's exclude the
    autoencoder, which every latent model shares. The cells of an official repository's pictures are
    blank; seconds are measured only if there are miniatures.
    """
    import pandas as pd

    miniatures = trained(config)
    ours = _own_facts(config)
    rows = []
    for name in available(config, split):
        path = weights_dir(config, name) / "provenance.json"
        official = official_pictures(config, name, split).is_dir()
        record = {}
        if path.is_file() and not official:
            record = json.loads(path.read_text())["parameters"]
        training, shared = (
            sum(stage["seconds"] for stage in record.get(key, {}).values())
            * record.get("threads", 1)
            / 60
            for key in ("stages", "shared")
        )
        foundation = ours[1] if "base" in record.get("stands_on", {}) else shared
        seconds = sampling_seconds(config, name) if name in miniatures and not official else 0
        rows.append((name, record.get("parameters", 0) / 1e6, foundation, training, seconds))
    seconds = sampling_seconds(config, OURS) if miniatures else 0
    rows.append((METHODS["EC2Face"], *ours, seconds))
    places = {
        "parameters (M)": 2,
        "foundation (core min)": 1,
        "training (core min)": 1,
        "sampling (s)": 3,
    }
    table = pd.DataFrame(rows, columns=["system", *places]).set_index("system").round(places)
    return table.astype(object).where(table > 0, "")


def sampling_seconds(config: Config, method: str, count: int = 8) -> float:
    """Seconds for each of `count` test faces in one batch, the better of two measurements."""
    dataset = open_dataset(config, "test")
    model = painter(config, method, dataset)
    ids = dataset.ids[:count]
    model.paint(ids)  # loads the weights
    times = []
    for _ in range(2):
        began = time.perf_counter()
        model.paint(ids)
        times.append(time.perf_counter() - began)
    return min(times) / len(ids)


def _own_facts(config: Config) -> tuple[float, float, float]:
    """Millions of parameters, and minutes of the base's and of the LoRA's training.

    Minutes are summed as in `system_facts`.
    """
    base = resolve(config.backbone.path)
    lora = adapter_dir(config, OURS)
    files = list((base / "transformer").glob("*.safetensors"))
    count = 0
    if files:  # without weights here: blank
        count = sum(parameter_count(path) for path in (*files, lora / LORA_FILE))
    minutes = []
    for folder in (base, lora):
        path = folder / "provenance.json"
        record = json.loads(path.read_text()) if path.is_file() else {"seconds": 0}
        minutes.append(record["seconds"] / 60 * _devices(record))
    return count / 1e6, *minutes


def _devices(record: Mapping[str, Any]) -> int:
    """How many cores, or GPUs, a training used, from its provenance."""
    on_cores = re.match(r"cpu \(.*, (\d+) cores\)", record.get("device", ""))
    return int(on_cores[1]) if on_cores else record.get("parameters", {}).get("processes", 1)
