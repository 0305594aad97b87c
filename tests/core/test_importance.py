"""The savings of the pixel path: the gate is unbiased and even, the small decoder fits."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import pytest
import torch
from helpers import step_gradients

from ec2face_core.backbone import decode_latents, load_tiny_decoder
from ec2face_core.config import BackboneConfig, ConfigError, LossConfig
from ec2face_core.fast.importance import pixel_loss_probability, systematic_sample
from ec2face_core.losses import beta
from ec2face_core.stream import BLOCK, SampleStream
from ec2face_core.trainer import Trainer


def every_choice(p: torch.Tensor) -> dict[tuple[bool, ...], float]:
    """All that `systematic_sample` can choose, with exact probabilities.

    The choice is constant between the values of u at which a sum of the first p_i hits an integer.
    """
    jumps = sorted({0.0, 1.0, *(1 - p.cumsum(0) % 1).clamp(0, 1).tolist()})
    choices: dict[tuple[bool, ...], float] = defaultdict(float)
    for left, right in itertools.pairwise(jumps):
        choices[tuple(systematic_sample(p, (left + right) / 2).tolist())] += right - left
    return choices


def test_the_probability_follows_beta_t_between_its_bounds():
    config = LossConfig(importance_sampling=2.0)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    p, size = pixel_loss_probability(t, config), beta(t) * t
    assert p.min() == 0.05 and p.max() == 1
    between = (p > 0.05) & (p < 1)
    ratio = p[between] / size[between]
    torch.testing.assert_close(ratio, (2 / size.max()).expand_as(ratio), rtol=1e-4, atol=0)
    assert p.mean() == pytest.approx(0.61, abs=0.01)  # decodes that are left
    moments = (size**2 / p).mean() / (size**2).mean()
    assert moments == pytest.approx(1.06, abs=0.01)  # and what they cost in variance


def test_the_choice_has_the_stated_probabilities_and_is_even():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(9, generator=generator, dtype=torch.float64)
    p[3] = 1.0
    choices = every_choice(p)
    assert sum(choices.values()) == pytest.approx(1)
    chosen = torch.tensor([list(c) for c in choices], dtype=torch.float64)
    weights = torch.tensor(list(choices.values()), dtype=torch.float64)
    torch.testing.assert_close(weights @ chosen, p, rtol=0, atol=1e-12)
    for first in range(9):
        for last in range(first + 1, 10):
            counts, expected = chosen[:, first:last].sum(1), p[first:last].sum()
            assert ((counts - expected).abs() < 1).all()  # rounded up or down


def test_the_gates_expectation_is_the_full_gradient_and_loss(exact):
    """By enumeration of all that can be drawn, not by sampling."""
    draws = dataclasses.replace(exact.stream.sample(range(4)), t=torch.tensor([0.1, 0.3, 0.6, 0.9]))

    def step(gate):
        gradient, means = step_gradients(exact, dataclasses.replace(draws, pixel_weight=gate))
        return torch.cat([g.flatten() for g in gradient]).double(), means

    full, means = step(None)
    p = pixel_loss_probability(draws.t.double(), LossConfig(importance_sampling=1.0))
    assert (p < 1).sum() >= 3
    expected, text, mask, seen = torch.zeros_like(full), 0.0, 0.0, []
    for choice, probability in every_choice(p).items():
        gradient, of = step((torch.tensor(choice) / p).float())
        expected += probability * gradient
        text, mask = text + probability * of["text"], mask + probability * of["mask"]
        seen.append(gradient)
    assert len(seen) >= 4
    assert (expected - full).norm() / full.norm() < 1e-4
    assert min((g - full).norm() / full.norm() for g in seen) > 1e-2  # so none is it by itself
    torch.testing.assert_close(text, means["text"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mask, means["mask"], rtol=1e-4, atol=1e-6)


def test_what_the_gate_leaves_out_is_not_decoded(exact, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "ec2face_core.consistency.decode_latents",
        lambda vae, z: decoded.append(len(z)) or decode_latents(vae, z),
    )
    everyone = torch.ones(4, dtype=torch.bool)  # samples without a mask are never computed
    draws = dataclasses.replace(exact.stream.sample(range(4)), keep_mask=everyone)
    for gate, count in (([0, 2.0, 0, 0], 1), ([0] * 4, 0), ([1.0] * 4, 4)):
        decoded.clear()
        weight = torch.tensor(gate).float()
        _, means = step_gradients(exact, dataclasses.replace(draws, pixel_weight=weight))
        assert sum(decoded) == count
        assert count or means["text"] == means["mask"] == 0


def test_gates_are_a_function_of_seed_and_index(exact):
    config = LossConfig(importance_sampling=1.0)

    def stream(seed=42, **options):
        gate = lambda t: pixel_loss_probability(t, config)  # noqa: E731
        return SampleStream(exact.cache, seed, 0.1, pixel_probability=gate, **options)

    for even in (False, True):
        whole = stream(low_discrepancy_t=even).sample(range(10, 10 + 3 * BLOCK))
        for pieces in ([(10, 4), (14, 4)], [(14, 1), (10, 8)], [(30, 5), (60, 40)]):  # ranks, steps
            for start, n in pieces:
                part = stream(low_discrepancy_t=even).sample(range(start, start + n))
                rows = slice(start - 10, start - 10 + n)
                assert torch.equal(part.pixel_weight, whole.pixel_weight[rows])
                assert torch.equal(part.t, whole.t[rows])
        p = pixel_loss_probability(whole.t, config)
        chosen = whole.pixel_weight > 0
        torch.testing.assert_close(whole.pixel_weight[chosen], 1 / p[chosen])
        assert 0.2 < chosen.float().mean() < 0.7
        other = stream(43, low_discrepancy_t=even).sample(range(10, 10 + 3 * BLOCK))
        assert not torch.equal(other.pixel_weight, whole.pixel_weight)

    plain, even = (stream(low_discrepancy_t=e).sample(range(64)) for e in (False, True))
    assert torch.equal(plain.noise, even.noise) and plain.caption_indices == even.caption_indices
    assert not torch.equal(plain.t, even.t)
    ungated = SampleStream(exact.cache, 42, 0.1).sample(range(64))
    assert ungated.pixel_weight is None and torch.equal(ungated.t, plain.t)
    busiest = (
        stream(low_discrepancy_t=True).sample(range(BLOCK)).pixel_weight.view(8, 4).gt(0).sum(1)
    )
    assert busiest.max() - busiest.min() <= 2  # eight ranks of four samples


# ------------------------------------------------------------------------ the small decoder


@pytest.fixture(scope="module")
def tiny_decoder_dir(tmp_path_factory):
    """An AutoencoderTiny of TAEF1's kind for the miniature's latents: 8 channels, 1/4 the side."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("taef1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoencoderTiny(
            latent_channels=8,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ).save_pretrained(folder)
    return folder


def test_a_tiny_decoder_guides_in_place_of_the_vae(exact, tiny_decoder_dir, tmp_path):
    config = exact.config.replace(
        backbone={"pixel_decoder": str(tiny_decoder_dir)}, trainer={"steps": 1}
    )
    trainer = Trainer(config, "both", tmp_path)
    trainer.fit()
    vae = trainer.consistency.vae
    assert type(vae).__name__ == "AutoencoderTiny" and not hasattr(vae, "encoder")
    assert not any(p.requires_grad for p in vae.parameters())
    draws = exact.stream.sample(range(2))
    batch = exact.cache.batch(draws.ids, draws.caption_indices)
    z = batch["z"].requires_grad_()
    images = decode_latents(vae, z)
    torch.testing.assert_close(images, vae.decoder(z.detach()))  # the latents as they are
    assert images.shape == (2, 3, 64, 64)
    g, text, mask = trainer.consistency.gradient(
        batch["z"], batch["captions"], batch["label_map"], draws.t
    )
    losses = trainer.consistency.losses(z, batch["captions"], batch["label_map"])
    weighted = beta(draws.t) * 500 * (losses[0] + losses[1])
    torch.testing.assert_close(g, torch.autograd.grad(weighted.sum(), z)[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.stack([text, mask]), torch.stack(losses))


def test_a_wrong_tiny_decoder_is_named(tiny_decoder_dir, tmp_path):
    config = BackboneConfig(pixel_decoder=str(tiny_decoder_dir), dtype="float32")
    assert load_tiny_decoder(config, (8, 16, 16), 64).dtype == torch.float32
    with pytest.raises(ConfigError, match=r"pixel_decoder.* here it is 4 times and 16 channels"):
        load_tiny_decoder(config, (16, 16, 16), 64)
    with pytest.raises(ConfigError, match=r"4 times the side .* here it is 8 times"):
        load_tiny_decoder(config, (8, 8, 8), 64)
    missing = dataclasses.replace(config, pixel_decoder=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"backbone\.pixel_decoder.*madebyollin/taef1"):
        load_tiny_decoder(missing, (8, 16, 16), 64)
