"""Mask accuracy against plain loops and scikit-learn, and PSNR."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import accuracy_row
from sklearn.metrics import jaccard_score, precision_recall_fscore_support

from ec2face_core.attributes import CLASS_ID, GROUPS, pixel_counts
from ec2face_core.metrics import (
    OVERLAP,
    accuracy_from_counts,
    mask_accuracy,
    mask_counts,
    overlap_from_counts,
    overlap_means,
    psnr,
)


@pytest.fixture
def label_maps():
    """Four pairs in which every class occurs and about 70 % of the pixels agree."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 19, (4, 24, 20), generator=generator)
    noise = torch.randint(0, 19, target.shape, generator=generator)
    agree = torch.rand(target.shape, generator=generator) < 0.7
    return torch.where(agree, target, noise), target


def test_per_class_accuracy_against_loops(label_maps):
    predicted, target = label_maps
    accuracy = mask_accuracy(predicted, target)
    for c in range(19):
        of_class = [p for p, m in zip(predicted.flatten(), target.flatten(), strict=True) if m == c]
        correct = sum(int(p) == c for p in of_class)
        assert accuracy.support[c] == len(of_class)
        assert accuracy.per_class[c].item() == pytest.approx(100 * correct / len(of_class))


def test_oaa_is_the_weighted_sum_that_pins_the_paper_metric(label_maps):
    a = mask_accuracy(*label_maps)
    assert pytest.approx((4 * a.HFA + 13 * a.NFA + 2 * a.RFA) / 19) == a.OAA
    assert pytest.approx(a.per_class.mean().item()) == a.OAA
    for name, ids in GROUPS.items():
        assert getattr(a, name) == pytest.approx(a.per_class[list(ids)].mean().item())


def test_absent_classes_are_nan_and_do_not_count():
    target = torch.tensor([[[0, 0, 1, 13]]])
    a = mask_accuracy(torch.tensor([[[0, 1, 1, 15]]]), target)
    assert a.per_class[[0, 1, 13]].tolist() == [50, 100, 0]
    assert a.per_class.isnan().sum() == 16
    assert pytest.approx(50) == a.OAA and pytest.approx(50) == a.HFA
    assert math.isnan(a.NFA) and math.isnan(a.RFA)


def test_accuracy_is_pooled_over_images_and_not_averaged():
    """1 of 1 earring pixels in one image, 0 of 9 in another: 10 %, not 50 %."""
    ring = CLASS_ID["ear_r"]
    target = torch.zeros(2, 1, 10, dtype=torch.int64)
    target[0, 0, 0] = ring
    target[1, 0, :9] = ring
    predicted = torch.zeros_like(target)
    predicted[0, 0, 0] = ring
    assert mask_accuracy(predicted, target).per_class[ring] == 10


def test_counts_of_images_pool_to_the_accuracy(label_maps):
    correct, support = mask_counts(*label_maps)
    assert correct.shape == support.shape == (4, 19)
    assert (support.sum(1) == 24 * 20).all() and (correct <= support).all()
    parts = [mask_counts(p[None], m[None]) for p, m in zip(*label_maps, strict=True)]
    assert torch.equal(correct, torch.cat([c for c, _ in parts]))
    pooled, whole = accuracy_from_counts(correct, support), mask_accuracy(*label_maps)
    assert torch.equal(pooled.per_class, whole.per_class) and pooled.OAA == whole.OAA


def test_wrong_label_maps_are_refused(label_maps):
    predicted, target = label_maps
    with pytest.raises(ValueError, match="differ"):
        mask_counts(predicted[:, :-1], target)
    with pytest.raises(ValueError, match="differ"):
        mask_accuracy(predicted, target.mT)  # as many pixels
    with pytest.raises(TypeError, match=r"predicted label map is torch\.float32"):
        mask_counts(predicted.float(), target)
    with pytest.raises(ValueError, match="ids must be 0-18, found 1-19"):
        mask_counts(predicted, target + 1)
    ones = torch.ones(2, 19).long()
    with pytest.raises(ValueError, match="19 classes"):
        accuracy_from_counts(ones[:, 1:], ones[:, 1:])
    with pytest.raises(ValueError, match="equal"):
        accuracy_from_counts(ones, ones, ones[:1])
    with pytest.raises(ValueError, match="correct not above support"):
        accuracy_from_counts(3 * ones, ones)  # 300 %


@pytest.mark.parametrize("missing", [(), (0, 3, 7, 16)])
def test_all_metrics_equal_those_of_scikit_learn(label_maps, missing):
    """Some classes missing in the masks, of which some are predicted nevertheless; one unseen."""
    predicted, target = (x.clone() for x in label_maps)
    for c in missing:
        target[target == c] = 1
    predicted[predicted == 9] = 2
    accuracy = mask_accuracy(predicted, target)
    options = {"labels": list(range(19)), "average": None, "zero_division": 0}
    flat = (target.flatten().numpy(), predicted.flatten().numpy())
    precision, recall, f1, support = precision_recall_fscore_support(*flat, **options)
    iou = jaccard_score(*flat, **options)
    absent = support == 0
    assert absent.sum() == len(missing) and precision[9] == 0
    assert accuracy.support.tolist() == support.tolist()
    pairs = {"per_class": recall, "precision": precision, "f1": f1, "iou": iou}
    for name, expected in pairs.items():
        ours = getattr(accuracy, name).numpy()
        np.testing.assert_allclose(ours, np.where(absent, np.nan, 100 * expected), rtol=1e-13)
    present = ~absent
    assert pytest.approx(100 * f1[present].mean()) == accuracy.F1
    assert pytest.approx(100 * iou[present].mean()) == accuracy.mIoU
    for group, ids in GROUPS.items():
        mean = np.mean([f1[c] for c in ids if present[c]])
        assert getattr(accuracy, f"F1_{group}") == pytest.approx(100 * mean)


def test_painting_more_raises_recall_and_lowers_precision():
    ring = CLASS_ID["ear_r"]
    target = torch.zeros(1, 10, 10, dtype=torch.int64)
    target[0, 0, :4] = ring
    narrow = torch.zeros_like(target)
    narrow[0, 0, :2] = ring
    wide = torch.zeros_like(target)
    wide[0, :2, :8] = ring
    a, b = mask_accuracy(narrow, target), mask_accuracy(wide, target)
    assert a.per_class[ring] == 50 and a.precision[ring] == 100
    assert a.f1[ring].item() == pytest.approx(200 / 3) and a.iou[ring] == 50
    assert b.per_class[ring] == 100 and b.precision[ring] == 25
    assert b.f1[ring] == 40 and b.iou[ring] == 25
    assert b.RFA > a.RFA and b.F1_RFA < a.F1_RFA


def test_overlap_pools_counts_and_is_nan_without_predicted_pixels(label_maps):
    predicted, target = label_maps
    counts = (*mask_counts(predicted, target), pixel_counts(predicted))
    whole = mask_accuracy(predicted, target)
    assert accuracy_row(accuracy_from_counts(*counts)) == accuracy_row(whole)
    two = accuracy_from_counts(*counts[:2])
    assert two.OAA == whole.OAA and torch.equal(two.per_class, whole.per_class)
    assert all(math.isnan(getattr(two, name)) for name in OVERLAP)
    assert all(values.isnan().all() for values in (two.precision, two.f1, two.iou))

    rows = overlap_from_counts(*(x.numpy() for x in counts))  # image by image
    means = overlap_means(rows["f1"], rows["iou"])
    for i in range(len(target)):
        one = mask_accuracy(predicted[i], target[i])
        np.testing.assert_array_equal(rows["precision"][i], one.precision.numpy())
        for name in OVERLAP:
            assert means[name][i] == pytest.approx(getattr(one, name), rel=1e-13)


def test_psnr_of_a_known_error():
    image = torch.zeros(2, 3, 8, 8)
    other = image + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(psnr(image, other), torch.tensor([20.0, 40.0]))  # range 2: 10x, 100x
    assert psnr(image, image).isfinite().all()
