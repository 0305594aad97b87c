"""Does a gain come from making all faces alike?

A loss that two parsers like can be lowered by painting one skin on every face: both parsers then
agree, and recall, IoU and LPIPS rise. So beside every gain of a consistency loss stand measures
that fall when faces become alike, and `plus_verdict` says from both whether a setting is better.
The rule was written before the sweep that it judges was run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, one_hot

from .pictures import PictureSet, batches
from .scores import BATCH, FACT

if TYPE_CHECKING:
    from pandas import DataFrame

PARTS = ("skin", "hair", "background")

FEWEST_PIXELS = 0.005  # share of a picture; smaller parts say little of their colour

SPREADS = tuple(f"spread of {part}" for part in PARTS)

GOALS = {"mIoU": 1.5, "OAA": 0.95}  # points that a mean over trainings has to gain
ONE_OF = {"Text": 0.93, "Facts": 0.93}  # of these, one has to gain as much
TOLERANCE = 2.0  # percent of the control that a measure of collapse may lose

BETTER = "better"
COLLAPSED = "collapsed"
NO_GAIN = "no gain"


def part_colours(images: Tensor, label_maps: Tensor) -> Tensor:
    """Mean colour of each of `PARTS` where the mask has it, `b 3 3` (part, channel).

    NaN where a part is smaller than `FEWEST_PIXELS`.

    Args:
        images: `b 3 h w` in [-1, 1].
        label_maps: the mask conditions, `b h w`.
    """
    parts = one_hot(label_maps)[:, [CLASS_ID[part] for part in PARTS]].to(images)
    pixels = parts.sum((2, 3))[..., None]
    colours = torch.einsum("bphw,bchw->bpc", parts, images) / pixels
    return colours.masked_fill(pixels < FEWEST_PIXELS * label_maps[0].numel(), torch.nan)


def colour_spread(colours: Tensor) -> Tensor:
    """How much the colour of each part differs from face to face, `(3,)`.

    Root of the variance over faces, summed over the channels. colours: of `part_colours`.
    """
    known = colours.isfinite()
    count = known.sum(0)
    mean = colours.nansum(0) / count
    variance = (colours - mean).square().nansum(0) / (count - 1)
    return variance.sum(-1).sqrt()


def spread_rows(sets: list[PictureSet], table: str, method: str) -> DataFrame:
    """Long rows `spread of skin`, ...: the mean over a method's trainings."""
    import pandas as pd

    first = sets[0]
    colours: list[list[Tensor]] = [[] for _ in sets]
    for names in batches(first.ids, BATCH, f"{method}, colours", show=True):
        masks = torch.stack([first.dataset.label_map(name) for name in names])
        for part, pictures in zip(colours, sets, strict=True):
            part.append(part_colours(pictures.load(names), masks))
    spreads = [colour_spread(torch.cat(part)) for part in colours]
    values = torch.stack(spreads).mean(0).tolist()
    rows = [{"metric": name, "value": v} for name, v in zip(SPREADS, values, strict=True)]
    return pd.DataFrame(rows).assign(
        critic="", n=len(first.ids), source="ours", table=table, method=method
    )


def plus_verdict(
    scores: DataFrame, differences: DataFrame, alone: list[DataFrame], control: DataFrame
) -> tuple[str, list[str]]:
    """Whether a setting is better than its control, by the evaluators, which guided nothing.

    It is, if mIoU and OAA gain what `GOALS` says, and Text or Facts what `ONE_OF` says, with the
    interval over faces above 0 in every training; if HFA's interval is not below 0; and if no
    measure of collapse is worse than the control's by more than `TOLERANCE`: spreads of colour,
    Diversity, Text and every fact's share must not fall, KID must not rise. Where a measure has an
    interval, that has to exclude 0 as well: a fact that few captions mention varies by chance.

    Args:
        scores: long rows of the setting.
        differences: the setting minus the control, over all trainings.
        alone: the same for each training.
        control: long rows of the control.

    Returns:
        BETTER, COLLAPSED or NO_GAIN; and what is against it, in words.
    """
    gains = _values(differences)
    against = []

    def gained(metric: str, least: float) -> bool:
        lows = [_values(rows, "ci_low").get(metric, -1.0) for rows in alone]
        return gains.get(metric, 0.0) >= least and min(lows) > 0

    for metric, least in GOALS.items():
        if not gained(metric, least):
            against.append(f"{metric} {gains.get(metric, 0.0):+.2f}, wanted +{least:g}")
    if not any(gained(metric, least) for metric, least in ONE_OF.items()):
        said = " and ".join(f"{name} {gains.get(name, 0.0):+.2f}" for name in ONE_OF)
        against.append(f"{said}, wanted +{min(ONE_OF.values()):g} of one")
    if _values(differences, "ci_high").get("HFA", 0.0) < 0:
        against.append(f"HFA falls by {-gains['HFA']:.2f}")
    collapsed = _collapsed(scores, differences, control)
    verdict = COLLAPSED if collapsed else NO_GAIN if against else BETTER
    return verdict, [*collapsed, *against]


def _collapsed(scores: DataFrame, differences: DataFrame, control: DataFrame) -> list[str]:
    """The measures of collapse that are worse than the control's, in words."""
    ours = _values(scores)
    theirs = _values(control)
    bounds = {side: _values(differences, side) for side in ("ci_low", "ci_high")}
    facts = [name for name in theirs if name.startswith(FACT)]
    worse = []
    for metric in (*SPREADS, "Diversity", "Text", *facts, "KID"):
        if metric not in ours or metric not in theirs:
            continue
        sign = -1 if metric == "KID" else 1
        change = 100 * sign * (ours[metric] - theirs[metric]) / abs(theirs[metric])
        bound = bounds["ci_low" if metric == "KID" else "ci_high"].get(metric, -sign)
        if change < -TOLERANCE and sign * bound < 0:
            worse.append(f"{metric} is {-change:.1f} % worse")
    return worse


def _values(rows: DataFrame, column: str = "value") -> dict[str, float]:
    """Metric -> a column, by the evaluators."""
    chosen = rows[rows["critic"].isin(["independent", ""]) & rows[column].notna()]
    return dict(zip(chosen["metric"], chosen[column].astype(float), strict=True))
