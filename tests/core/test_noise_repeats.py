"""K noise draws of a face that share one pass over its mask (decoupled attention)."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import step_gradients

from ec2face_core.config import Config, ConfigError
from ec2face_core.runs import read_metrics
from ec2face_core.trainer import Trainer
from ec2face_lab import launch


def test_draws_that_share_a_mask_train_alike(tiny_config: Config, tmp_path, monkeypatch):
    """K draws of a face through one mask pass: Eq. 12 and its gradient are those of K passes."""
    config = tiny_config.replace(
        lora={"attention": "decoupled"},
        loss={"alpha_text": 500.0, "alpha_mask": 500.0},
        trainer={
            "steps": 100, "batch_size": 4, "noise_repeats": 2, "mixed_precision": "no",
            "drop_probability": 0.4,
        },
    )  # fmt: skip
    trainer = Trainer(config, "both", tmp_path / "run")
    trainer.setup()

    def kept(first: int) -> int:
        return int(trainer.stream.sample(range(first, first + 4)).keep_mask.sum())

    first = next(k for k in range(0, 400, 4) if kept(k) == 3)  # one of the draws has no mask
    draws = trainer.stream.sample(range(first, first + 4))
    assert draws.ids[0] == draws.ids[1] != draws.ids[2] == draws.ids[3]
    assert len(set(draws.t.tolist())) == 4 and not torch.equal(draws.noise[0], draws.noise[1])
    generator = torch.Generator().manual_seed(0)
    for p in trainer.parameters:
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    passes = []
    trainer.transformer.x_embedder.lora_A["mask"].register_forward_hook(
        lambda module, args, result: passes.append(len(result))
    )

    def gradients_of_the_loss():
        w = trainer.long_tail_weights(range(first, first + 4))
        return step_gradients(trainer, draws, w)

    shared, means = gradients_of_the_loss()
    assert passes == [2]  # masks
    monkeypatch.setattr(Trainer, "_mask_condition", lambda self, x: x.z_m)
    apart, expected = gradients_of_the_loss()
    assert passes == [2, 3]
    for left, right in zip(shared, apart, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))
    for name, value in expected.items():
        torch.testing.assert_close(means[name], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"attention": "joint"}}, r"needs lora\.attention decoupled"),
        ({"trainer": {"batch_size": 3}}, "must be a multiple"),
    ],
)
def test_draws_that_cannot_share_a_mask(tiny_config: Config, settings, message):
    config = tiny_config.replace(lora={"attention": "decoupled"}, trainer={"noise_repeats": 2})
    with pytest.raises(ConfigError, match=message):
        config.replace(**settings)


@pytest.mark.slow
def test_two_ranks_share_masks_as_one_process_does(tiny_config: Config, tmp_path):
    shared = {"mixed_precision": "no", "steps": 1, "noise_repeats": 2}
    config = tiny_config.replace(lora={"attention": "decoupled"})
    one = config.replace(trainer={**shared, "batch_size": 4})
    two = config.replace(trainer={**shared, "batch_size": 2, "num_processes": 2})
    Trainer(one, "none", tmp_path / "one").fit()
    two.save(tmp_path / "two.yaml")
    arguments = ("--config", str(tmp_path / "two.yaml"), "--variant", "none")
    launch.run(
        "ec2face_core.train", *arguments, "--run-dir", str(tmp_path / "two"), num_processes=2,
        env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )  # fmt: skip
    left, right = (read_metrics(tmp_path / name)[0] for name in ("one", "two"))
    for name in ("t", "flow", "grad_norm"):
        assert left[name] == pytest.approx(right[name], rel=1e-4)
