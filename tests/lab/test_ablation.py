"""What the training notebook says of a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ec2face_core.config import load_profile
from ec2face_lab.study import ablation


def test_sentence_of_a_run(tmp_path):
    rows = [{"step": i, "unweighted_flow": 1.0 - 0.1 * i} for i in range(8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = ablation.describe_training(tmp_path)
    assert "0.950 over the first 2 steps, 0.350 over the last 2" in said


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_short_run_sees_as_many_samples_a_step_on_any_number_of_ranks(processes):
    config = load_profile("mini")
    short = ablation.short_config(config, 100, processes).trainer
    assert short.batch_size * short.num_processes == config.trainer.batch_size
    assert short.steps == 100 and short.warmup == 10
    assert ablation.short_config(config, 10_000).trainer.steps == config.trainer.steps


def test_the_flow_error_of_a_model_that_predicts_nothing(monkeypatch):
    """Its error is the mean square of noise - z: 1 + 4 for latents of 2."""
    monkeypatch.setattr(ablation, "predict_velocity", lambda model, z_t, *_: torch.zeros_like(z_t))
    batch = {"z": torch.full((8, 4, 16, 16), 2.0), "z_mask": None, "text": None}
    error = ablation.flow_error(SimpleNamespace(transformer=None), batch)
    assert error == pytest.approx(5, abs=0.1)
