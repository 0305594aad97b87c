"""Which faces are shown, and how well pictures show their rare parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, GROUPS, pixel_counts
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset
from ec2face_core.runs import parallel

from .scores import perception_models

RARE = [("ear_r", "earrings"), ("neck_l", "necklaces")]


def pick_faces(
    dataset: FaceDataset, classes: Sequence[str], skip: Sequence[str] = (), limit: int = 0
) -> list[str]:
    """One face for each named class, chosen by the masks alone, so before any picture exists.

    It is the first in manifest order that is not chosen yet and shows at least the class's median
    area, or any face if none has the class.

    Args:
        dataset: the faces.
        classes: names of classes, possibly repeated.
        skip: ids that are not to be chosen.
        limit: choose among the first faces only; 0: among all.
    """
    ids = dataset.ids[: limit or None]
    areas = class_areas(dataset, ids)
    chosen: list[str] = []
    for wanted in classes:
        area = areas[:, CLASS_ID[wanted]]
        enough = area[area > 0].median() if (area > 0).any() else 0
        fitting = [n for n, a in zip(ids, area, strict=True) if a >= enough]
        free = [n for n in [*fitting, *ids] if n not in chosen and n not in skip]
        chosen.append(free[0] if free else ids[len(chosen) % len(ids)])
    return chosen


def class_areas(dataset: FaceDataset, ids: Sequence[str]) -> Tensor:
    """Pixels of each class in the masks of some faces, `(n, 19)` int64; no mask is kept."""

    def count(name: str) -> Tensor:
        return pixel_counts(dataset.label_map(name)[None])[0]

    return torch.stack(list(parallel(count, ids)))


def faces(dataset: FaceDataset, ids: Sequence[str]) -> tuple[list[str], Tensor, Tensor]:
    """(manifest captions, label maps `b h w`, real images `b 3 h w`) of some faces."""
    maps = torch.stack([dataset.label_map(name) for name in ids])
    images = torch.stack([dataset.image(name) for name in ids])
    return [dataset.manifest_caption(name) for name in ids], maps, images


def describe_rare_parts(config: Config, maps: Tensor, pictures: Tensor) -> str:
    """How many pixels of the earrings and necklaces the independent parser finds in pictures.

    Args:
        config: names the parser.
        maps: the mask conditions, `b h w`.
        pictures: `b 3 h w` in [-1, 1].
    """
    parser = perception_models(config).parsers["independent"]
    correct = parser.parse(pictures.to(parser.device)).cpu() == maps
    parts = []
    for name, word in RARE:
        wanted = maps == CLASS_ID[name]
        if wanted.any():
            share = 100 * float((correct & wanted).sum() / wanted.sum())
            parts.append(f"{share:.0f} % of the {word}")
    others = ~torch.isin(maps, torch.tensor(GROUPS["RFA"]))
    rest = 100 * float(correct[others].float().mean())
    rare = " and ".join(parts) if parts else "no rare parts in these masks"
    return f"Pixels found by the independent parser: {rare}; {rest:.0f} % of everything else."
