"""How command lines choose a configuration, and how they end."""

import argparse
import subprocess

import pytest

from ec2face_core import train
from ec2face_core.command_line import (
    add_config_options,
    cli,
    config_from_args,
    override,
    parse_override,
)
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
        (["--set", "=5"], "expected option=value"),
        (["--set", "data.root==x"], "expected option=value"),
        (["--set", "a.b.c.d=1"], "--set a: unknown option"),
        (["--set", "name=1"], "--set name: unknown option"),
        (["--set", "values=1"], "--set values: unknown option"),
        (["--set", "self=1"], "--set self: unknown option"),
        (["--set", "seed.low=1"], "--set seed: is a single value"),
        (["--set", "loss=1"], "--set loss: expected options.*for example loss.alpha_text"),
        (["--set", "loss="], "--set loss: expected options"),
        (["--set", "loss={clip: 1, clip: 2}"], "--set loss: .*'clip' is given twice"),
        (["--set", "loss={clip: 1"], "--set loss: .* not valid YAML"),
        (["--set", "data.root='a' 'b'"], "--set data.root: .* not valid YAML"),
        (["--set", "seed=5 # five"], "--set seed: .* decimal digits, got '5 # five'"),
        (
            ["--set", "trainer.compile=1"],
            "--set trainer.compile: expected a boolean, true or false",
        ),
        (["--config", "."], "--config .* is a folder: name the file in it"),
    ],
)
def test_wrong_choices_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        config_from_args(options(*arguments))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((x, x) for x in (
            "/tmp/a #b", "/tmp/a: b", "a, b", "[a]", "{a: b}", "a=b", "- a", "*a", "&a", "!a", "%",
            "no", "off", "null", "~", "042", "1:30", "1e-4", "0x1f", "true", "é/ß", "'tis", "a'",
            "2020-01-01", "a\\nb", 'say "so"', "$HOME", "\N{GRINNING FACE}",
        )),
        ("'a #b'", "a #b"),
        ('"a b"', "a b"),
        ("'it''s'", "it's"),
        ("  a b  ", "a b"),
        ("'./a'", "./a"),
    ],
)  # fmt: skip
def test_a_text_on_a_command_line_is_what_was_typed(text, value):
    assert config_from_args(options("--set", f"data.root={text}")).data.root == value


def test_options_of_a_group_on_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = options("--set", "loss={center: 0.3, scope: sample, normalize: mean}")
    config = config_from_args(given)
    assert (config.loss.center, config.loss.scope) == (0.3, "sample")
    config = config_from_args(options("--set", "data={root: ./faces, cache: no}"))
    assert (config.data.root, config.data.cache) == (str(tmp_path / "faces"), "no")


def test_the_last_of_several_values_counts():
    last = {"trainer.steps": 9}
    for values in (
        ("trainer.steps=5", "trainer.steps=9"),
        ("trainer={steps: 5}", "trainer.steps=9"),
        ("trainer.steps=5", "trainer={steps: 9}"),
    ):
        given = options(*(x for value in values for x in ("--set", value)))
        assert config_from_args(given) == load_profile("mini", **last)
        assert config_from_args(given, **{"trainer.steps": 3}).trainer.steps == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("data.root", x) for x in (
            "a", "a b", "a #b", "a: b", "it's", '"a"', "'a'", " a ", "", "./a", "../a", "~/a", "=a",
            "no", "null", "042", "a\\b", '"', "''", "é", "$HOME `x`", "\N{GRINNING FACE} '",
        )),
        ("perception.clip", "local-dir:./a"),
        ("trainer.compile", True),
        ("trainer.compile", False),
        ("trainer.mixed_precision", "no"),
        ("loss.smoothing", 1e-6),
        ("loss.steepness", 1e22),
        ("loss.center", -0.1),
        ("seed", 2**40),
    ],
)  # fmt: skip
def test_a_setting_is_written_as_it_is_read(key, value):
    assert parse_override(override(key, value)) == {key: value}


def test_a_file_in_the_place_of_a_folder_is_named_with_the_remedy(tmp_path, capsys):
    (tmp_path / "file").touch()

    for make, message in (
        (lambda: (tmp_path / "file").mkdir(parents=True, exist_ok=True), "name another folder"),
        (lambda: (tmp_path / "file" / "a" / "b").mkdir(parents=True), "name another folder"),
        (lambda: (tmp_path / "file" / "c.yaml").read_text(), "name another folder"),
        (lambda: tmp_path.read_text(), "is a folder; name a file"),
    ):
        assert cli(make)() == 2
        text = capsys.readouterr().err
        assert str(tmp_path) in text and message in text and "Errno" not in text


@pytest.mark.parametrize("below", ["", "run/training"])
def test_a_training_in_a_file_is_refused(tmp_path, capsys, below):
    (tmp_path / "file").touch()
    place = ["--run-dir", str(tmp_path / "file" / below)]
    assert train.main(["--profile", "smoke", *place]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert train.main(["--set", f"profile={tmp_path / 'file'}"]) == 2
    assert "name another folder" in capsys.readouterr().err


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
