"""One setting is varied at a time: the trainings of a sweep, and their scores on validation faces.

A point is a variant of Tables 3 and 4 with some settings replaced, trained with the first seed. Its
run, LoRA and pictures lie in `runs/<profile>/sweeps/<sweep>-<point>`; a point whose settings are
the profile's own uses the kept LoRA. Test faces are never looked at: these numbers choose settings.
A point has one training, so what a sweep shows is exploratory: its intervals are over faces, and
the range of two or three other trainings is too small a sample to be a test. Points of `TRAININGS`
have several, and are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ec2face_core.attributes import CLASSES, GROUPS
from ec2face_core.config import Config, NotInProfileError, adapter_dir, adapter_name, trained_seeds
from ec2face_core.io.lora_file import LORA_FILE
from ec2face_core.io.paths import ROOT
from ec2face_core.losses import NEVER_FADES
from ec2face_core.runs import read_metrics

from ..cache import kept_file
from ..plots.differences import length_figure, noise_band, sweep_figure, trade_figure
from ..plots.save import read_rows, save_rows
from .ablation import parameter_count, retrain
from .collapse import plus_verdict, spread_rows
from .pictures import PictureSet
from .summary import summarise, summarise_difference
from .tables import picture_sets, scored, set_rows, with_seed
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
    """One training: its label in figures, the variant, and the settings in which it differs."""

    label: str
    method: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_sampling(self) -> bool:
        """Whether it differs in sampling alone and needs no training."""
        return all(name.startswith("sampling.") for name in self.settings)


def _weights(normalize: str, clip: float, scope: str = "dataset", reduction: str = "max") -> dict:
    return {
        "loss.normalize": normalize,
        "loss.clip": clip,
        "loss.scope": scope,
        "loss.reduction": reduction,
    }


def _bounded(clip: float, floor: float = 0.0, weighting: str = "inverse") -> dict[str, Any]:
    return {
        "loss.normalize": "constant",
        "loss.clip": clip,
        "loss.floor": floor,
        "loss.weighting": weighting,
    }


def _alpha(text: float, mask: float, **settings: Any) -> dict[str, Any]:
    others = {f"loss.{name}": value for name, value in settings.items()}
    return {"loss.alpha_text": text, "loss.alpha_mask": mask, **others}


def _beta(steepness: float = 10.0, center: float = 0.4, alpha: float = 0.5) -> dict:
    return {
        "loss.steepness": steepness,
        "loss.center": center,
        "loss.alpha_text": alpha,
        "loss.alpha_mask": alpha,
    }


def _lora(rank: int, tokens: str = "mask") -> dict[str, Any]:
    return {"lora.rank": rank, "lora.alpha": float(rank), "lora.tokens": tokens}


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
        "always": Point("β ≡ 1", "both", _beta(center=NEVER_FADES)),
        "alpha-5-always": Point("α = 5, β ≡ 1", "both", _beta(center=NEVER_FADES, alpha=5.0)),
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
        **{
            f"{p}": Point(f"p = {p}", settings={"trainer.drop_probability": p})
            for p in (0.1, 0.0, 0.3)
        },
        "black": Point("p = 0.1, black", settings={"trainer.null_mask": "black"}),
    },
    "length": {
        f"{steps}-{method}": Point(
            f"{steps} steps{', without LTAL' if method == 'without_ltal' else ''}",
            method,
            {"trainer.steps": steps},
        )
        for steps in (1200, 300, 600, 2400)
        for method in ("none", "without_ltal")
    },
    "long-tail": {
        "none": Point("no weights", "without_ltal"),
        "raw": Point("Eq. 10 as printed", settings=_weights("none", 0.0)),
        **{f"clip-{c}": Point(f"clipped at {c}", settings=_bounded(c)) for c in (3, 10, 30)},
        **{f"floor-{c}": Point(f"from 1 to {c}", settings=_bounded(c, 1.0)) for c in (3, 10, 30)},
        "sqrt": Point("square root", settings=_bounded(0, weighting="sqrt")),
        "effective": Point("effective number", settings=_bounded(0, weighting="effective")),
        "focal": Point("focal (by error)", settings=_bounded(0, weighting="focal")),
        "faces-0.2": Point("20 % rare faces", "without_ltal", {"trainer.rare_faces": 0.2}),
        "faces-0.4": Point("40 % rare faces", "without_ltal", {"trainer.rare_faces": 0.4}),
        "both": Point(
            "20 % rare faces, from 1 to 10",
            settings={**_bounded(10, 1.0), "trainer.rare_faces": 0.2},
        ),
    },
    "consistency": {
        "none": Point("no consistency loss", "none"),
        "text": Point("text, α = 0.5", "text"),
        "text-5": Point("text, α = 5", "text", _alpha(5.0, 0.0)),
        "text-all": Point(
            "text, LoRA on all tokens", "text", {**_alpha(0.5, 0.0), "lora.tokens": "all"}
        ),
        "all": Point("no loss, LoRA on all tokens", "none", {"lora.tokens": "all"}),
        "mask": Point("mask, α = 0.5", "mask"),
        # 19 times the mean over classes, which is balance 19/20 of a loss ten times as large
        "mask-summed": Point("mask, entropy summed", "mask", _alpha(0.0, 5.0, balance=0.95)),
        "mask-20": Point("mask, α = 20", "mask", _alpha(0.0, 20.0)),
        "own-2": Point("mask on own paths, α = 2", "mask", _alpha(0.0, 2.0, states="own")),
        "own-5": Point("mask on own paths, α = 5", "mask", _alpha(0.0, 5.0, states="own")),
        "own-both": Point("both, own paths, α = 0.5, 5", "both", _alpha(0.5, 5.0, states="own")),
        "late": Point("mask, last third", "mask", _alpha(0.0, 5.0, center=0.2, begins=0.67)),
        "sampling": Point("none, mask leads sampling", "none", {"sampling.consistency": 0.2}),
    },
}

TRAININGS = {"consistency": 3}  # of each point; of the others one

QUESTIONS: dict[str, str] = {
    "weights": "Long-tail weights: Eq. 10 as printed (raw), brought to mean square 1, clipped; "
    "counted over the data set or over each face; brought to a latent cell by maximum, mean or "
    "nearest pixel. `gradient spread`: 95th percentile of the gradient norm over its median.",
    "beta": "The schedule β(t): its slope and center, none (β ≡ 1), and no consistency loss "
    "(β ≡ 0); with the paper's α = 0.5; and ten times that, never faded.",
    "attention": "Attention: joint, or mask tokens that see mask tokens only, which makes sampling "
    "1.7 times faster (`benchmarks/step-tiny.csv`).",
    "lora": "Where the LoRA acts, and its rank.",
    "dropout": "Condition dropout, p of Eq. 13, with the scores of text and of mask alone; a "
    "dropped mask is not read, or it is a black image.",
    "long-tail": "What brings rare classes: weights (Eq. 10 as printed, bounded above, above and "
    "below, its root, the effective number; by error), rare faces more often, or both. Recall of "
    "the rare classes against their precision.",
    "consistency": "The losses of text and mask, each by itself; Eq. 7's cross-entropy averaged or "
    "summed over classes; the LoRA on all tokens; the mask loss on the model's own paths, or late "
    "and at small t (α = 5, t_c = 0.2); and sampling that is led by it. "
    "Three trainings a point, and measures of collapse (`collapse.plus_verdict`).",
    "length": "Length of training, with and without long-tail weights: would longer training bring "
    "their gain as well?",
}


def point_config(config: Config, sweep: str, name: str) -> Config:
    """The configuration of a point's training and sampling; `config` itself if it is equal."""
    point = SWEEPS[sweep][name]
    other = config.replace(**point.settings)
    if other == config:
        return config
    folder = f"{config.profile}/sweeps/{sweep}-{name}"
    adapters = f"runs/{folder}/adapters"
    if point.is_sampling:
        kept = adapter_dir(config, point.method).parent
        adapters = str(kept.relative_to(ROOT) if kept.is_relative_to(ROOT) else kept)
    return other.replace(profile=folder, adapters=adapters)


def train_sweeps(config: Config, sweeps: Sequence[str] = tuple(SWEEPS)) -> None:
    """Train every point that is missing; the same call resumes."""
    for sweep in sweeps:
        for name, point in SWEEPS[sweep].items():
            other = point_config(config, sweep, name)
            if other is not config and not point.is_sampling:
                retrain(other, (point.method,), TRAININGS.get(sweep, 1))


def sweep_rows(config: Config, sweep: str) -> DataFrame:
    """Long rows of a sweep over the validation faces; a row's method is the point's name.

    Tables: the sweep's name (scores, and values of the training log: `LoRA parameters`, `minutes`,
    `flow` (Eq. 3 without weights, end of training), `gradient spread` (95th percentile of the
    gradient norm over its median)), and `<sweep>, minus <first point>`, the paired differences.
    """
    import pandas as pd

    reference = next(iter(SWEEPS[sweep]))
    trainings = TRAININGS.get(sweep, 1)
    sides: dict[str, Side] = {}
    parts = []
    for name, point in SWEEPS[sweep].items():
        other = point_config(config, sweep, name)
        sets = picture_sets(other, point.method, SPLIT, trainings)
        sides[name] = Side(sets, scored(sets))
        parts.append(_point_rows(config, sweep, name, [sides[name]]))
        parts.append(_training_rows(other, point.method).assign(table=sweep, method=name))
        if sweep == "dropout":
            alone = one_condition(other, point.method, SPLIT)
            parts.append(alone.assign(table=sweep, method=name))
        if name != reference:
            minus = f"{sweep}, {MINUS.format(reference)}"
            pair = [sides[name], sides[reference]]
            parts.append(_point_rows(config, minus, name, pair))
            for k in range(trainings if trainings > 1 else 0):
                label = f"{name}, seed {config.seed + k}"
                parts.append(_point_rows(config, minus, label, [side.training(k) for side in pair]))
    return pd.concat(parts, ignore_index=True)


class Side(NamedTuple):
    """The trainings of a point: their pictures and scores."""

    sets: list[PictureSet]
    scores: list[DataFrame]

    def training(self, k: int) -> Side:
        """One of them alone."""
        return Side([self.sets[k]], [self.scores[k]])


def _point_rows(config: Config, table: str, name: str, sides: Sequence[Side]) -> DataFrame:
    """Long rows of a point's trainings, or of one side's minus the other's."""
    import pandas as pd

    first = sides[0]
    labels = {"table": table, "method": name, "dataset": first.sets[0].dataset.root.name}
    rows = summarise_difference if len(sides) == 2 else summarise
    parts = [rows(*(side.scores for side in sides), config=config, **labels)]
    if len(first.sets) > 1:
        parts += set_rows(config, [side.sets for side in sides], labels)
        if len(sides) == 1:
            parts.append(spread_rows(first.sets, table, name))
    return pd.concat(parts, ignore_index=True)


def judged_points(rows: DataFrame, sweep: str) -> DataFrame:
    """What `collapse.plus_verdict` says of each point of a sweep with several trainings.

    Returns:
        Rows point, verdict, against.
    """
    import pandas as pd

    reference = next(iter(SWEEPS[sweep]))
    minus = rows[rows["table"] == f"{sweep}, {MINUS.format(reference)}"]
    scores = dict(tuple(rows[rows["table"] == sweep].groupby("method")))
    judged = []
    for name, point in SWEEPS[sweep].items():
        if name == reference or name not in scores:
            continue
        alone = minus[minus["method"].str.startswith(f"{name}, seed ")].groupby("method")
        verdict, against = plus_verdict(
            scores[name],
            minus[minus["method"] == name],
            [part for _, part in alone],
            scores[reference],
        )
        judged.append((point.label, verdict, "; ".join(against)))
    return pd.DataFrame(judged, columns=["point", "verdict", "against"])


def noise_rows(config: Config) -> DataFrame:
    """The effect of another seed of training and of the pictures: table `seeds`.

    Differences to the first seed; a method `none, seed 43` for each variant and further seed.
    """
    import pandas as pd

    parts = []
    for method in ("none", "both"):
        first = PictureSet(config, method, SPLIT)
        dataset = first.dataset.root.name
        for k in range(1, trained_seeds(config)):
            seeded = with_seed(config, k)
            sides = ([PictureSet(seeded, method, SPLIT).scores()], [first.scores()])
            label = f"{method}, seed {seeded.seed}"
            parts.append(summarise_difference(*sides, "seeds", label, dataset, config))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _training_rows(config: Config, method: str) -> DataFrame:
    """The size of a LoRA, and values of its training log if that is there."""
    import numpy as np
    import pandas as pd

    size = parameter_count(adapter_dir(config, method) / LORA_FILE)
    values = {"LoRA parameters": float(size)}
    log = read_metrics(config.run_dir / "training" / adapter_name(config, method))
    if log:
        norms = np.array([row["grad_norm"] for row in log])
        flow = np.array([row["unweighted_flow"] for row in log])
        values["minutes"] = sum(row["seconds"] for row in log) / 60
        values["flow"] = float(flow[-len(flow) // 4 :].mean())
        values["gradient spread"] = float(np.percentile(norms, 95) / np.median(norms))
    rows = [{"metric": k, "value": v, "critic": ""} for k, v in values.items()]
    return pd.DataFrame(rows).assign(source="ours")


def kept_sweeps(config: Config) -> tuple[DataFrame, Path]:
    """The rows of every sweep, and their file (see `kept_file`).

    Raises:
        FileNotFoundError: there are none; the message names the remedy.
        NotInProfileError: the profile has no validation faces, by which settings are chosen.
    """
    path = kept_file(config, "sweeps")
    if not path.is_file() and not config.data.validation:
        raise NotInProfileError(
            f"sweeps are measured on validation faces, and profile {config.profile} has none "
            "(data.validation): they are the miniature's"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: `make reproduce PROFILE={config.profile} TRAIN=1 SWEEPS=1` makes "
            "it (hours)"
        )
    return read_rows(path), path


def compared(
    rows: DataFrame, sweep: str, role: str = "independent"
) -> tuple[DataFrame, DataFrame, dict[str, str], str]:
    """Arguments of `sweep_figure`: differences, other seeds, labels and the reference's label."""
    reference, *others = SWEEPS[sweep]
    scores = rows[rows["critic"].isin([role, ""])]
    minus = scores["table"] == f"{sweep}, {MINUS.format(reference)}"
    differences = scores[minus & scores["method"].isin(others)]  # not each training alone
    of_seeds = scores[scores["table"] == "seeds"]
    seed = f"{SWEEPS[sweep][reference].method}, seed"
    noise = of_seeds[of_seeds["method"].str.startswith(seed)]
    known = set(differences["method"])  # kept rows may be older than a point
    labels = {name: SWEEPS[sweep][name].label for name in others if name in known}
    return differences, noise, labels, SWEEPS[sweep][reference].label


def trained_sweeps(rows: DataFrame) -> list[str]:
    """The sweeps that the rows hold."""
    return [sweep for sweep in SWEEPS if (rows["table"] == sweep).any()]


def plot_sweep(rows: DataFrame, sweep: str) -> Figure:
    """The figure of a sweep, by the independent perception models."""
    if sweep == "length":
        scores = rows[(rows["critic"] == "independent") & (rows["table"] == "length")]
        return length_figure(scores, length_series(), "optimiser steps")
    if sweep == "long-tail":
        return trade_figure(rare_trade(rows, sweep))
    return sweep_figure(*compared(rows, sweep))


def length_series() -> dict[str, list[tuple[float, str]]]:
    """Argument of `length_figure`: (steps, point) of each variant in the sweep `length`."""
    names = {"without_ltal": "without LTAL", "none": "with LTAL"}
    series: dict[str, list[tuple[float, str]]] = {label: [] for label in names.values()}
    for name, point in SWEEPS["length"].items():
        series[names[point.method]].append((point.settings["trainer.steps"], name))
    return series


def conclusion(
    rows: DataFrame, sweep: str, metrics: Sequence[str] = ("RFA", "OAA", "HFA", "Text")
) -> str:
    """One sentence: the settings whose intervals do not contain 0 and that exceed other seeds."""
    differences, noise, labels, reference = compared(rows, sweep)
    if differences.empty:
        return "Not trained yet: `make reproduce SWEEPS=1`."
    if sweep in TRAININGS:
        judged = judged_points(rows, sweep).to_dict("records")
        said = [f"{r['point']}: {r['verdict']} ({r['against'] or 'in all'})" for r in judged]
        return f"Compared with {reference}, {TRAININGS[sweep]} trainings each. {'; '.join(said)}."
    parts = []
    for metric in metrics:
        low, high = noise_band(noise, metric)
        table = differences[differences["metric"] == metric].set_index("method")
        effects = [
            f"{label} {table['value'][name]:+.1f}"
            for name, label in labels.items()
            if (table["ci_low"][name] > 0 or table["ci_high"][name] < 0)
            and not low <= table["value"][name] <= high
        ]
        if effects:
            parts.append(f"{metric}: {', '.join(effects)}")
    summary = "; ".join(parts) or "none"
    said = (
        "Exploratory (one training a point, intervals over faces). Differences to "
        f"{reference} that exclude 0 and exceed the other seeds: {summary}."
    )
    if sweep == "long-tail":
        trade = rare_trade(rows, sweep)
        front = ", ".join(trade["label"][trade["front"]])
        said += f" No other point has both more recall and more precision of RFA: {front}."
    return said


def rare_trade(rows: DataFrame, sweep: str, role: str = "independent") -> DataFrame:
    """What a sweep's points pay for the recall of rare classes.

    Returns:
        Rows label, recall and precision of RFA (means over its classes), HFA, and front: whether no
        other point has at least as much of both and more of one.
    """
    scores = rows[(rows["table"] == sweep) & (rows["critic"] == role)]
    table = scores.pivot(index="method", columns="metric", values="value").astype(float)
    table = table.reindex(list(SWEEPS[sweep])).dropna(how="all")
    names = [f"precision_{CLASSES[i]}" for i in GROUPS["RFA"]]
    trade = table[["RFA", "HFA"]].rename(columns={"RFA": "recall"})
    trade["precision"] = table[names].mean(axis=1)
    both = trade[["recall", "precision"]].to_numpy()
    beaten = (both[None] >= both[:, None]).all(2) & (both[None] > both[:, None]).any(2)
    trade["front"] = ~beaten.any(1)
    trade["label"] = [SWEEPS[sweep][name].label for name in trade.index]
    return trade.reset_index(drop=True)


def sweep_table(rows: DataFrame, sweep: str, role: str = "independent") -> DataFrame:
    """Points down; scores, and values of the training log, across."""
    scores = rows[(rows["table"] == sweep) & rows["critic"].isin([role, ""])]
    table = scores.pivot(index="method", columns="metric", values="value")
    names = [*MEASURED, *(m for m in scores["metric"].unique() if ", " in m)]
    points = [name for name in SWEEPS[sweep] if name in table.index]
    table = table.reindex(index=points, columns=[n for n in names if n in table])
    return table.rename(index={k: point.label for k, point in SWEEPS[sweep].items()})


def run_sweeps(config: Config, sweeps: Sequence[str] = tuple(SWEEPS)) -> Path:
    """Train what is missing, score, and write `runs/<profile>/sweeps/sweeps.csv` and its JSON.

    Rows of other sweeps stay in the file.
    """
    import pandas as pd

    train_sweeps(config, sweeps)
    path = config.run_dir / "sweeps" / "sweeps.csv"
    parts = [noise_rows(config), *(sweep_rows(config, sweep) for sweep in sweeps)]
    if path.is_file():
        others = read_rows(path)
        replaced = others["table"].str.split(",").str[0].isin([*sweeps, "seeds"])
        parts.append(others[~replaced])
    loras = [
        adapter_dir(point_config(config, sweep, name), point.method)
        for sweep in sweeps
        for name, point in SWEEPS[sweep].items()
    ]
    save_rows(pd.concat(parts, ignore_index=True), path, config, inputs=loras)
    return path
