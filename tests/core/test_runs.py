"""Files that appear whole or not at all, checkpoints, content keys, provenance."""

from __future__ import annotations

import platform
import re
import subprocess

import pytest
import torch

from ec2face_core import runs
from ec2face_core.config import load_profile
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import (
    content_key,
    path_digest,
    provenance,
    whole_file,
    whole_folder,
    write_json,
)
from ec2face_core.training.checkpoints import newest_checkpoint, save_checkpoint


def test_a_full_disk_leaves_the_checkpoints_valid(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(3.0)}
    save_checkpoint(tmp_path, 1, tensors, {}, keep=2)

    def full(_, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*run the same command again"):
        save_checkpoint(tmp_path, 2, tensors, {}, keep=2)
    found, about = newest_checkpoint(tmp_path)
    assert about["step"] == 1 and torch.equal(found["a"], tensors["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_text("half")
        1 / 0  # noqa: B018
    assert list(path.parent.iterdir()) == []
    with whole_file(path) as part:
        part.write_text("old")
    full = pytest.raises(OSError, match=r"cannot write .*No space left.*run the same command again")
    with full, whole_file(path) as part:
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_whole_and_leftovers_of_killed_processes_go(tmp_path):
    path = tmp_path / "final"
    left = tmp_path / f".final.{platform.node()}.999999"
    left.mkdir()
    (left / "half").touch()
    for content in ("old", "new"):
        with whole_folder(path) as part:
            (part / content).touch()
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_digests_name_the_content(tmp_path):
    write_json(tmp_path / "a.json", {"value": 1})
    before = path_digest(tmp_path)
    write_json(tmp_path / "a.json", {"value": 1})
    assert path_digest(tmp_path) == before != path_digest(tmp_path / "absent") == "absent"
    write_json(tmp_path / "a.json", {"value": 2})  # of equal size
    assert path_digest(tmp_path) != before
    assert content_key(["a", 1]) != content_key(["a", "1"])
    assert len(content_key([], 16)) == 16


def test_provenance_names_everything_that_made_a_result(monkeypatch):
    monkeypatch.setenv("EC2FACE_NOTEBOOK", "06_comparison")
    config = load_profile("mini")
    table = ROOT / "data" / "paper" / "table1.csv"
    record = provenance(config, seconds=1.234, inputs=[table, "no/such/file"], faces=3)
    assert set(record) == {
        "notebook", "profile", "seeds", "parameters", "commit", "dirty", "config_hash", "inputs",
        "packages", "device", "seconds",
    }  # fmt: skip
    assert record["notebook"] == "06_comparison" and record["parameters"] == {"faces": 3}
    assert record["config_hash"] == config.digest() and record["seconds"] == 1.23
    assert record["inputs"]["data/paper/table1.csv"] == path_digest(table)
    assert record["inputs"]["no/such/file"] == "absent"
    assert {"torch", "diffusers", "numpy", "python"} <= set(record["packages"])


def test_every_change_makes_a_tree_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CODE", tmp_path)
    assert runs.git_state() == (None, None)  # no repository: unknown, not clean

    def git(*command):
        user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *user, *command], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    commit, dirty = runs.git_state()
    assert re.fullmatch(r"[0-9a-f]{40}", commit) and dirty is False
    (tmp_path / "code.py").write_text("x = 2\n")
    assert runs.git_state()[1] is True
