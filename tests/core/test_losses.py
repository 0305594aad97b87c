"""The losses against plain loops, closed forms and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ec2face_core.attributes import CLASS_ID
from ec2face_core.config import LossConfig
from ec2face_core.losses import (
    beta,
    bounded_weights,
    class_weights,
    drop_conditions,
    flow_matching_loss,
    focal_weights,
    latent_weights,
    mask_consistency_loss,
    text_consistency_loss,
    total_loss,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- Eq. 8 ---


def test_beta_is_the_printed_logistic():
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    expected = [1 / (1 + math.exp(10 * (float(x) - 0.4))) for x in t]
    torch.testing.assert_close(beta(t), torch.tensor(expected, dtype=torch.float64))
    assert beta(torch.tensor(0.7), steepness=3, center=0.7) == 0.5
    assert (beta(t).diff() < 0).all()


# --- Eqs. 3 and 11 ---


def test_flow_matching_loss_against_loops(generator):
    v, target = torch.randn(2, 3, 2, 4, 5, generator=generator, dtype=torch.float64)
    w = 5 * torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    for weights, of in ((None, lambda b, i, j: 1.0), (w, lambda b, i, j: float(w[b, i, j]))):
        expected = [
            sum(
                (of(b, i, j) * float(v[b, c, i, j] - target[b, c, i, j])) ** 2
                for c in range(2)
                for i in range(4)
                for j in range(5)
            )
            / 40
            for b in range(3)
        ]
        loss = flow_matching_loss(v, target, weights)
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    broadcast = flow_matching_loss(v, target, w[:, None])
    assert torch.equal(broadcast, flow_matching_loss(v, target, w))


def test_the_weight_is_squared_in_loss_and_gradient(generator):
    v = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    target = torch.randn(2, 3, 4, 4, generator=generator)
    w = torch.rand(2, 4, 4, generator=generator)
    flow_matching_loss(v, target, w).sum().backward()
    expected = 2 * w[:, None] ** 2 * (v - target) / (3 * 4 * 4)
    torch.testing.assert_close(v.grad, expected.detach())


def test_flow_matching_loss_of_half_precision_is_wide(generator):
    v = torch.randn(2, 4, 8, 8, generator=generator)
    loss = flow_matching_loss(v.half(), (v + 1).half(), torch.full((2, 8, 8), 1000.0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 1e6), rtol=1e-3, atol=0)
    assert flow_matching_loss(v, v).eq(0).all()


def test_flow_matching_loss_refuses_to_broadcast():
    with pytest.raises(ValueError, match="differ"):
        flow_matching_loss(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


# --- Eq. 6 ---


def test_text_consistency_is_one_minus_the_cosine():
    angle = torch.tensor([0.0, 0.5, math.pi / 2, math.pi], dtype=torch.float64)
    image = 7 * torch.stack([angle.cos(), angle.sin()], 1)  # the length must not matter
    text = torch.tensor([[0.2, 0.0]], dtype=torch.float64).expand(4, 2)
    torch.testing.assert_close(text_consistency_loss(image, text), 1 - angle.cos())


# --- Eq. 7 ---


def test_mask_consistency_against_loops(generator):
    p = torch.randn(2, 19, 3, 2, generator=generator, dtype=torch.float64).softmax(1)
    label_map = torch.randint(0, 19, (2, 3, 2), generator=generator)
    for balance in (0.0, 0.3, 1.0):
        expected = []
        for b in range(2):
            entropy = overlap = size = 0.0
            for c in range(19):
                for i in range(3):
                    for j in range(2):
                        m, q = float(label_map[b, i, j] == c), float(p[b, c, i, j])
                        entropy -= m * math.log(q) + (1 - m) * math.log(1 - q)
                        overlap += m * q
                        size += m**2 + q**2
            dice = 1 - 2 * overlap / (size + 1e-6)
            expected.append(balance * entropy / (19 * 6) + (1 - balance) * dice)
        loss = mask_consistency_loss(p, label_map, balance)
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_mask_consistency_by_hand():
    """One pixel of class 0, parsed with 0.5 for it and 0.5 for class 1."""
    p = torch.zeros(1, 19, 1, 1)
    p[0, :2] = 0.5
    cross_entropy = 2 * math.log(2) / 19
    dice = 1 - 2 * 0.5 / (1 + 0.25 + 0.25)
    loss = mask_consistency_loss(p, torch.zeros(1, 1, 1, dtype=torch.int64))
    assert loss.item() == pytest.approx(0.5 * cross_entropy + 0.5 * dice, abs=1e-5)


def test_mask_consistency_is_zero_at_the_optimum_and_independent_between_samples(generator):
    label_map = torch.randint(0, 19, (3, 8, 8), generator=generator)
    perfect = F.one_hot(label_map, 19).movedim(-1, 1).float()
    assert mask_consistency_loss(perfect, label_map).abs().max() < 1e-5
    p = torch.randn(3, 19, 8, 8, generator=generator).softmax(1)
    alone = torch.cat([mask_consistency_loss(p[i : i + 1], label_map[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(mask_consistency_loss(p, label_map), alone)
    entropy = F.binary_cross_entropy(p, perfect, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(mask_consistency_loss(p, label_map, balance=1.0), entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_consistency_survives_a_parser_that_is_sure_and_wrong(dtype):
    logits = torch.zeros(1, 19, 2, 2)
    logits[:, 3] = 300.0  # softmax underflows to exactly 0 and 1
    logits.requires_grad_()
    label_map = torch.zeros(1, 2, 2, dtype=torch.int64)
    loss = mask_consistency_loss(logits.to(dtype).softmax(1), label_map)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_mask_consistency_descends_to_the_mask(generator):
    label_map = torch.randint(0, 19, (1, 4, 4), generator=generator)
    logits = torch.zeros(1, 19, 4, 4, requires_grad=True)
    for _ in range(20):
        loss = mask_consistency_loss(logits.softmax(1), label_map).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= 0.3 * gradient.sign()
    assert torch.equal(logits.argmax(1), label_map)


def test_mask_consistency_names_a_wrong_size():
    with pytest.raises(ValueError, match="resize the probabilities"):
        mask_consistency_loss(torch.zeros(1, 19, 8, 8), torch.zeros(1, 4, 4, dtype=torch.int64))


# --- Eq. 10 at latent resolution ---


@pytest.fixture
def earring():
    """Skin, and one pixel of earring that is not at the corner of its latent cell."""
    label_map = torch.full((1, 16, 16), CLASS_ID["skin"])
    label_map[0, 5, 6] = CLASS_ID["ear_r"]
    counts = torch.zeros(19, dtype=torch.int64)
    counts[CLASS_ID["skin"]], counts[CLASS_ID["ear_r"]] = 99_000, 1_000
    skin, ring = 100_000 / (19 * 99_000 + 1), 100_000 / (19 * 1_000 + 1)
    return label_map, counts, skin, ring


def raw(**options):
    return LossConfig(**{"normalize": "none", **options})


def test_max_keeps_the_thin_class_and_nearest_loses_it(earring):
    label_map, counts, skin, ring = earring
    for reduction, cell in (("max", ring), ("mean", (15 * skin + ring) / 16), ("nearest", skin)):
        w = latent_weights(label_map, counts, 4, raw(reduction=reduction))
        expected = torch.full((1, 4, 4), skin)
        expected[0, 1, 1] = cell
        torch.testing.assert_close(w, expected)


def test_weights_are_clipped_before_they_are_reduced(earring):
    label_map, counts, skin, _ = earring
    w = latent_weights(label_map, counts, 4, raw(reduction="mean", clip=1.0))
    assert w[0, 1, 1].item() == pytest.approx((15 * skin + 1.0) / 16)


def test_normalised_weights_have_mean_square_one_and_the_same_ratios(earring):
    label_map, counts, _, _ = earring
    batch = label_map.repeat(3, 1, 1)
    w, unscaled = (
        latent_weights(batch, counts, 4, raw(normalize=mode)) for mode in ("mean", "none")
    )
    assert w.square().mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(w / w[0, 0, 0], unscaled / unscaled[0, 0, 0])


@pytest.mark.parametrize("reduction", ["max", "mean", "nearest"])
def test_the_constant_makes_the_mean_square_one_over_the_training_set(
    earring, generator, reduction
):
    label_map, _, _, _ = earring
    maps = torch.cat([label_map, torch.randint(0, 19, (2, 16, 16), generator=generator)])
    counts = torch.bincount(maps.flatten(), minlength=19)  # these maps are the training set
    for clip in (0.0, 1.5):
        options = raw(normalize="constant", clip=clip, reduction=reduction)
        scale = latent_weights(maps, counts, 4, raw(clip=clip, reduction=reduction))
        scale = scale.square().mean().sqrt()
        w = latent_weights(maps, counts, 4, options, scale)
        assert w.square().mean().item() == pytest.approx(1, rel=1e-5)
        # a face's weights do not depend on the others of its step
        torch.testing.assert_close(latent_weights(maps[:1], counts, 4, options, scale), w[:1])
        torch.testing.assert_close(latent_weights(maps, counts, 4, options), w)


def test_other_weightings_and_bounds(earring):
    label_map, counts, skin, ring = earring
    mean = 100_000 / 19  # pixels of the mean class
    cases = (
        ({"weighting": "sqrt"}, skin**0.5, ring**0.5),
        ({"floor": 1.0}, 1.0, ring),
        ({"floor": 1.0, "clip": 3.0}, 1.0, 3.0),
        ({"weighting": "effective"}, *(1 / (1 - math.exp(-n / mean)) for n in (99_000, 1_000))),
    )
    for options, of_skin, of_ring in cases:
        w = latent_weights(label_map, counts, 16, raw(**options))
        assert w[0, 0, 0].item() == pytest.approx(of_skin, rel=1e-5)
        assert w[0, 5, 6].item() == pytest.approx(of_ring, rel=1e-4)
        assert bounded_weights(counts, raw(**options))[0] >= options.get("floor", 0)


def test_focal_weights_follow_the_error(generator, earring):
    v, target = torch.randn(2, 3, 4, 5, 5, generator=generator)
    w = focal_weights(v.requires_grad_(), target)
    assert w.shape == (3, 5, 5) and not w.requires_grad
    expected = torch.empty(3, 5, 5)
    for b, i, j in itertools.product(range(3), range(5), range(5)):
        squares = [(v[b, c, i, j] - target[b, c, i, j]).item() ** 2 for c in range(4)]
        expected[b, i, j] = 2 / (1 + math.exp(-math.sqrt(sum(squares) / 4))) - 1
    expected /= math.sqrt((expected**2).mean())
    torch.testing.assert_close(w, expected)
    same = focal_weights(target, target)
    assert same.isfinite().all()  # nothing is left to learn
    with pytest.raises(ValueError, match=r"`b c h w`"):
        focal_weights(v[0], target[0])
    label_map, counts, *_ = earring
    with pytest.raises(ValueError, match="focal_weights"):
        latent_weights(label_map, counts, 16, raw(weighting="focal"))


def test_sample_scope_counts_each_map_by_itself(earring, generator):
    label_map, counts, _, _ = earring
    other = torch.randint(0, 19, (1, 16, 16), generator=generator)
    w = latent_weights(torch.cat([label_map, other]), counts, 16, raw(scope="sample"))
    for i, single in enumerate((label_map[0], other[0])):
        own = torch.bincount(single.flatten(), minlength=19)
        torch.testing.assert_close(w[i], class_weights(own)[single].float())


# --- Eqs. 9, 12 and 13 ---


def test_conditions_drop_independently_at_the_given_rate(generator):
    keep_text, keep_mask = drop_conditions(200_000, 0.1, generator)
    assert keep_text.dtype == torch.bool and keep_text.shape == keep_mask.shape == (200_000,)
    rates = [(~keep_text).float().mean(), (~keep_mask).float().mean()]
    assert rates == pytest.approx([0.1, 0.1], abs=0.003)
    assert (~keep_text & ~keep_mask).float().mean() == pytest.approx(0.01, abs=0.001)
    for p, kept in ((0.0, True), (1.0, False)):
        assert all((keep == kept).all() for keep in drop_conditions(1000, p, generator))


def test_total_loss_by_hand():
    flow, text, mask = torch.tensor([1.0, 2.0]), torch.tensor([0.4, 0.8]), torch.tensor([0.2, 0.6])
    t = torch.tensor([0.4, 1.0])
    tail = 1 / (1 + math.exp(6))
    loss = total_loss(flow, text, mask, t, LossConfig())
    torch.testing.assert_close(loss.total, torch.tensor([1 + 0.5 * 0.3, 2 + tail * 0.7]))
    torch.testing.assert_close(loss.beta, torch.tensor([0.5, tail]))
    means = loss.mean()
    assert list(means) == ["total", "flow", "text", "mask", "beta"]
    assert {k: float(v) for k, v in means.items()} == pytest.approx(
        {
            "total": (3.15 + 0.7 * tail) / 2,
            "flow": 1.5,
            "text": 0.6,
            "mask": 0.4,
            "beta": (0.5 + tail) / 2,
        }
    )


def test_a_dropped_condition_contributes_no_consistency():
    flow, loss = torch.zeros(4), torch.ones(4, requires_grad=True)
    keep_text = torch.tensor([True, True, False, False])
    keep_mask = torch.tensor([True, False, True, False])
    config = LossConfig(alpha_text=0.25, alpha_mask=0.5, center=1e9)  # beta = 1
    total = total_loss(flow, loss, loss, torch.zeros(4), config, keep_text, keep_mask).total
    assert total.tolist() == [0.75, 0.25, 0.5, 0.0]
    total.sum().backward()
    assert loss.grad.tolist() == [0.75, 0.25, 0.5, 0.0]


def test_missing_consistency_losses_are_zero():
    flow = torch.tensor([1.0, 2.0])
    loss = total_loss(flow, None, None, torch.zeros(2), LossConfig())
    assert torch.equal(loss.total, flow) and loss.text.eq(0).all() and loss.mask.eq(0).all()
