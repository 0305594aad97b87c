"""How command lines choose a configuration and end with a refusal."""

import argparse

import pytest

from ec2face_core.config import ConfigError, add_config_options, cli, config_from_args, load_profile
from ec2face_core.data import DataError
from ec2face_core.latents import CacheError
from ec2face_core.perception import WeightsError
from ec2face_lab.launch import LaunchError


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, CacheError, WeightsError, FileNotFoundError, PermissionError]
)
def test_a_refusal_is_one_line_and_exit_code_2(kind, capsys):
    @cli
    def main(arguments=None):
        raise kind(f"no {arguments[0]}: make some")

    assert main(["faces"]) == 2
    assert capsys.readouterr().err == "error: no faces: make some\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    @cli
    def main():
        raise ValueError("shape (3, 4)")

    with pytest.raises(ValueError, match="shape"):
        main()


def test_a_refused_child_is_told_and_a_crashed_one_is_not(capsys):
    @cli
    def main(code):
        raise LaunchError(code, ["python"], output="error: no faces")

    assert main(2) == 2
    assert "error: no faces" in capsys.readouterr().err
    with pytest.raises(LaunchError):
        main(1)


@pytest.mark.parametrize(("own", "code"), [(None, 0), (0, 0), (2, 2)])
def test_exit_code_of_a_command_that_ends_well(own, code):
    assert cli(lambda: own)() == code


def test_chosen_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    config = load_profile("smoke", **{"loss.alpha_text": 3.0})
    config.save(path)
    assert config_from_args(options("--profile", "smoke")) == load_profile("smoke")
    assert config_from_args(options("--config", str(path))) == config
    said = options("--config", str(path), "--set", "loss.alpha_text=2", "--set", "trainer.steps=7")
    assert config_from_args(said) == config.replace(**{"loss.alpha_text": 2.0, "trainer.steps": 7})
    assert config_from_args(said, **{"trainer.steps": 9}).trainer.steps == 9, (
        "what the caller says wins"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "minni"], "did you mean 'mini'"),
        (["--config", "absent.yaml"], "no such file"),
        (["--set", "trainer.stepz=3"], "did you mean 'steps'"),
        (["--set", "trainer.steps"], "expected option=value"),
    ],
)
def test_wrong_choices_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        config_from_args(options(*arguments))


def test_profile_and_file_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        options("--profile", "smoke", "--config", "config.yaml")
    assert "not allowed with" in capsys.readouterr().err
