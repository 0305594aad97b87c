"""Which LoRA is taken: the one that was asked for, or a sentence that says how to train it."""

from __future__ import annotations

import shlex

import pytest

from ec2face_core.command_line import config_from_args
from ec2face_core.config import Config, ConfigError, load_profile, trained_dir
from ec2face_core.io.lora_file import (
    find_mask_lora,
    read_mask_lora,
    train_command,
    training_settings,
)
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_core.train import build_parser
from ec2face_core.trainer import Trainer


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
