"""The base in shards (FSDP2) trains as the whole base on every process (DDP) does."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from ec2face_core.config import Config
from ec2face_core.runs import read_metrics
from ec2face_lab import launch

CHILD = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["joint", "decoupled"])
def test_shards_take_the_steps_of_whole_copies(tiny_config: Config, tmp_path, attention):
    settings = {"mixed_precision": "no", "steps": 2, "num_processes": 2, "checkpoint_every": 1}
    runs = {}
    for name, options in {"whole": {}, "shards": {"shard": True}}.items():
        if attention == "decoupled":
            options = {**options, "noise_repeats": 2, "gradient_checkpointing": True}
        config = tiny_config.replace(lora={"attention": attention}, trainer={**settings, **options})
        path, folder = tmp_path / f"{name}.yaml", tmp_path / name
        config.save(path)
        arguments = ("--config", str(path), "--variant", "both", "--run-dir", str(folder))
        launch.run("ec2face_core.train", *arguments, num_processes=2, env=CHILD)
        runs[name] = folder
    for left, right in zip(*(read_metrics(folder) for folder in runs.values()), strict=True):
        for key in ("flow", "text", "mask", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-4)
    left, right = (
        load_file(folder / "final" / "pytorch_lora_weights.safetensors") for folder in runs.values()
    )
    assert left.keys() == right.keys()  # the file is the same kind of file
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=2e-5)
