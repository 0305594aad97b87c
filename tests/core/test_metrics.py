"""Mask accuracy against plain loops, and PSNR."""

from __future__ import annotations

import math

import pytest
import torch

from ec2face_core.attributes import CLASS_ID, CLASSES, GROUPS
from ec2face_core.metrics import accuracy_from_counts, mask_accuracy, mask_counts, psnr


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
    assert list(a.as_dict()) == ["OAA", "HFA", "NFA", "RFA", *CLASSES]


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
    with pytest.raises((RuntimeError, IndexError)):
        mask_counts(predicted, target + 1)  # a label 19


def test_psnr_of_a_known_error():
    image = torch.zeros(2, 3, 8, 8)
    other = image + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(psnr(image, other), torch.tensor([20.0, 40.0]))  # range 2: 10x, 100x
    assert psnr(image, image).isfinite().all()
