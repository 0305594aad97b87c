"""FLOPs of a training step at paper scale, counted on the meta device and derived by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from networks import SIZES, build, build_pixel_path, build_transformer, flash_on_meta, inputs
from torch.utils.flop_counter import FlopCounterMode

from ec2face_core.backbone import decode_latents
from ec2face_core.config import LoraConfig
from ec2face_core.mask_branch import install_mask_branch, precompute_mask_kv, predict_velocity

FLUX = SIZES["flux"]
NOISE = MASK = 1024  # tokens at 512 px
D, DOUBLE, SINGLE = 3072, 19, 38


def counted(network, leaves) -> tuple[float, float]:
    """TF of a forward, and of the backward to the leaves."""
    with flash_on_meta(), FlopCounterMode(display=False) as counter:
        out = network()
        forward = counter.get_total_flops() / 1e12
        torch.autograd.grad(out.sum(), leaves)
    return forward, counter.get_total_flops() / 1e12 - forward


@pytest.fixture(scope="module")
def flux():
    return build_transformer(FLUX, "meta")


def flux_step(flux, text: int, condition=lambda transformer, x: x.z_mask) -> tuple[float, float]:
    """TF of FLUX with the mask LoRA, forward and backward, for one sample."""
    transformer, parameters = flux
    x = inputs(dataclasses.replace(FLUX, text=text), 1, "meta")

    def velocity():
        return predict_velocity(transformer, x.z, x.t, x.text, condition(transformer, x))

    return counted(velocity, parameters)


def derived(text: int) -> tuple[float, float]:
    """The same from the layers' sizes: 2 FLOP a multiply-add, each product counted by its sides.

    Backward has one product for each linear layer (for its input: the weight is frozen), and for
    attention five instead of two, because flash computes the probabilities again. The modulation
    has none: nothing before it learns. Left out: the LoRA, 0.1 %.
    """
    tokens, image = text + NOISE + MASK, NOISE + MASK
    double = 4 * D**2 + 8 * D**2  # q, k, v, out; a feed-forward 4 D wide
    single = 3 * D**2 + 4 * D**2 + 5 * D**2  # q, k, v; MLP in; MLP and attention out
    linears = (DOUBLE * double + SINGLE * single) * tokens
    ends = (64 * image + 4096 * text + 64 * image) * D
    modulation = DOUBLE * 2 * 6 * D**2 + SINGLE * 3 * D**2 + 2 * D**2
    attention = (DOUBLE + SINGLE) * 2 * tokens**2 * D
    return 2e-12 * (linears + ends + modulation + attention), 2e-12 * (linears + 2.5 * attention)


@pytest.mark.parametrize(("text", "step"), [(512, 81.8), (128, 67.5)])
def test_flux_with_the_mask_lora(flux, text, step):
    """`step`: counted for mask, noise and text as separate tensors. As one sequence they cost 0.5 %
    more: backward also visits the noise's q, k, v of the first block and, in the last, the outputs
    of text and mask that nobody reads."""
    forward, backward = flux_step(flux, text)
    assert forward + backward == pytest.approx(step, rel=0.01)
    by_hand = derived(text)
    assert forward == pytest.approx(by_hand[0], rel=0.005)
    assert backward == pytest.approx(by_hand[1], rel=0.01)


@pytest.mark.slow
def test_flux_with_decoupled_attention(flux):
    """The pass over the mask is 45 % of a step at 128 text tokens: what K draws share."""
    transformer, _ = flux
    joint, decoupled = LoraConfig(), LoraConfig(attention="decoupled")
    install_mask_branch(transformer, decoupled)
    try:
        memory: list = []

        def remember(transformer, x):
            memory.append(precompute_mask_kv(transformer, x.z_mask))
            return memory[0]

        forward, backward = flux_step(flux, 128, remember)
        assert forward + backward == pytest.approx(30.62 + 34.04, rel=0.02)
        with torch.no_grad():
            x = inputs(dataclasses.replace(FLUX, text=128), 1, "meta")
            with flash_on_meta(), FlopCounterMode(display=False) as counter:
                predict_velocity(transformer, x.z, x.t, x.text, memory[0])
        assert counter.get_total_flops() / 1e12 == pytest.approx(16.64, rel=0.01)
        assert forward - counter.get_total_flops() / 1e12 == pytest.approx(13.98, rel=0.02)
    finally:
        install_mask_branch(transformer, joint)


def test_pixel_path():
    """Decoder, parser and CLIP: forward, and backward to what they read; nothing is recomputed."""
    vae, parser, clip = build_pixel_path(FLUX, "meta")
    z = torch.empty(1, 16, 64, 64, device="meta", requires_grad=True)
    pictures = torch.empty(1, 3, 512, 512, device="meta", requires_grad=True)
    parts = {
        "decoder": counted(lambda: decode_latents(vae, z), z),
        "parser": counted(lambda: parser.probabilities(pictures), pictures),
        "clip": counted(lambda: clip.image_features(pictures), pictures),
    }
    assert sum(map(sum, parts.values())) == pytest.approx(7.28, rel=0.01)
    for part, forward in (("decoder", 2.515), ("parser", 0.917), ("clip", 0.162)):
        assert parts[part][0] == pytest.approx(forward, rel=0.01)
        assert parts[part][0] < parts[part][1] < 1.1 * parts[part][0]
    networks = vae.decoder, parser.net, clip.model.visual
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [49_545_475, 161_194_771, 303_966_208]
    # ViT-L-14 by hand: 256 patches and a class token, 24 layers of width 1024, patches, projection
    n, d = 257, 1024
    by_hand = 24 * (12 * d**2 * n + 2 * n**2 * d) + 256 * 3 * 14**2 * d + d * 768
    assert parts["clip"][0] == pytest.approx(2e-12 * by_hand, rel=0.001)


def test_the_benchmark_compares_equal_loras():
    """peft's LoRA on all tokens with factors 0 and 1 has the gradient of the mask branch's."""
    from step import EVERYWHERE, TAIL, cases, prepare

    size = SIZES["tiny"]
    networks = build(size, "cpu")
    for p in networks.parameters:
        torch.nn.init.normal_(p, std=0.1)
    rows = {row.component: row for row in cases(networks, inputs(size, 4, "cpu"), size)}
    gradients = []
    for name in (TAIL, EVERYWHERE, TAIL):
        prepare(rows[name], networks, size)
        gradients.append(rows[name].work())
    for ours, stock, again in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-6)
        assert torch.equal(ours, again)
