"""How command lines choose a configuration, and how they end."""

import argparse
import subprocess

import pytest

from ec2face_core.command_line import add_config_options, cli, config_from_args
from ec2face_core.config import ConfigError, load_profile
from ec2face_core.io.paths import user_path
from ec2face_core.io.report import DataError
from ec2face_core.latents import CacheError
from ec2face_core.perception import WeightsError


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, CacheError, WeightsError, FileNotFoundError, PermissionError]
)
def test_a_request_that_cannot_be_met_is_one_line_and_exit_code_2(kind, capsys):
    @cli
    def main(arguments=None):
        raise kind(f"no {arguments[0]}: make some")

    assert main(["faces"]) == 2
    assert capsys.readouterr().err == "error: no faces: make some\n"


def test_a_bug_keeps_its_traceback():
    @cli
    def main():
        raise ValueError("shape (3, 4)")

    with pytest.raises(ValueError, match="shape"):
        main()


def test_a_child_that_ended_with_2_is_reported_and_a_crashed_one_is_raised(capsys):
    @cli
    def main(code):
        raise subprocess.CalledProcessError(code, ["python"])

    assert main(2) == 2
    assert "exit status 2" in capsys.readouterr().err
    with pytest.raises(subprocess.CalledProcessError):
        main(1)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (2, 2)])
def test_exit_code_of_a_command_that_ends_well(returned, code):
    assert cli(lambda: returned)() == code


def test_a_configuration_from_a_profile_a_file_and_settings(tmp_path):
    path = tmp_path / "config.yaml"
    config = load_profile("smoke", **{"loss.alpha_text": 3.0})
    config.save(path)
    assert config_from_args(options("--profile", "smoke")) == load_profile("smoke")
    assert config_from_args(options("--config", str(path))) == config
    given = options("--config", str(path), "--set", "loss.alpha_text=2", "--set", "trainer.steps=7")
    assert config_from_args(given) == config.replace(**{"loss.alpha_text": 2.0, "trainer.steps": 7})
    assert config_from_args(given, **{"trainer.steps": 9}).trainer.steps == 9


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


def test_paths_are_relative_to_the_working_directory_and_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_path("faces") == tmp_path / "faces"
    assert user_path("~/faces") == tmp_path / "home" / "faces"
    assert user_path("/faces").as_posix() == "/faces"
