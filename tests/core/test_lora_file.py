"""Which LoRA is taken: the one that was asked for, or a sentence that says how to train it."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ec2face_core.command_line import config_from_args
from ec2face_core.config import Config, ConfigError, LoraConfig, load_profile, trained_dir
from ec2face_core.io.lora_file import (
    LORA_FILE,
    find_mask_lora,
    load_mask_lora,
    read_mask_lora,
    save_mask_lora,
    train_command,
    training_settings,
)
from ec2face_core.mask_branch import add_mask_lora
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_core.train import build_parser
from ec2face_core.trainer import Trainer
from ec2face_lab.world.networks import tiny_backbone


@pytest.fixture(scope="module")
def trained(tiny_config: Config, tmp_path_factory) -> Config:
    """A configuration whose LoRA `none` has just been trained, in its usual place."""
    runs = str(tmp_path_factory.mktemp("runs") / "trained")
    config = tiny_config.replace(profile=runs, trainer={"steps": 1})
    Trainer(config, "none").fit()
    return config


def test_a_training_publishes_its_lora(trained, tmp_path, monkeypatch, capsys):
    place = trained_dir(trained, "none")
    assert find_mask_lora(trained, "none") == place
    record = read_mask_lora(place)
    assert record.settings == training_settings(trained, "none")
    assert (place / "provenance.json").is_file()
    pipe = EC2FacePipeline.from_config(trained, "none")
    assert pipe.config.image_size == trained.data.size and pipe.mask_lora.record == record
    elsewhere = trained.replace(profile=str(tmp_path / "other"))
    Trainer(elsewhere, "none", tmp_path / "experiment").fit()
    assert not trained_dir(elsewhere, "none").exists()
    # a finished training whose LoRA was removed is published again
    moved = place.rename(place.with_name("moved"))
    monkeypatch.setattr(Trainer, "setup", lambda self: pytest.fail("trained again"))
    Trainer(trained, "none").fit()
    assert read_mask_lora(place) == record
    assert "published in" in capsys.readouterr().out
    assert moved.is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss.clip": 3.0}, r"loss\.clip 30\.0, not 3\.0\. `python -m ec2face_core\.train "),
        ({"trainer.steps": 7}, r"trainer\.steps 1, not 7.* --set trainer\.steps=7"),
        ({"lora.rank": 2}, r"lora\.rank 4, not 2"),
        ({"trainer.accumulation": 2}, r"trainer\.samples 2, not 4"),
        ({"backbone.text_length": 31}, r"trained with 32: set backbone\.text_length to 32"),
        ({"data.size": 128}, r"trained at 64 px: set data\.size to 64"),
    ],
)
def test_another_lora_than_was_asked_for_is_refused(trained, settings, message):
    with pytest.raises(ConfigError, match=message):
        EC2FacePipeline.from_config(trained.replace(**settings), "none")


def test_settings_that_change_no_lora_may_differ(trained):
    other = trained.replace(
        sampling={"steps": 3}, trainer={"log_every": 9, "batch_size": 1, "accumulation": 2}
    )
    assert find_mask_lora(other, "none") == trained_dir(trained, "none")


def test_loras_of_the_clone_are_those_of_their_profile():
    """Those of `mini` serve `smoke` too, which names them; nothing else may be asked of them."""
    for name in ("mini", "smoke"):
        config = load_profile(name)
        if not trained_dir(config, "both").exists():
            assert find_mask_lora(config, "both").parts[-3:] == ("mini", "adapters", "both")
            with pytest.raises(ConfigError, match=r"loss\.alpha_mask 0\.5, not 1\.0"):
                find_mask_lora(config.replace(**{"loss.alpha_mask": 1.0}), "both")


def test_the_command_trains_what_was_asked_for():
    config = load_profile("paper", **{"loss.clip": 5.0, "seed": 43})
    command = train_command(config, "mask")
    assert command == (
        "python -m ec2face_core.train --profile paper --variant mask --set seed=43 "
        "--set loss.clip=5.0"
    )


@pytest.mark.parametrize(
    ("profile", "settings"),
    [
        ("mini", {}),
        (
            "paper",
            {"trainer.mixed_precision": "no", "trainer.compile": True, "loss.clip": 1e-6},
        ),
        ("mini", {"data.root": "/a b/#c: 'd' \"e\"", "data.cache": "", "seed": 7}),
        ("mini128", {"data.root": "./a", "perception.scoring_facts": "", "perception.clip": "no"}),
        ("smoke", {"profile": "my run/it's", "loss.smoothing": 1e-9, "sampling.seed": 3}),
        ("paper", {"profile": "/somewhere else/$HOME", "adapters": "a\\"}),
    ],
)
@pytest.mark.parametrize("variant", ["both", "none"])
def test_the_command_can_be_pasted_into_a_shell(profile, settings, variant):
    config = load_profile(profile, **settings)
    words = shlex.split(train_command(config, variant))
    assert words[:3] == ["python", "-m", "ec2face_core.train"]
    options = build_parser().parse_args(words[3:])
    assert config_from_args(options) == config and options.variant == variant


# ------------------------------------------------------------------------- files that do not fit


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A transformer with a mask LoRA, and the LoRA's file."""
    folder = tmp_path_factory.mktemp("lora")
    transformer = tiny_backbone(["a hat"]).transformer
    add_mask_lora(transformer, LoraConfig(rank=4, alpha=8.0))
    save_mask_lora(transformer, folder, LoraConfig(rank=4, alpha=8.0), text_length=24)
    return transformer, folder / LORA_FILE


def other_metadata(metadata, key, **values):
    return metadata | {key: json.dumps(json.loads(metadata[key]) | values)}


PEFT = "lora_adapter_metadata"
DAMAGES = {
    "kohya's names": lambda t, m: ({k.replace("lora_A", "lora_down"): v for k, v in t.items()}, m),
    "a layer is missing": lambda t, m: (dict(sorted(t.items())[1:]), m),
    "no tensors": lambda t, m: ({}, m),
    "a tensor too many": lambda t, m: (t | {"transformer.more.weight": torch.ones(2)}, m),
    "half the rank": lambda t, m: ({k: v[:2] if "_A" in k else v[:, :2] for k, v in t.items()}, m),
    "whole numbers": lambda t, m: ({k: v.int() for k, v in t.items()}, m),
    "a NaN": lambda t, m: ({k: v * float("nan") for k, v in t.items()}, m),
    "another rank": lambda t, m: (t, other_metadata(m, PEFT, **{"transformer.r": 2})),
    "another scale": lambda t, m: (t, other_metadata(m, PEFT, **{"transformer.lora_alpha": 64})),
    "rsLoRA": lambda t, m: (t, other_metadata(m, PEFT, **{"transformer.use_rslora": True})),
    "another record": lambda t, m: (t, other_metadata(m, "ec2face", lora={"rank": 8})),
    "no tokens": lambda t, m: (t, other_metadata(m, "ec2face", lora={"tokens": "none"})),
    "no length": lambda t, m: (t, other_metadata(m, "ec2face", text_length="x")),
    "a newer version": lambda t, m: (t, other_metadata(m, "ec2face", novelty=1)),
    "no JSON": lambda t, m: (t, m | {"ec2face": "{"}),
    "no JSON for peft": lambda t, m: (t, m | {PEFT: "{"}),
    "a list": lambda t, m: (t, m | {"ec2face": "[]"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_is_refused_and_the_lora_before_stays(kept, tmp_path, damage):
    transformer, file = kept
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors, metadata = DAMAGES[damage](load_file(file), metadata)
    bad = tmp_path / "bad.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, bad, metadata)
    before = {n: p.clone() for n, p in transformer.named_parameters() if "lora" in n}
    with pytest.raises(ValueError, match=re.escape(str(bad))):
        load_mask_lora(transformer, bad)
    after = dict(transformer.named_parameters())
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


def test_the_named_file_is_loaded_and_no_other(kept, tmp_path):
    transformer, file = kept
    shutil.copy(file, tmp_path / "mine.safetensors")
    assert load_mask_lora(transformer, tmp_path / "mine.safetensors").rank == 4
    with pytest.raises(FileNotFoundError, match=r"yours\.safetensors"):
        load_mask_lora(transformer, tmp_path / "yours.safetensors")
