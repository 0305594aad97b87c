"""Mask accuracy against plain loops; LPIPS and NIQE through their packages."""

from __future__ import annotations

import math
import socket

import pytest
import torch

from ec2face_core.attributes import CLASS_ID, CLASSES, GROUPS
from ec2face_core.config import ConfigError, load_profile
from ec2face_core.metrics import accuracy_from_counts, mask_accuracy, mask_counts, psnr
from ec2face_lab.study.scores import Lpips, Niqe


@pytest.fixture
def label_maps():
    """Four pairs in which every class occurs and about 70 % of the pixels agree."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 19, (4, 24, 20), generator=generator)
    noise = torch.randint(0, 19, target.shape, generator=generator)
    agree = torch.rand(target.shape, generator=generator) < 0.7
    return torch.where(agree, target, noise), target


@pytest.fixture(scope="module")
def mini():
    return load_profile("mini")


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
    target[0, 0, 0], target[1, 0, :9] = ring, ring
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


def test_random_trunk_lpips_is_a_fixed_distance(mini):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    noise = torch.randn(2, 3, 64, 64, generator=generator)
    before = torch.get_rng_state()
    distance, again = Lpips(mini), Lpips(mini)
    assert torch.equal(before, torch.get_rng_state())
    near = distance(images, (images + 0.1 * noise).clamp(-1, 1))
    far = distance(images, (images + 0.5 * noise).clamp(-1, 1))
    assert near.shape == (2,) and (near > 0).all() and (near < far).all()
    assert distance(images, images).eq(0).all()
    assert torch.equal(far, again(images, (images + 0.5 * noise).clamp(-1, 1)))


def test_missing_lpips_weights_name_the_remedy(mini, monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(RuntimeError, match="alex-random"):
        Lpips(mini.replace(evaluation={"lpips": "alex"}))
    with pytest.raises(ConfigError, match="vgg"):
        Lpips(mini.replace(evaluation={"lpips": "vgg"}))


def textures(n: int, seed: int) -> torch.Tensor:
    """Smooth images with fine grain: structure at both of NIQE's scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, 3, 64, 64)
    for size, strength in ((4, 0.4), (16, 0.25), (32, 0.12), (64, 0.05)):
        grid = torch.randn(n, 3, size, size, generator=generator)
        x += strength * torch.nn.functional.interpolate(grid, size=64, mode="bicubic")
    return x.clamp(-1, 1)


@pytest.mark.slow
def test_niqe_is_low_for_pristine_and_high_for_damaged_images(mini):
    niqe = Niqe(mini, pristine=textures(100, seed=0))
    images = textures(6, seed=1)
    noisy = images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    blurred = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
    clean = niqe(images)
    assert clean.shape == (6,)
    assert clean.mean() < 0.5 * niqe(noisy).mean() and clean.mean() < 0.5 * niqe(blurred).mean()

    from pyiqa.archs.niqe_arch import niqe as published
    from pyiqa.utils.color_util import to_y_channel

    y = to_y_channel((images + 1) / 2, 255, "yiq").round().double()
    model = niqe.mean.repeat(6, 1), niqe.covariance.repeat(6, 1, 1)
    torch.testing.assert_close(clean, published(y, *model, block_size_h=32, block_size_w=32))

    with_a_flat_one = torch.cat([images[:1], torch.zeros(1, 3, 64, 64)])
    scores = niqe(with_a_flat_one)
    assert scores[0] == pytest.approx(clean[0].item()) and scores[1].isnan()


def test_niqe_names_what_is_missing(mini):
    with pytest.raises(RuntimeError, match="fit"):
        Niqe(mini).score(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConfigError, match="niqe_refit"):
        Niqe(mini.replace(evaluation={"niqe_refit": False}))


@pytest.mark.slow
def test_niqe_refuses_images_and_sets_that_are_too_small(mini):
    with pytest.raises(ConfigError, match="niqe_block"):
        Niqe(mini.replace(evaluation={"niqe_block": 96}), pristine=torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="more images"):
        Niqe(mini, pristine=textures(2, seed=0))
