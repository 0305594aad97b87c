"""Masks unlike the training masks: drawn by hand, contradicting the text, or of rare combinations.

Accuracy is measured against the mask that is the condition. Lengths are in pixels of a 64 px face
and scale with the mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, display_name
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset, open_dataset

from .faces import class_areas, faces
from .pictures import sample_grid
from .scores import evaluated_ids, perception_models
from .tables import PRESENT
from .unimodal import score_pictures

if TYPE_CHECKING:
    from pandas import DataFrame, Series


# class -> words of a caption that ask for it
WORDS = {"eye_g": ("glasses",), "hat": ("hat",), "ear_r": ("earring",)}

LARGE = ("background", "skin")  # classes that fill the gaps


# ----------------------------------------------------------------------------------------- edits


def edited(label_map: Tensor, edit: str) -> Tensor:
    """A label map `h w` after one of `EDITS`, which works at 256 pixels or more."""
    fine = max(1, -(-256 // len(label_map)))
    ids = np.kron(label_map.numpy(), np.ones((fine, fine), np.int64))
    return torch.from_numpy(EDITS[edit](ids)[fine // 2 :: fine, fine // 2 :: fine].copy())


def dilate(ids: np.ndarray, radius: float = 1.0) -> np.ndarray:
    """Every part painted with too thick a brush, small parts on top of large ones."""
    from scipy.ndimage import binary_dilation

    out = ids.copy()
    disk = _disk(radius * len(ids) / 64)
    for c in _by_area(ids):
        if c != CLASS_ID["background"]:
            out[binary_dilation(ids == c, disk)] = c
    return out


def erode(ids: np.ndarray, radius: float = 0.5) -> np.ndarray:
    """Every part but the skin painted too small; its neighbours fill the gap."""
    from scipy.ndimage import binary_erosion

    out = ids.copy()
    disk = _disk(radius * len(ids) / 64)
    for c in _by_area(ids):
        if c not in [CLASS_ID[name] for name in LARGE]:
            rim = (ids == c) & ~binary_erosion(ids == c, disk, border_value=1)
            out[rim] = _fill(ids, ids != c)[rim]
    return out


def jitter(ids: np.ndarray, amplitude: float = 1.5, seed: int = 0) -> np.ndarray:
    """A trembling hand: outlines moved smoothly by up to about `amplitude`."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    size = len(ids)
    scale = size / 64
    noise = np.random.default_rng(seed).standard_normal((2, size, size))
    moves = np.stack([gaussian_filter(part, 3 * scale) for part in noise])
    moves *= amplitude * scale / np.abs(moves).max()
    positions = np.indices(ids.shape) + moves
    return map_coordinates(ids, positions, order=0, mode="nearest")


def polygonise(ids: np.ndarray, tolerance: float = 1.0) -> np.ndarray:
    """Every outline replaced by straight strokes that stay within `tolerance` of it."""
    from skimage.draw import polygon2mask
    from skimage.measure import approximate_polygon, find_contours

    out = ids.copy()
    filled = np.zeros(ids.shape, bool)
    for c in _by_area(ids):
        inside = np.zeros(ids.shape, bool)
        for outline in find_contours(np.pad(ids == c, 1).astype(float), 0.5):
            strokes = approximate_polygon(outline - 1, tolerance * len(ids) / 64)
            inside ^= polygon2mask(ids.shape, strokes)  # an outline within an outline is a hole
        out[inside] = c
        filled |= inside
    return _fill(out, filled)


EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as parsed": np.copy,
    "dilated": dilate,
    "eroded": erode,
    "jittered": jitter,
    "polygons": polygonise,
}


def _by_area(ids: np.ndarray) -> list[int]:
    """The classes of a mask, the largest first."""
    classes, areas = np.unique(ids, return_counts=True)
    return classes[np.argsort(-areas, kind="stable")].tolist()


def _disk(radius: float) -> np.ndarray:
    r = int(np.ceil(radius))
    y, x = np.mgrid[-r : r + 1, -r : r + 1]
    return x**2 + y**2 <= radius**2


def _fill(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The class of the nearest known pixel."""
    from scipy.ndimage import distance_transform_edt

    _, nearest = distance_transform_edt(~known, return_indices=True)
    return ids[tuple(nearest)]


# ----------------------------------------------------------------------------------- experiments


def hand_drawn(
    config: Config, method: str, count: int = 48
) -> tuple[DataFrame, dict[str, tuple[Tensor, Tensor]]]:
    """The first test faces with edited masks; captions and noise are the same.

    Args:
        config: weights and sampling.
        method: one of `VARIANTS`.
        count: how many faces.

    Returns:
        Long rows by role, method = edit, of the scores against the edited mask; and
        edit -> (label maps `b h w`, images `b 3 h w` in [-1, 1]).
    """
    import pandas as pd

    dataset = open_dataset(config, "test")
    texts, maps, _ = faces(dataset, evaluated_ids(config, dataset, count)[:count])
    shown = {}
    parts = []
    for name in EDITS:
        given = torch.stack([edited(label_map, name) for label_map in maps])
        images = sample_grid(config, method, "hand_drawn", texts, given, seeds=1)[:, 0]
        shown[name] = (given, images)
        parts.append(score_pictures(config, images, texts, given).assign(method=name))
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(table="hand_drawn", dataset=dataset.root.name), shown


def conflicts(
    config: Config, method: str, count: int = 16
) -> tuple[DataFrame, dict[tuple[str, bool, bool], tuple[str, Tensor, Tensor]]]:
    """Which condition decides where text and mask contradict each other.

    Masks with and without a class are combined with captions with and without it. A picture *shows*
    a class if the independent parser finds half of the median area that the class has in masks.

    Args:
        config: weights and sampling.
        method: one of `VARIANTS`.
        count: pictures of each cell.

    Returns:
        Rows class, mask, text (whether they have it), and `share` of the pictures that show it; and
        for each cell its first (caption, label map, image).
    """
    import pandas as pd

    dataset = open_dataset(config, "test")
    ids = evaluated_ids(config, dataset)
    texts = [dataset.manifest_caption(name) for name in ids]
    areas = class_areas(dataset, ids)
    parser = perception_models(config).parsers["independent"]
    rows = []
    shown = {}
    for name, words in WORDS.items():
        area = areas[:, CLASS_ID[name]]
        if not (area > 0).any():
            continue
        enough = float(area[area > 0].float().median()) / 2
        asked = torch.tensor([any(word in text.lower() for word in words) for text in texts])
        for has, says in itertools.product((True, False), repeat=2):
            masks = torch.nonzero((area >= enough) if has else (area == 0)).flatten()[:count]
            sentences = torch.nonzero(asked if says else ~asked & (area == 0)).flatten()[:count]
            if not len(masks) or not len(sentences):
                continue
            n = min(count, max(len(masks), len(sentences)))
            chosen = masks[torch.arange(n) % len(masks)].tolist()
            given = torch.stack([dataset.label_map(ids[i]) for i in chosen])
            prompts = [texts[sentences[i % len(sentences)]] for i in range(n)]
            images = sample_grid(config, method, f"conflict_{name}", prompts, given, seeds=1)[:, 0]
            parsed = parser.parse(images.to(parser.device)).cpu()
            visible = (parsed == CLASS_ID[name]).flatten(1).sum(1) >= enough
            cell = {"class": name, "mask": has, "text": says}
            rows.append(cell | share(int(visible.sum()), n))
            shown[name, has, says] = (prompts[0], given[0], images[0])
    return pd.DataFrame(rows), shown


def share(hits: int, n: int) -> dict[str, float]:
    """A share of n pictures in percent: value, ci_low, ci_high (95 %, Wilson) and n."""
    from scipy.stats import binomtest

    bounds = binomtest(hits, n).proportion_ci(method="wilson")
    low, high = 100 * float(bounds.low), 100 * float(bounds.high)
    return {"value": 100 * hits / n, "ci_low": low, "ci_high": high, "n": n}


def named_accessories(config: Config, texts: Sequence[str], images: Tensor) -> DataFrame:
    """Whether pictures show the accessories that their captions name.

    Args:
        config: names the independent parser.
        texts: one caption for each row.
        images: `rows seeds 3 h w` in [-1, 1].

    Returns:
        Rows class, and `share` of the pictures of captions that name it in which the parser finds
        it; a class that no caption names has no row.
    """
    import pandas as pd

    parser = perception_models(config).parsers["independent"]
    minimum = max(1, round(PRESENT * images.shape[-1] ** 2))
    rows = []
    for name, words in WORDS.items():
        asked = [i for i, text in enumerate(texts) if any(word in text.lower() for word in words)]
        if asked:
            shown = images[asked].flatten(0, 1)
            parsed = parser.parse(shown.to(parser.device)).cpu()
            found = (parsed == CLASS_ID[name]).flatten(1).sum(1) >= minimum
            rows.append({"class": name, **share(int(found.sum()), len(found))})
    return pd.DataFrame(rows, columns=["class", "value", "ci_low", "ci_high", "n"])


def conflict_rows(rows: DataFrame) -> DataFrame:
    """The rows of `conflicts` in the long form: metric `shown`, one method for each cell."""
    yes = {True: "yes", False: "no"}
    cells = [
        f"{display_name(CLASS_ID[row['class']])}: mask {yes[row['mask']]}, text {yes[row['text']]}"
        for _, row in rows.iterrows()
    ]
    long = rows[["value", "ci_low", "ci_high", "n"]]
    return long.assign(table="conflicts", method=cells, metric="shown", critic="independent")


def rarest_pairs(dataset: FaceDataset, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """Pairs of classes with the number of faces that have both, rarest pair first."""
    areas = class_areas(dataset, dataset.ids)
    has = {name: areas[:, CLASS_ID[name]] > 0 for name in classes}
    pairs = [(a, b, int((has[a] & has[b]).sum())) for a, b in itertools.combinations(classes, 2)]
    return sorted(pairs, key=lambda pair: pair[2])


def rare_pairs(
    config: Config, method: str, count: int = 16, pairs: int = 3
) -> tuple[DataFrame, dict[tuple[str, str], tuple[Tensor, Tensor]]]:
    """Classes that training faces rarely have together: one face's part in another face's mask.

    Args:
        config: weights and sampling.
        method: one of `VARIANTS`.
        count: pictures of each pair.
        pairs: how many pairs, the rarest first.

    Returns:
        Rows class, beside (the other class), together (training faces that have both), alone and
        value (accuracy of the class in its own faces' masks and in the composed ones, percent),
        gain, ci_low, ci_high (value minus alone, 95 % interval over both sets of faces), n; and
        pair -> (label maps, images) of the composed masks.
    """
    import pandas as pd

    dataset = open_dataset(config, "test")
    ids = evaluated_ids(config, dataset)
    texts = [dataset.manifest_caption(name) for name in ids]
    areas = class_areas(dataset, ids)
    parser = perception_models(config).parsers["independent"]
    rows = []
    shown = {}

    def accuracy(images: Tensor, given: Tensor, name: str) -> np.ndarray:
        """Recall of a class in percent: over all pictures, then over resamples of them."""
        wanted = given == CLASS_ID[name]
        correct = (parser.parse(images.to(parser.device)).cpu() == given) & wanted
        pixels = torch.stack([correct.flatten(1).sum(1), wanted.flatten(1).sum(1)]).double().numpy()
        resamples = np.random.default_rng(0).integers(
            pixels.shape[1], size=(config.evaluation.bootstrap, pixels.shape[1])
        )
        hits, all_pixels = np.concatenate(
            [pixels.sum(1)[:, None], pixels[:, resamples].sum(2)], axis=1
        )
        return 100 * hits / np.maximum(all_pixels, 1)

    known = rarest_pairs(open_dataset(config, "train"), ("eye_g", "hat", "ear_r", "neck_l"))
    for first, second, together in known:
        hosts = torch.nonzero(areas[:, CLASS_ID[first]] > 0).flatten()
        donors = torch.nonzero(areas[:, CLASS_ID[second]] > 0).flatten()
        if not len(hosts) or not len(donors) or len(shown) == pairs:
            continue
        numbers = torch.arange(count)
        hosts = hosts[numbers % len(hosts)]
        donors = donors[numbers % len(donors)]
        host_maps, donor_maps = (
            torch.stack([dataset.label_map(ids[i]) for i in rows.tolist()])
            for rows in (hosts, donors)
        )
        composed = torch.where(donor_maps == CLASS_ID[second], donor_maps, host_maps)
        prompts = [texts[i] for i in hosts]
        in_host, in_donor, in_both = (
            sample_grid(config, method, f"pair_{first}_{second}", prompts, given, seeds=1)[:, 0]
            for given in (host_maps, donor_maps, composed)
        )
        cells = ((first, second, in_host, host_maps), (second, first, in_donor, donor_maps))
        for name, beside, alone, given in cells:
            before = accuracy(alone, given, name)
            after = accuracy(in_both, composed, name)
            low, high = np.percentile((after - before)[1:], [2.5, 97.5])
            rows.append({
                "class": name, "beside": beside, "together": together, "alone": before[0],
                "value": after[0], "gain": after[0] - before[0], "ci_low": low, "ci_high": high,
                "n": count,
            })  # fmt: skip
        shown[first, second] = (composed, in_both)
    columns = ["class", "beside", "together", "alone", "value", "gain", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=columns), shown


# -------------------------------------------------------------------------------------- sentences


def common_accuracy(rows: DataFrame, role: str = "independent") -> Series:
    """Accuracy by edit: the mean over the classes that every edit leaves in the masks (percent).

    A class that one edit removes (a necklace of one pixel's width) thus counts for no edit.
    """
    scores = rows[(rows["critic"] == role) & rows["metric"].isin(CLASS_ID)]
    classes = scores.pivot(index="metric", columns="method", values="value").dropna()
    return classes.mean()


def describe_hand_drawn(rows: DataFrame) -> str:
    """The accuracy that each edit costs, from the rows of `hand_drawn`."""
    accuracy = common_accuracy(rows)
    first = next(iter(EDITS))
    parts = [f"{edit} {accuracy[edit] - accuracy[first]:+.1f}" for edit in EDITS if edit != first]
    return (
        f"Accuracy over the classes that every edit keeps, against {accuracy[first]:.1f} with "
        f"masks as parsed: {', '.join(parts)}."
    )


def describe_conflicts(rows: DataFrame) -> str:
    """Which condition decides, for each class, from the rows of `conflicts`."""
    shown = rows.set_index(["class", "mask", "text"])["value"]
    lines = []
    for name in dict.fromkeys(rows["class"]):
        mask = shown.get((name, True, False))
        text = shown.get((name, False, True))
        if mask is not None and text is not None:
            lines.append(
                f"{display_name(CLASS_ID[name])}: {mask:.0f} % of the pictures show it if only the "
                f"mask has it, {text:.0f} % if only the text has it"
            )
    return "; ".join(lines) + "."


def describe_pairs(rows: DataFrame) -> str:
    """How much accuracy the composition costs, from the rows of `rare_pairs`."""
    parts = [
        f"{display_name(CLASS_ID[row['class']])} beside {display_name(CLASS_ID[row['beside']])} "
        f"{row['gain']:+.0f} [{row['ci_low']:+.0f}, {row['ci_high']:+.0f}]"
        for _, row in rows.iterrows()
    ]
    changes = ", ".join(parts) or "no pair among these faces"
    return f"Accuracy in composed masks minus accuracy in a face's own mask (points): {changes}."
