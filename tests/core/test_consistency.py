"""The consistency losses' gradient at the estimate, against one piece of autograd."""

from __future__ import annotations

import torch
from helpers import step_gradients

from ec2face_core.consistency import PixelConsistency
from ec2face_core.flow import interpolate, reverse_estimate, target_velocity
from ec2face_core.losses import flow_matching_loss, total_loss
from ec2face_core.mask_branch import predict_velocity
from ec2face_core.perception import FaceParser


def test_two_stage_gradient_is_the_end_to_end_gradient(exact):
    """Against Eqs. 5, 9, 11, 12 written out and differentiated in one piece."""
    draws = exact.stream.sample(range(4))
    assert not draws.keep_text.all() and not draws.keep_mask.all()  # dropping is in the test
    weights = exact.long_tail_weights(range(4))
    assert abs(weights.square().mean() - 1) < 1e-5
    two_stage, means = step_gradients(exact, draws, weights)

    config = exact.config
    batch = exact.cache.batch(draws.ids, draws.caption_indices)
    z_t = interpolate(batch["z"], draws.noise, draws.t)
    text = batch["text"].where(draws.keep_text, exact.cache.text([""]))
    v = predict_velocity(
        exact.transformer, z_t, draws.t, text, batch["z_mask"], draws.keep_mask, guidance=1.0
    )
    flow = flow_matching_loss(v, target_velocity(batch["z"], draws.noise), weights)
    z_hat = reverse_estimate(z_t, v, draws.t)
    text_loss, mask_loss = exact.consistency.losses(z_hat, batch["captions"], batch["label_map"])
    parts = total_loss(
        flow, text_loss, mask_loss, draws.t, config.loss, draws.keep_text, draws.keep_mask
    )
    end_to_end = torch.autograd.grad(parts.total.mean(), exact.parameters, retain_graph=True)
    only_flow = torch.autograd.grad(flow.mean(), exact.parameters)

    def flat(gradient):
        return torch.cat([g.flatten() for g in gradient])

    def error(left, right):
        return (flat(left) - flat(right)).norm() / flat(right).norm()

    assert error(two_stage, end_to_end) < 1e-4
    assert error(only_flow, end_to_end) > 0.1  # so the pixel losses were in the comparison
    for name in parts.mean():  # the log's means are of the samples that are computed
        value = getattr(parts, name).detach()[draws.keep_mask].mean()
        torch.testing.assert_close(means[name], value, rtol=1e-4, atol=1e-5)


def test_the_guides_round_alike_from_the_first_call_on(exact):
    """What the resume rests on: a fresh process's first gradient is a warm one's hundredth."""
    draws = exact.stream.sample(range(2))
    batch = exact.cache.batch(draws.ids, draws.caption_indices)
    fresh = FaceParser.from_config(exact.config.perception)
    guide = PixelConsistency(
        exact.consistency.vae, exact.consistency.clip, fresh, exact.config.loss
    )
    gradients = [
        guide.gradient(batch["z"], batch["captions"], batch["label_map"], draws.t)[0]
        for _ in range(4)
    ]
    assert all(torch.equal(gradients[0], g) for g in gradients)
