"""One sentence under a figure, made from the numbers that the figure shows.

So it stays true whatever they are. Sentences about tables of results are in `experiments.py`,
about sweeps and altered masks beside these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .attributes import CLASS_ID, GROUPS, display_name
from .config import Config
from .journal import read_metrics
from .scoring import CRITICS, load_critics

if TYPE_CHECKING:
    from pandas import DataFrame

RARE = [("ear_r", "earrings"), ("neck_l", "necklaces")]


def about_round_trip(quality: DataFrame) -> str:
    """From `inspection.round_trip_quality`."""
    row = quality.iloc[0]
    return (
        f"The autoencoder returns a test face with {row['value']:.1f} {row['metric']} "
        f"[{row['ci_low']:.1f}, {row['ci_high']:.1f}], n = {row['n']:.0f}."
    )


def about_parsers(rows: DataFrame) -> str:
    """From the rows of `real`: both parsers' accuracy, and the class that each reads worst."""
    parts = []
    for critic in CRITICS:
        own = rows[rows["critic"] == critic].set_index("metric")["value"].astype(float)
        classes = own[[name for name in CLASS_ID if name in own]]
        worst = display_name(CLASS_ID[classes.idxmin()])
        parts.append(f"{critic} {own['OAA']:.1f} (worst: {worst} {classes.min():.0f})")
    return f"OAA of the parsers on real test faces: {', '.join(parts)}."


def about_text_pictures(config: Config, images: Tensor, captions: Sequence[str]) -> str:
    """Do pictures fit their own caption better than the other rows'? Independent CLIP.

    images: `rows seeds 3 h w` in [-1, 1], a row for each caption.
    """
    clip = load_critics(config).clips[CRITICS[0]]
    with torch.no_grad():
        seen = clip.image_features(images.flatten(0, 1).to(clip.device))
    scores = 100 * (seen @ clip.text_features(list(captions)).T).cpu()
    own = torch.eye(len(captions), dtype=torch.bool).repeat_interleave(images.shape[1], 0)
    found = (scores.argmax(1) == own.float().argmax(1)).float().mean()
    others = scores[~own].mean() if len(captions) > 1 else float("nan")
    return (
        f"Text score with the own caption {scores[own].mean():.1f}, with the other rows' "
        f"{others:.1f}; {100 * found:.0f} % of the pictures fit their own best."
    )


def about_frequency(frequency: DataFrame) -> str:
    """From `statistics.attribute_frequency`: the span of the long tail."""
    shares = frequency.set_index("class")["pixel_share"].astype(float)
    shares = shares[shares > 0]
    first, last = (display_name(CLASS_ID[shares.idxmax()]), display_name(CLASS_ID[shares.idxmin()]))
    return (
        f"{first} has {shares.max() / shares.min():,.0f} times the pixels of {last} "
        f"({shares.max():.1f} % against {shares.min():.2g} %)."
    )


def about_reductions(reductions: DataFrame) -> str:
    """From `inspection.reduction_table`: what mean and nearest lose of the rare classes."""
    kept = reductions.pivot(index="class", columns="reduction", values="kept")
    lost = reductions.pivot(index="class", columns="reduction", values="lost")
    parts = [
        f"{word}: mean {kept['mean'][name]:.0f} %, nearest {kept['nearest'][name]:.0f} % "
        f"(lost in {lost['mean'][name]:.0f} % and {lost['nearest'][name]:.0f} % of the faces)"
        for name, word in RARE
        if name in kept.index
    ]
    return f"Weight kept on the latent grid, where the maximum keeps all. {'; '.join(parts)}."


def about_fits(fits: DataFrame) -> str:
    """From `estimation.fitted_beta`: where the measured knees lie, and what trains the model."""
    set_, fitted = fits.iloc[0], fits.iloc[1:]
    return (
        f"Fitted centers {fitted['center'].min():.2f} to {fitted['center'].max():.2f} (configured "
        f"{set_['center']:g}), slopes {fitted['steepness'].min():.1f} to "
        f"{fitted['steepness'].max():.1f} (configured {set_['steepness']:g})."
    )


def about_gradient_factor(fits: DataFrame) -> str:
    """From `estimation.fitted_beta`: where t beta(t) is largest."""
    set_, fitted = fits.iloc[0], fits.iloc[1:]
    return (
        f"t · β(t) is largest at t = {set_['strongest_at']:.2f} as configured, at "
        f"{fitted['strongest_at'].min():.2f} to {fitted['strongest_at'].max():.2f} with the fits."
    )


def about_training(run_dir: Path) -> str:
    """From a run's log: flow matching at its start and end."""
    flow = np.array([row["unweighted_flow"] for row in read_metrics(run_dir)])
    few = max(1, len(flow) // 4)
    return (
        f"Flow matching without weights: {flow[:few].mean():.3f} over the first {few} steps, "
        f"{flow[-few:].mean():.3f} over the last {few}."
    )


def about_rare_parts(config: Config, maps: Tensor, pictures: Tensor) -> str:
    """How much of the boxed earrings and necklaces the independent parser finds in pictures.

    maps: `b h w`; pictures: `b 3 h w` in [-1, 1].
    """
    parser = load_critics(config).parsers[CRITICS[0]]
    parsed, parts = parser.parse(pictures.to(parser.device)).cpu(), []
    for name, word in RARE:
        wanted = maps == CLASS_ID[name]
        if wanted.any():
            found = 100 * float(((parsed == maps) & wanted).sum() / wanted.sum())
            parts.append(f"{found:.0f} % of the {word}")
    rest = ~torch.isin(maps, torch.tensor(GROUPS["RFA"]))
    kept = 100 * float((parsed == maps)[rest].float().mean())
    said = " and ".join(parts) if parts else "no rare parts were asked for"
    return f"Pixels found by the independent parser: {said}; {kept:.0f} % of everything else."


def about_one_condition(rows: DataFrame) -> str:
    """From `one_condition` and the joint scores under the names `Text, EC2Face`, `OAA, EC2Face`."""
    own = rows[rows["critic"] == CRITICS[0]].set_index("metric")["value"]
    return (
        f"Text score {own['Text, text alone']:.1f} from text alone, {own['Text, EC2Face']:.1f} "
        f"from both; OAA {own['OAA, mask alone']:.1f} from the mask alone, "
        f"{own['OAA, EC2Face']:.1f} from both."
    )
