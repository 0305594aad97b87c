"""What the notebooks of the tables and picture grids call: one function an experiment.

Everything is kept (`generate.py`, `scoring.py`): an experiment whose pictures and scores are there
is read, not repeated. Sentences about results are made from the numbers, so they stay true
whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, GROUPS, pixel_counts
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset

from .scores import CRITICS, load_critics

# ---------------------------------------------------------------------------------------- grids


def pick_faces(
    dataset: FaceDataset, classes: Sequence[str], skip: Sequence[str] = (), limit: int = 0
) -> list[str]:
    """One face for each class named, chosen by the masks alone, before any picture is drawn.

    The first in manifest order that is not taken yet and shows at least the class's median area;
    any face where no face has the class.
    """
    ids = dataset.ids[: limit or None]
    areas = torch.stack([pixel_counts(dataset.label_map(name)[None])[0] for name in ids])
    chosen: list[str] = []
    for wanted in classes:
        area = areas[:, CLASS_ID[wanted]]
        enough = area[area > 0].median() if (area > 0).any() else 0
        fitting = [n for n, a in zip(ids, area, strict=True) if a >= enough]
        free = [n for n in [*fitting, *ids] if n not in chosen and n not in skip]
        chosen.append(free[0] if free else ids[len(chosen) % len(ids)])
    return chosen


def faces(dataset: FaceDataset, ids: Sequence[str]) -> tuple[list[str], Tensor, Tensor]:
    """(manifest captions, label maps `b h w`, real images `b 3 h w`) of some faces."""
    maps = torch.stack([dataset.label_map(name) for name in ids])
    images = torch.stack([dataset.image(name) for name in ids])
    return [dataset.manifest_caption(name) for name in ids], maps, images


RARE = [("ear_r", "earrings"), ("neck_l", "necklaces")]


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
