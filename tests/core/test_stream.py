"""Training samples: a function of seed and index, with the stated distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ec2face_core.backbone import load_backbone
from ec2face_core.config import UserError
from ec2face_core.data import FaceDataset
from ec2face_core.latents import encode_dataset
from ec2face_core.stream import SampleStream


@pytest.fixture(scope="module")
def cache(tiny_config, tiny_faces, tmp_path_factory):
    """Latents of the 12 training faces."""
    backbone = load_backbone(tiny_config.backbone, ("vae", "text"))
    faces = FaceDataset(tiny_faces, "train", 64)
    return encode_dataset(faces, backbone, tiny_config, tmp_path_factory.mktemp("latents"))


def test_samples_are_a_function_of_seed_and_index(cache):
    stream = SampleStream(cache, 42, 0.1)
    whole = stream.sample(range(40, 48))
    again = SampleStream(cache, 42, 0.1)  # as after a restart, on two ranks
    halves = again.sample(range(44, 48)), again.sample(range(40, 44))
    for name in ("t", "noise", "keep_text", "keep_mask"):
        parts = torch.cat([getattr(halves[1], name), getattr(halves[0], name)])
        assert torch.equal(getattr(whole, name), parts)
    assert whole.ids == halves[1].ids + halves[0].ids
    assert whole.caption_indices == halves[1].caption_indices + halves[0].caption_indices
    # ranks draw different noise, and so do other seeds
    flat = torch.cat([whole.noise, SampleStream(cache, 43, 0.1).sample(range(40, 48)).noise])
    similarity = torch.corrcoef(flat.flatten(1)) - torch.eye(16)
    assert similarity.abs().max() < 0.15


def test_samples_have_the_stated_distribution(cache):
    stream, n = SampleStream(cache, 1, 0.25), len(cache.ids)
    draws = stream.sample(range(200 * n))
    epochs = [tuple(draws.ids[i : i + n]) for i in range(0, len(draws.ids), n)]
    assert all(sorted(epoch) == sorted(cache.ids) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)  # each in an order of its own
    assert set(Counter(draws.caption_indices)) == set(range(10))
    b = len(draws.t)
    assert abs(draws.t.mean() - 0.5) < 4 / (12 * b) ** 0.5
    for keep in (draws.keep_text, draws.keep_mask):
        assert abs(keep.float().mean() - 0.75) < 4 * (0.25 * 0.75 / b) ** 0.5
    both = (draws.keep_text & draws.keep_mask).float().mean()
    assert abs(both - 0.75**2) < 4 * (0.5625 * 0.4375 / b) ** 0.5  # dropped independently
    assert abs(draws.noise.mean()) < 1e-2 and abs(draws.noise.std() - 1) < 1e-2


def test_faces_with_rare_classes_are_shown_more_often(cache):
    rare = set(cache.ids_with((15, 16)))
    expected = {
        id for id in cache.ids if (torch.isin(cache.label_maps([id]), torch.tensor([15, 16]))).any()
    }
    assert rare == expected and 0 < len(rare) < len(cache.ids)
    chance = len(rare) / len(cache.ids)
    for share in (0.0, 0.5):
        ids = SampleStream(cache, 1, 0.0, rare_faces=share).ids(range(6000))
        found = sum(id in rare for id in ids) / len(ids)
        assert found == pytest.approx(share + (1 - share) * chance, abs=0.03)
    repeated = SampleStream(cache, 1, 0.0, repeats=3, rare_faces=0.5).ids(range(30))
    assert all(len(set(repeated[i : i + 3])) == 1 for i in range(0, 30, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache), "ids_with", lambda self, classes: [])
        with pytest.raises(UserError, match="no training face has a rare class"):
            SampleStream(cache, 1, 0.0, rare_faces=0.5)
