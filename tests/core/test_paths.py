"""Where relative paths begin: settings at the root, command lines where their user stands."""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ec2face_core.command_line import add_config_options, config_from_args
from ec2face_core.config import load_profile
from ec2face_core.io.paths import CODE, ROOT, PathError, resolve, user_path, user_setting
from ec2face_core.runs import read_metrics


def test_settings_begin_at_the_root_and_calls_where_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve("data/mini") == ROOT / "data" / "mini"
    assert resolve("~/faces") == tmp_path / "home" / "faces"
    assert resolve("/faces") == Path("/faces")
    assert user_path("mine") == tmp_path / "mine" and user_path("./mine") == tmp_path / "mine"
    assert user_path("~/mine") == tmp_path / "home" / "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert read_metrics("run") == [{"step": 1}]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("./faces", "{here}/faces"),
        ("../faces", "{here}/../faces"),
        ("local-dir:./clip", "local-dir:{here}/clip"),
        ("~/faces", "~/faces"),
        ("data/faces", "data/faces"),
        ("hf-hub:owner/model", "hf-hub:owner/model"),
        ("module:name", "module:name"),
        ("", ""),
        (5, 5),
        (None, None),
    ],
)
def test_settings_with_a_dot_mean_the_working_directory(monkeypatch, tmp_path, given, meant):
    monkeypatch.chdir(tmp_path)
    expected = meant.format(here=tmp_path) if isinstance(meant, str) else meant
    assert user_setting(given) == expected


def test_settings_of_a_command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    given = ["--set", "data.root=./faces", "--set", "perception.clip=local-dir:../clip"]
    config = config_from_args(parser.parse_args([*given, "--set", "adapters=runs/mine"]))
    assert resolve(config.data.root) == tmp_path / "faces"
    assert config.perception.clip == f"local-dir:{tmp_path}/../clip"
    assert resolve(config.adapters) == ROOT / "runs" / "mine"


@pytest.mark.parametrize("path", ["", "~nobody-of-this-name/faces"])
def test_paths_that_mean_nothing_are_refused(path, capsys):
    with pytest.raises(PathError):
        user_path(path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=user_path)
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", path])
    assert "--out" in capsys.readouterr().err


def test_a_run_folder_is_the_users(monkeypatch, tmp_path):
    from ec2face_core.trainer import Trainer

    monkeypatch.chdir(tmp_path)
    config = load_profile("smoke", profile=str(tmp_path / "run"))
    assert Trainer(config, "both", "mine").run_dir == tmp_path / "mine"
    assert Trainer(config, "both").run_dir == tmp_path / "run" / "training" / "both"


def paths_of(folder: Path, monkeypatch, root: str = "") -> dict:
    """The names of `paths.py` in a package that lies elsewhere, with this EC2FACE_ROOT."""
    monkeypatch.setenv("EC2FACE_ROOT", root)
    target = folder / "ec2face_core" / "io"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(CODE / "ec2face_core" / "io" / "paths.py", target)
    return runpy.run_path(str(target / "paths.py"))


def test_the_environment_names_the_root(monkeypatch, tmp_path):
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path / "root"), "root", "~/root"):
        names = paths_of(tmp_path / "site", monkeypatch, name)
        assert names["ROOT"] == tmp_path / "root"
        assert names["resolve"]("data/mini") == tmp_path / "root" / "data" / "mini"
    gone = paths_of(tmp_path / "site", monkeypatch, "gone")
    with pytest.raises(FileNotFoundError, match=r"gone is none: .* EC2FACE_ROOT"):
        gone["resolve"]("data/mini")


def test_a_package_without_its_clone_says_so(monkeypatch, tmp_path):
    """As `pip install .` leaves it: nothing is looked for in, or written into, site-packages."""
    names = paths_of(tmp_path / "site", monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"relative to a clone .*EC2FACE_ROOT"):
        names["resolve"]("data/mini")
    assert names["resolve"]("/faces") == Path("/faces")
    (tmp_path / "site" / "pyproject.toml").touch()  # a clone
    names = paths_of(tmp_path / "site", monkeypatch)
    assert names["resolve"]("data/mini") == tmp_path / "site" / "data" / "mini"


@pytest.mark.slow
def test_an_installed_package_ends_with_one_line(tmp_path):
    site = tmp_path / "site-packages"
    for package in ("ec2face_core", "ec2face_lab"):
        shutil.copytree(CODE / package, site / package)
    environment = {**os.environ, "PYTHONPATH": str(site), "EC2FACE_ROOT": ""}
    command = [sys.executable, "-m", "ec2face_core.train", "--profile", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "EC2FACE_ROOT" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in site.iterdir()) == ["ec2face_core", "ec2face_lab"]
