"""Consistency guidance moves the clean estimate against the gradient, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers import pipeline_with_lora

from ec2face_core.backbone import unpack
from ec2face_core.config import UserError
from ec2face_core.data import FaceDataset
from ec2face_core.flow import reverse_estimate
from ec2face_core.inference.consistency import ConsistencyGuidance

SIZE = (64, 64)


@pytest.fixture(scope="module")
def pipe(tiny_config):
    return pipeline_with_lora(tiny_config)


@pytest.fixture(scope="module")
def faces(tiny_faces):
    return FaceDataset(tiny_faces, "test")


@pytest.fixture(scope="module")
def guide(pipe, tiny_config):
    return ConsistencyGuidance.from_config(tiny_config, pipe.vae, scale=0.05, below=0.9)


@pytest.fixture(scope="module")
def state():
    """A velocity and the state that it belongs to."""
    v, z = torch.randn(2, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    return v, z, torch.tensor([0.5, 0.5])


def mask_loss(guide, z_hat, about):
    _, loss = guide.losses.losses(z_hat, about.captions, about.label_maps)
    return loss.detach()


def test_the_estimate_moves_by_the_scale_and_its_loss_falls(guide, faces, state):
    v, z, t = state
    masks = [faces[0].label_map, faces[1].label_map]
    about = guide.conditions(["A man."], masks, SIZE, torch.arange(2))
    before, after = (reverse_estimate(z, x, t) for x in (v, guide(v, z, t, about)))
    moved = (after - before).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(moved, torch.full((2,), 0.05), rtol=1e-4, atol=1e-6)
    assert (mask_loss(guide, after, about) < mask_loss(guide, before, about)).all()


def test_pictures_without_a_mask_and_early_times_are_left_alone(guide, faces, state):
    v, z, t = state
    about = guide.conditions("", [None, faces[1].label_map], SIZE, torch.arange(2))
    led = guide(v, z, t, about)
    assert torch.equal(led[0], v[0]) and not torch.equal(led[1], v[1])
    assert guide(v, z, torch.tensor([0.95, 0.95]), about) is v


def test_texts_and_masks_are_laid_out_as_the_pipeline_does(guide, faces):
    masks = [faces[0].label_map, faces[1].label_map]
    rows = torch.arange(4) // 2 % 2  # two pictures of each pair
    about = guide.conditions(["a", ""], masks, SIZE, rows)
    assert about.captions == ["a", "a", "", ""]
    assert about.keep_text.tolist() == [True, True, False, False]
    assert torch.equal(about.label_maps, torch.stack([masks[0], masks[0], masks[1], masks[1]]))


def test_a_guided_picture_agrees_better_with_its_mask(pipe, guide, faces, tiny_config):
    face = faces[0]
    settings = {"num_inference_steps": 4, "output_type": "latent"}

    def drawn(consistency):
        noise = torch.Generator().manual_seed(1)
        latents = pipe(
            "A man.", face.label_map, generator=noise, consistency=consistency, **settings
        )
        return unpack(latents.images, 16, 16)

    about = guide.conditions("A man.", [face.label_map], SIZE, torch.arange(1))
    plain, led = drawn(None), drawn(guide)
    assert mask_loss(guide, led, about) < mask_loss(guide, plain, about)
    off = ConsistencyGuidance(guide.losses, scale=0.0)
    assert torch.equal(drawn(off), plain)


def test_wrong_settings_are_named(pipe, guide, tiny_config):
    with pytest.raises(UserError, match="needs text=True"):
        ConsistencyGuidance.from_config(tiny_config, pipe.vae, text=False, mask=False)
    with pytest.raises(ValueError, match="scale"):
        ConsistencyGuidance(guide.losses, scale=-1)
    with pytest.raises(ValueError, match="below"):
        ConsistencyGuidance(guide.losses, below=1.5)
