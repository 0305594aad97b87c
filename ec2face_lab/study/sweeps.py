"""One setting varied at a time: what is trained, and how it scores on validation faces.

    python -m ec2face_lab sweeps --profile mini [--only weights beta] [--list]

A point is a variant of Tables 3 and 4 with some settings replaced, trained with the first seed. Its
run, adapter and pictures lie in `runs/<profile>/sweeps/<sweep>-<point>`; a point whose settings are
the profile's own is the kept adapter. Test faces are never looked at here: settings are chosen from
these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ec2face_core.config import Config, adapter_dir, adapter_name, trained_seeds
from ec2face_core.data import open_dataset
from ec2face_core.mask_branch import LORA_FILE
from ec2face_core.runs import read_metrics

from ..cache import kept_file
from ..plots.differences import length_figure, noise_band, sweep_figure
from ..plots.save import read_rows, save_rows
from .ablation import retrain
from .intervals import summarise, summarise_difference
from .tables import scored, with_seed
from .unimodal import one_condition

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


SPLIT = "validation"

MINUS = "minus {}"  # end of the name of a table of differences to a point

MEASURED = (
    "Text", "OAA", "HFA", "NFA", "RFA", "flow", "gradient spread", "minutes", "LoRA parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One training: how figures call it, the variant, and the settings in which it differs."""

    shown: str
    variant: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)


def _weights(normalize: str, clip: float, scope: str = "dataset", reduction: str = "max") -> dict:
    return {
        "loss.normalize": normalize,
        "loss.clip": clip,
        "loss.scope": scope,
        "loss.reduction": reduction,
    }


def _beta(steepness: float = 10.0, center: float = 0.4, alpha: float = 0.5) -> dict:
    return {
        "loss.steepness": steepness,
        "loss.center": center,
        "loss.alpha_text": alpha,
        "loss.alpha_mask": alpha,
    }


def _lora(rank: int, tokens: str = "mask") -> dict[str, Any]:
    return {"lora.rank": rank, "lora.alpha": float(rank), "lora.tokens": tokens}


ALWAYS = 1000.0  # a center t_c so far right that beta(t) is 1 for every t

# The first point of a sweep is what the others are compared with: the profile's own setting.
SWEEPS: dict[str, dict[str, Point]] = {
    "weights": {
        "clip-30": Point("clipped at 30", settings=_weights("mean", 30.0)),
        "none": Point("no weights", "without_ltal"),
        "clip-3": Point("clipped at 3", settings=_weights("mean", 3.0)),
        "clip-10": Point("clipped at 10", settings=_weights("mean", 10.0)),
        "normalised": Point("not clipped", settings=_weights("mean", 0.0)),
        "raw": Point("raw (Eq. 10)", settings=_weights("none", 0.0)),
        "raw-30": Point("raw, clipped at 30", settings=_weights("none", 30.0)),
        "sample": Point("T of each face", settings=_weights("mean", 30.0, scope="sample")),
        "mean": Point("mean of a cell", settings=_weights("mean", 30.0, reduction="mean")),
        "nearest": Point("nearest pixel", settings=_weights("mean", 30.0, reduction="nearest")),
    },
    "beta": {
        "paper": Point("γ = 10, t_c = 0.4", "both", _beta()),
        "never": Point("β ≡ 0", "none"),
        "gamma-5": Point("γ = 5", "both", _beta(steepness=5.0)),
        "gamma-20": Point("γ = 20", "both", _beta(steepness=20.0)),
        "center-0.2": Point("t_c = 0.2", "both", _beta(center=0.2)),
        "center-0.6": Point("t_c = 0.6", "both", _beta(center=0.6)),
        "always": Point("β ≡ 1", "both", _beta(center=ALWAYS)),
        "alpha-5-always": Point("α = 5, β ≡ 1", "both", _beta(center=ALWAYS, alpha=5.0)),
    },
    "attention": {
        "joint": Point("joint", settings={"lora.attention": "joint"}),
        "decoupled": Point("decoupled", settings={"lora.attention": "decoupled"}),
    },
    "lora": {
        "16": Point("r = 16 on mask tokens", settings=_lora(16)),
        "4": Point("r = 4", settings=_lora(4)),
        "64": Point("r = 64", settings=_lora(64)),
        "all": Point("r = 16 on all tokens", settings=_lora(16, "all")),
    },
    "dropout": {
        f"{p}": Point(f"p = {p}", settings={"trainer.drop_probability": p}) for p in (0.1, 0.0, 0.3)
    },
    "length": {
        f"{steps}-{variant}": Point(
            f"{steps} steps{', without LTAL' if variant == 'without_ltal' else ''}",
            variant,
            {"trainer.steps": steps},
        )
        for steps in (1200, 300, 600, 2400)
        for variant in ("none", "without_ltal")
    },
}

QUESTIONS: dict[str, str] = {
    "weights": "Long-tail weights: Eq. 10 as printed (raw), brought to mean square 1, clipped; "
    "counted over the data set or over each face; brought to a latent cell by maximum, mean or "
    "nearest pixel. `gradient spread`: 95th percentile of the gradient norm over its median.",
    "beta": "The schedule β(t): its slope and center, none (β ≡ 1), and no consistency loss "
    "(β ≡ 0); with the paper's α = 0.5; and ten times that, never faded.",
    "attention": "Attention: joint, or mask tokens that see mask tokens only, which makes sampling "
    "1.7 times faster (`benchmarks/step-tiny.csv`).",
    "lora": "Where the LoRA acts, and its rank.",
    "dropout": "Condition dropout, p of Eq. 13, with the scores of text and of mask alone.",
    "length": "Length of training, with and without long-tail weights: would longer training bring "
    "their gain as well?",
}


def point_config(config: Config, sweep: str, name: str) -> Config:
    """The configuration that a point is trained and sampled with; `config` itself if it is that."""
    other = config.replace(**SWEEPS[sweep][name].settings)
    if other == config:
        return config
    folder = f"{config.profile}/sweeps/{sweep}-{name}"
    return other.replace(profile=folder, adapters=f"runs/{folder}/adapters")


def train_sweeps(config: Config, sweeps: Sequence[str] = tuple(SWEEPS)) -> None:
    """Train every point that is not there. Stopped, the same call resumes."""
    for sweep in sweeps:
        for name, point in SWEEPS[sweep].items():
            other = point_config(config, sweep, name)
            if other is not config:
                retrain(other, (point.variant,))


def sweep_rows(config: Config, sweep: str) -> DataFrame:
    """Long rows of a sweep over the validation faces; a row's method is the point's name.

    Tables: the sweep's name (scores, and what training itself tells: `LoRA parameters`, `minutes`,
    `flow` (Eq. 3 without weights, end of training), `gradient spread` (95th percentile of the
    gradient norm over its median)), and `<sweep>, minus <first point>`, the paired differences.
    """
    import pandas as pd

    dataset, parts, first = open_dataset(config, SPLIT), [], None
    reference = next(iter(SWEEPS[sweep]))
    for name, point in SWEEPS[sweep].items():
        other = point_config(config, sweep, name)
        per_image = scored(other, point.variant, SPLIT)
        about = {"method": name, "dataset": dataset.root.name, "config": config}
        parts.append(summarise(per_image, sweep, **about))
        parts.append(_training_rows(other, point.variant).assign(table=sweep, method=name))
        if sweep == "dropout":
            alone = one_condition(other, point.variant, SPLIT)
            parts.append(alone.assign(table=sweep, method=name))
        first = per_image if first is None else first
        if name != reference:
            minus = f"{sweep}, {MINUS.format(reference)}"
            parts.append(summarise_difference(per_image, first, minus, **about))
    return pd.concat(parts, ignore_index=True)


def noise_rows(config: Config) -> DataFrame:
    """What another seed of training and of the pictures changes by itself: table `seeds`.

    Differences to the first seed, a method `none, seed 43` for each variant and further seed.
    """
    import pandas as pd

    dataset, parts = open_dataset(config, SPLIT), []
    for variant in ("none", "both"):
        first = scored(config, variant, SPLIT)
        for k in range(1, trained_seeds(config)):
            seeded = with_seed(config, k)
            rows = summarise_difference(
                scored(seeded, variant, SPLIT), first, "seeds", f"{variant}, seed {seeded.seed}",
                dataset.root.name, config,
            )  # fmt: skip
            parts.append(rows)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _training_rows(config: Config, variant: str) -> DataFrame:
    """What the training of an adapter tells about itself; its log may not be there."""
    import numpy as np
    import pandas as pd
    from safetensors import safe_open

    with safe_open(adapter_dir(config, variant) / LORA_FILE, "pt") as file:
        sizes = [np.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    found = {"LoRA parameters": float(sum(sizes))}
    log = read_metrics(config.run_dir / "training" / adapter_name(config, variant))
    if log:
        norms = np.array([row["grad_norm"] for row in log])
        flow = np.array([row["unweighted_flow"] for row in log])
        found["minutes"] = sum(row["seconds"] for row in log) / 60
        found["flow"] = float(flow[-len(flow) // 4 :].mean())
        found["gradient spread"] = float(np.percentile(norms, 95) / np.median(norms))
    rows = [{"metric": k, "value": v, "critic": ""} for k, v in found.items()]
    return pd.DataFrame(rows).assign(source="ours")


def kept_sweeps(config: Config) -> tuple[DataFrame, Path]:
    """The rows of every sweep and the file they are from: this profile's own, else the kept ones.

    Raises:
        FileNotFoundError: there are none; the message names the remedy.
    """
    path = kept_file(config, "sweeps")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: `make reproduce PROFILE={config.profile} TRAIN=1 SWEEPS=1` makes "
            "it (hours)"
        )
    return read_rows(path), path


def compared(
    rows: DataFrame, sweep: str, critic: str = "independent"
) -> tuple[DataFrame, DataFrame, dict[str, str], str]:
    """What `effects.sweep_figure` draws: differences, other seeds, labels and the reference's."""
    reference, *others = SWEEPS[sweep]
    own = rows[rows["critic"].isin([critic, ""])]
    differences = own[(own["table"] == f"{sweep}, {MINUS.format(reference)}")]
    variant = SWEEPS[sweep][reference].variant
    noise = own[(own["table"] == "seeds") & own["method"].str.startswith(f"{variant}, seed")]
    labels = {name: SWEEPS[sweep][name].shown for name in others}
    return differences, noise, labels, SWEEPS[sweep][reference].shown


def trained_sweeps(rows: DataFrame) -> list[str]:
    """The sweeps that the rows hold."""
    return [sweep for sweep in SWEEPS if (rows["table"] == sweep).any()]


def draw(rows: DataFrame, sweep: str) -> Figure:
    """The figure of a sweep, independent critics."""
    if sweep == "length":
        own = rows[(rows["critic"] == "independent") & (rows["table"] == "length")]
        return length_figure(own, length_series(), "optimiser steps")
    return sweep_figure(*compared(rows, sweep))


def length_series() -> dict[str, list[tuple[float, str]]]:
    """What `effects.length_figure` draws of the sweep `length`: (steps, point) of each variant."""
    names = {"without_ltal": "without LTAL", "none": "with LTAL"}
    series: dict[str, list[tuple[float, str]]] = {label: [] for label in names.values()}
    for name, point in SWEEPS["length"].items():
        series[names[point.variant]].append((point.settings["trainer.steps"], name))
    return series


def conclusion(
    rows: DataFrame, sweep: str, metrics: Sequence[str] = ("RFA", "OAA", "HFA", "Text")
) -> str:
    """One sentence: which settings change a metric more than faces and another seed explain."""
    differences, noise, labels, reference = compared(rows, sweep)
    if differences.empty:
        return "Not trained yet: `make reproduce SWEEPS=1`."
    found = []
    for metric in metrics:
        low, high = noise_band(noise, metric)
        of = differences[differences["metric"] == metric].set_index("method")
        beyond = [
            f"{shown} {of['value'][name]:+.1f}"
            for name, shown in labels.items()
            if (of["ci_low"][name] > 0 or of["ci_high"][name] < 0)
            and not low <= of["value"][name] <= high
        ]
        if beyond:
            found.append(f"{metric}: {', '.join(beyond)}")
    said = "; ".join(found) if found else "none"
    return f"Against {reference}, beyond faces and other seeds: {said}."


def sweep_table(rows: DataFrame, sweep: str, critic: str = "independent") -> DataFrame:
    """Points down; scores, and what training tells, across."""
    own = rows[(rows["table"] == sweep) & rows["critic"].isin([critic, ""])]
    table = own.pivot(index="method", columns="metric", values="value")
    names = [*MEASURED, *(m for m in own["metric"].unique() if ", " in m)]
    table = table.reindex(index=list(SWEEPS[sweep]), columns=[n for n in names if n in table])
    return table.rename(index={k: point.shown for k, point in SWEEPS[sweep].items()})


def run_sweeps(config: Config, sweeps: Sequence[str] = tuple(SWEEPS)) -> Path:
    """Train what is missing, score, and write `runs/<profile>/sweeps/sweeps.csv` and its JSON.

    Rows of other sweeps that the file has stay in it.
    """
    import pandas as pd

    train_sweeps(config, sweeps)
    path = config.run_dir / "sweeps" / "sweeps.csv"
    parts = [noise_rows(config), *(sweep_rows(config, sweep) for sweep in sweeps)]
    if path.is_file():
        others = read_rows(path)
        made = others["table"].str.split(",").str[0].isin([*sweeps, "seeds"])
        parts.append(others[~made])
    adapters = [
        adapter_dir(point_config(config, sweep, name), point.variant)
        for sweep in sweeps
        for name, point in SWEEPS[sweep].items()
    ]
    save_rows(pd.concat(parts, ignore_index=True), path, config, inputs=adapters)
    return path
