"""Names, groups, palette, flips, Eq. 10 by hand, and the orders of other systems."""

from __future__ import annotations

import pytest
import torch

from ec2face_core.attributes import (
    CLASS_ID,
    CLASSES,
    FACER_TO_CELEBAMASK,
    FLIP_PAIRS,
    GROUPS,
    PALETTE,
    display_name,
    flip_labels,
    one_hot,
    palette_image,
    palette_tensor,
    pixel_counts,
)
from ec2face_core.losses import class_weights, long_tail_weights


def test_groups_are_a_partition_with_the_members_of_appendix_a():
    assert sorted(i for ids in GROUPS.values() for i in ids) == list(range(19))
    names = {group: {display_name(i) for i in ids} for group, ids in GROUPS.items()}
    assert names["HFA"] == {"background", "hair", "skin", "neck"}
    assert names["RFA"] == {"earring", "necklace"}
    assert names["NFA"] == {
        "cloth", "nose", "l_lip", "u_lip", "l_ear", "r_ear", "l_brow", "r_brow", "mouth", "l_eye",
        "r_eye", "hat", "glasses",
    }  # fmt: skip


def test_palette_tells_all_classes_apart_and_maps_back():
    assert len(set(PALETTE)) == len(PALETTE) == len(CLASSES) == 19
    label_map = torch.randint(0, 19, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    image = palette_image(label_map)
    assert image.shape == (2, 3, 5, 7) and image.min() >= -1 and image.max() <= 1
    colours = palette_tensor()[:, :, None, None]
    distance = (image[:, None] - colours).abs().sum(2)
    assert torch.equal(distance.argmin(1), label_map)
    hair = ((palette_image(torch.tensor([[[CLASS_ID["hair"]]]])) + 1) * 127.5).round()
    assert hair.flatten().tolist() == [0, 0, 204]


def test_flip_exchanges_left_and_right_parts():
    left = [CLASSES[a] for a, _ in FLIP_PAIRS]
    assert left == ["l_eye", "l_brow", "l_ear"]
    assert all(CLASSES[b] == "r_" + CLASSES[a][2:] for a, b in FLIP_PAIRS)
    # a face looking at us: the subject's left eye is on the image's right
    row = [CLASS_ID[name] for name in ("r_ear", "r_eye", "nose", "l_eye", "hair")]
    flipped = flip_labels(torch.tensor([row]))[0]
    assert [CLASSES[i] for i in flipped] == ["hair", "r_eye", "nose", "l_eye", "l_ear"]
    label_map = torch.randint(0, 19, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(flip_labels(flip_labels(label_map)), label_map)


def test_counts_and_one_hot_agree():
    label_map = torch.randint(0, 19, (3, 9, 8), generator=torch.Generator().manual_seed(0))
    counts = pixel_counts(label_map)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, one_hot(label_map).sum((2, 3)).long())
    where = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = (one_hot(label_map) * where[:, None]).sum((2, 3)).long()
    assert torch.equal(pixel_counts(label_map, where), expected)
    with pytest.raises(ValueError):
        pixel_counts(label_map + 1)


def test_eq_10_by_hand():
    """Two classes share 1000 pixels; n is 19 also where most classes are empty."""
    counts = torch.zeros(19, dtype=torch.int64)
    counts[CLASS_ID["skin"]], counts[CLASS_ID["ear_r"]] = 990, 10
    weights = class_weights(counts)
    assert weights.shape == (19,)
    assert weights[CLASS_ID["skin"]].item() == pytest.approx(1000 / (19 * 990 + 1))
    assert weights[CLASS_ID["ear_r"]].item() == pytest.approx(1000 / (19 * 10 + 1))
    assert weights[CLASS_ID["hat"]].item() == pytest.approx(1000)  # no pixel uses it

    label_map = torch.tensor([[[1, 15], [1, 1]], [[15, 15], [1, 15]]])
    w = long_tail_weights(label_map, counts)
    assert w.shape == (2, 2, 2) and w.dtype == torch.float32
    skin, ring = 1000 / 18811, 1000 / 191
    expected = torch.tensor([[[skin, ring], [skin, skin]], [[ring, ring], [skin, ring]]])
    torch.testing.assert_close(w, expected)


def test_eq_10_balances_the_classes():
    """Weighted pixel mass is nearly the same for every class: that is what Eq. 10 is for."""
    counts = torch.tensor([10 ** (2 + i % 5) for i in range(19)])
    mass = class_weights(counts) * counts
    torch.testing.assert_close(mass, mass.max().expand(19), rtol=1e-3, atol=0)


def test_facer_order_is_mapped_by_meaning():
    """facer names the sides as seen in the image; CelebAMask-HQ as the subject's own."""
    facer = (
        "background neck face cloth rr lr rb lb re le nose imouth llip ulip hair eyeg hat earr "
        "neck_l"
    )
    ours = {
        "face": "skin", "rr": "l_ear", "lr": "r_ear", "rb": "l_brow", "lb": "r_brow", "re": "l_eye",
        "le": "r_eye", "imouth": "mouth", "llip": "l_lip", "ulip": "u_lip", "eyeg": "eye_g",
        "earr": "ear_r",
    }  # fmt: skip
    expected = tuple(CLASS_ID[ours.get(name, name)] for name in facer.split())
    assert expected == FACER_TO_CELEBAMASK
    # the inverse is the permutation that brings facer's 19 channels into our order
    permutation = [0, 2, 10, 15, 8, 9, 6, 7, 4, 5, 11, 13, 12, 14, 16, 17, 18, 1, 3]
    assert [FACER_TO_CELEBAMASK[i] for i in permutation] == list(range(19))
