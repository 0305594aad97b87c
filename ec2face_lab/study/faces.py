"""Which faces are shown, and how well pictures show their rare parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, GROUPS, pixel_counts
from ec2face_core.data import FaceDataset
from ec2face_core.runs import parallel

if TYPE_CHECKING:
    from pandas import DataFrame

    from ec2face_core.perception import FaceParser

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

    def count(name: str) -> list[int]:
        return pixel_counts(dataset.label_map(name)[None])[0].tolist()

    return torch.tensor(list(parallel(count, ids)))


def faces(dataset: FaceDataset, ids: Sequence[str]) -> tuple[list[str], Tensor, Tensor]:
    """(manifest captions, label maps `b h w`, real images `b 3 h w`) of some faces."""
    maps = torch.stack([dataset.label_map(name) for name in ids])
    images = torch.stack([dataset.image(name) for name in ids])
    return [dataset.manifest_caption(name) for name in ids], maps, images


def rare_parts_found(
    parser: FaceParser, maps: Tensor, systems: Mapping[str, Tensor | None]
) -> DataFrame:
    """How many pixels of the masks' earrings and necklaces, and of all else, a parser finds.

    Args:
        parser: reads the pictures.
        maps: the mask conditions, `b h w`.
        systems: name -> pictures of the same faces, `b 3 h w` in [-1, 1]; those without are left
            out.

    Returns:
        One row for each system, in percent, best first in all else.
    """
    import pandas as pd

    parts = {word: maps == CLASS_ID[name] for name, word in RARE}
    parts["all else"] = ~torch.isin(maps, torch.tensor(GROUPS["RFA"]))
    rows = {}
    for system, pictures in systems.items():
        if pictures is not None:
            hits = parser.parse(pictures.to(parser.device)).cpu() == maps
            rows[system] = {
                word: 100 * float(hits[part].double().mean())
                for word, part in parts.items()
                if part.any()
            }
    return pd.DataFrame(rows).T.sort_values("all else", ascending=False)
