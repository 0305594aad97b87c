"""LPIPS and NIQE through their packages."""

from __future__ import annotations

import socket

import pytest
import torch

from ec2face_core.config import ConfigError, load_profile
from ec2face_lab.study import scores as scoring
from ec2face_lab.study.quality import Lpips, Niqe


@pytest.fixture(scope="module")
def mini():
    return load_profile("mini")


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


@pytest.mark.slow
def test_niqe_refuses_images_and_sets_that_are_too_small(mini):
    with pytest.raises(ConfigError, match="niqe_block"):
        Niqe(mini.replace(evaluation={"niqe_block": 96}), pristine=torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="more images"):
        Niqe(mini, pristine=textures(2, seed=0))


def test_ids_of_kept_scores_are_text(mini, tmp_path, monkeypatch):
    """A face called 0012, 1e5 or NA keeps its name; an empty score stays an empty score."""
    names = ["0012", "1e5", "NA", "nan", "7"]
    file = tmp_path / "scores.csv"
    file.write_text("id,niqe\n" + "".join(f"{name},\n" for name in names))
    monkeypatch.setattr(scoring, "_scored", lambda *arguments: file)
    table = scoring.score_folder(tmp_path, None, mini)
    assert list(table["id"]) == names and table["niqe"].isna().all()
