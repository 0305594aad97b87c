"""Face-MoGLE and MDiTFace: the mixture written out, and sampling against EC²Face's own pipeline."""

from __future__ import annotations

import math

import pytest
import torch

from ec2face_core.backbone import encode_images, pack
from ec2face_core.config import Config
from ec2face_core.mask_branch import mask_latents_of
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_lab.baselines import NEWER, build
from ec2face_lab.baselines.mogle import Mixture

PROMPTS = ["A woman who smiles.", "The man is bald."]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def config(tiny_config) -> Config:
    guidance = {"text_guidance": 1.5, "mask_guidance": 2.5}  # so that all three terms count
    return tiny_config.replace(sampling={"steps": 3, **guidance})


@pytest.fixture(scope="module", params=NEWER)
def system(request, config):
    """A system whose LoRA is not zero."""
    own = build(request.param, config)
    generator = torch.Generator().manual_seed(3)
    for p in own.networks["lora"]:
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    own.networks.requires_grad_(False)
    return own


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    blocks = torch.randint(0, 19, (2, 8, 8), generator=torch.Generator().manual_seed(5))
    return blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)


def noise() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


def pipeline_images(system, masks: torch.Tensor | None) -> torch.Tensor:
    s = system.config.sampling
    pipe = EC2FacePipeline(
        **system.base.components(), text_length=system.config.backbone.text_length, image_size=64
    )
    pipe.set_progress_bar_config(disable=True)
    given = {"text_guidance": s.text_guidance, "mask_guidance": s.mask_guidance}
    given |= {"guidance_scale": s.guidance, "generator": noise(), "output_type": "pt"}
    return pipe(PROMPTS, masks, num_inference_steps=s.steps, **given).images


def test_text_alone_is_the_base_s_own_picture(system, masks):
    pictures = system.generate(PROMPTS, None, noise())
    assert (pictures - pipeline_images(system, None)).abs().max() < 1e-4
    masked = system.generate(PROMPTS, masks, noise())
    assert (pictures - masked).abs().max() > 0.01, "a hundred times the tolerance"


def test_mditface_is_a_mask_lora_with_decoupled_attention(config, masks):
    """EC²Face's pipeline with the same LoRA: decoupled attention is all that MDiTFace changes."""
    own = build("MDiTFace", config)
    generator = torch.Generator().manual_seed(4)
    for p in own.networks["lora"]:
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    pictures = own.generate(PROMPTS, masks, noise())
    assert (pictures - pipeline_images(own, masks)).abs().max() < 1e-4


def test_mogle_with_one_expert_is_the_plain_mask_branch(config, masks):
    """If the gate trusts the global expert alone, and this copies, the palette image is left."""
    own = build("Face-MoGLE", config)
    mixture, width = own.networks["mixture"], 4 * own.shape[0]
    one = mixture.experts[0] = torch.nn.Linear(width, width)
    with torch.no_grad():
        one.weight.copy_(torch.eye(width))
        one.bias.zero_()
        mixture.gate[2].weight.zero_()
        mixture.gate[2].bias.copy_(torch.tensor([100.0] + [0.0] * 19))
    pictures = own.generate(PROMPTS, masks, noise())
    assert (pictures - pipeline_images(own, masks)).abs().max() < 1e-4


def test_the_gated_mixture_written_out():
    torch.manual_seed(0)
    width, n = 8, 5
    mixture = Mixture(width, experts=4)
    tokens, noisy = torch.randn(2, 4, n, width), torch.randn(2, n, width)
    t = torch.tensor([0.1, 0.7])
    found = mixture(tokens, noisy, t)

    def layer(net: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return net.weight @ x + net.bias

    powers = torch.exp(-math.log(10000) * torch.arange(4) / 4)
    for b in range(2):
        angles = 1000 * t[b] * powers
        sines = torch.cat([angles.cos(), angles.sin()])
        time = layer(mixture.time.linear_1, sines)
        time = layer(mixture.time.linear_2, time * torch.sigmoid(time))
        for i in range(n):
            gate_input = tokens[b, 0, i] + layer(mixture.noise, noisy[b, i]) + time
            scores = layer(mixture.gate[2], layer(mixture.gate[0], gate_input).clamp(min=0))
            shares = scores.exp() / scores.exp().sum()
            want = torch.zeros(width)
            for k in range(4):
                hidden = layer(mixture.experts[k][0], tokens[b, k, i]).clamp(min=0)
                want += shares[k] * layer(mixture.experts[k][2], hidden)
            assert torch.allclose(found[b, i], want, atol=1e-5)


def test_mogle_sees_the_palette_image_and_each_class_alone(config, masks):
    own = build("Face-MoGLE", config)
    with torch.no_grad():
        known = own.encode_masks(masks)
        assert known.shape == (2, 20, *own.shape)
        assert torch.allclose(known[:, 0], mask_latents_of(own.vae, masks), atol=1e-5)
        picture = torch.where(masks[1] == 13, 1.0, -1.0).expand(1, 3, -1, -1)
        assert torch.allclose(known[1:, 14], encode_images(own.vae, picture), atol=1e-4)
        absent = own.encode_masks(torch.zeros(1, 64, 64, dtype=torch.long))[0, 2:]
    assert torch.allclose(absent, own.blank.expand_as(absent), atol=1e-4)

    many = torch.randn(400, 20, 1, 1, 1).expand(-1, -1, *own.shape) + 10
    dropped = own.drop(many, torch.Generator().manual_seed(1))
    gone = (dropped == own.blank).flatten(2).all(2)
    assert ((dropped == many).flatten(2).all(2) ^ gone).all() and not gone[:, 0].any()
    assert gone[:, 1:].float().mean() == pytest.approx(0.1, abs=0.015)


def test_its_tokens_change_from_step_to_step_and_mditface_s_do_not(config, masks):
    t, early = torch.tensor([0.9, 0.9]), torch.tensor([0.2, 0.2])
    for name, changes in (("Face-MoGLE", True), ("MDiTFace", False)):
        own = build(name, config)
        with torch.no_grad():
            known, z = own.encode_masks(masks), torch.randn(2, *own.shape)
            first, other = own.condition(known, z, t), own.condition(known, z, early)
            assert pack(first).shape == (2, 64, 4 * own.shape[0])
            assert torch.equal(first, other) != changes
            assert torch.equal(first, own.condition(known, -z, t)) != changes
