"""`python -m ec2face_lab`: its sub-commands, their help, and requests that cannot be met."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ec2face_core.io.paths import ROOT
from ec2face_lab.__main__ import COMMANDS, main


def test_every_module_of_commands_is_a_sub_command():
    files = (ROOT / "ec2face_lab" / "commands").glob("[a-z]*.py")
    assert sorted(COMMANDS) == sorted(file.stem for file in files)


def test_the_list_of_sub_commands_loads_nothing_heavy():
    code = (
        "import sys; from ec2face_lab.__main__ import build_parser; build_parser().format_help();"
        "print(*{'torch', 'numpy', 'ec2face_core'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name] for name in COMMANDS)])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m ec2face_lab")
    if arguments in ([], ["--help"]):
        assert all(f"    {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"pretrain"}))
def test_an_unknown_profile_is_one_line_and_exit_code_2(name, capsys):
    assert main([name, "--profile", "minni"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "did you mean 'mini'?" in line


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["evaluate", "--layout", "uac"], "--images DIR"),
        (["baselines", "--system", "UaC"], "--out DIR"),
        (["baselines", "--fairness", "--ways", "thrice"], "known: half"),
        (["pretrain", "vae", "--data", "."], "--out DIR"),
    ],
)
def test_options_that_do_not_go_together(arguments, remedy, capsys):
    assert main(arguments) == 2
    assert remedy in capsys.readouterr().err


def test_paths_are_relative_to_the_working_directory(tiny_faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_faces.parent)
    assert main(["prepare", "validate", tiny_faces.name]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "validate", tiny_faces.name]) == 2
    monkeypatch.setenv("HOME", str(tiny_faces.parent))
    assert main(["prepare", "validate", f"~/{tiny_faces.name}"]) == 0
