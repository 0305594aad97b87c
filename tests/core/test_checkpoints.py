"""Checkpoints cannot contradict themselves, and strange neighbours do not matter."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch

from ec2face_core.config import ConfigError, load_profile
from ec2face_core.runs import add_metrics, cut_metrics, read_metrics
from ec2face_core.training.checkpoints import (
    compare_identities,
    newest_checkpoint,
    restore_training,
    save_checkpoint,
    training_content,
    training_identity,
    training_tensors,
)

NEEDED = ("samples", "identity")
TENSORS = {"a/value": torch.arange(3.0)}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 2 and 4."""
    for step in (2, 4):
        about = {"samples": 2 * step, "identity": {"loss.clip": 0.0}, "rate": 0.1 + 0.2}
        save_checkpoint(tmp_path, step, TENSORS, about, keep=2)
    return tmp_path


def newest_step(folder) -> int | None:
    found = newest_checkpoint(folder, NEEDED)
    return found[1]["step"] if found else None


def test_what_was_written_is_read(folder):
    tensors, about = newest_checkpoint(folder, NEEDED)
    assert torch.equal(tensors["a/value"], TENSORS["a/value"])
    assert about["samples"] == 8 and about["rate"] == 0.1 + 0.2


@pytest.mark.parametrize(
    "edit",
    [
        {"step": 6}, {"step": 400}, {"step": "4"}, {"step": None}, {"step": 4.5}, {"step": -4},
        {"samples": 36}, {"samples": -5}, {"samples": None}, {"samples": True},
        {"identity": [1]}, {"identity": None}, {"identity": {"loss.clip": 1.0}},
        {"sha256": None}, {"sha256": "0" * 64}, {"rate": 0.31}, {"digest": "0" * 64},
    ],
    ids=str,
)  # fmt: skip
def test_an_edited_number_is_noticed_and_the_one_before_is_used(folder, edit):
    path = folder / "step_000004" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.warns(RuntimeWarning, match="step_000004 is damaged"):
        assert newest_step(folder) == 2


@pytest.mark.parametrize("edit", [{"step": 6}, {"step": "4"}, {"samples": -5}, {"identity": [1]}])
def test_also_without_a_digest_as_former_versions_wrote_it(folder, edit):
    path = folder / "step_000004" / "state.json"
    state = json.loads(path.read_text())
    del state["digest"]
    path.write_text(json.dumps(state))
    assert newest_step(folder) == 4
    path.write_text(json.dumps(state | edit))
    with pytest.warns(RuntimeWarning, match="step_000004 is damaged"):
        assert newest_step(folder) == 2


@pytest.mark.parametrize(
    "content", ["", "5", "[]", "null", "{", '{"step": 4}', "[" * 5000, "\x00", '{"step": NaN}']
)
def test_json_of_any_kind(folder, content):
    (folder / "step_000004" / "state.json").write_text(content)
    with pytest.warns(RuntimeWarning, match="step_000004 is damaged"):
        assert newest_step(folder) == 2


def test_strange_neighbours_do_not_matter(folder):
    for name in ("step_best", "step_000250 copy", "step_", "step_-1", "step_٣", ".step_000009.x.1"):
        (folder / name).mkdir()
    (folder / "step_000300.txt").touch()
    (folder / "notes").touch()
    (folder / "step_000005").symlink_to(folder / "nowhere")
    with pytest.warns(RuntimeWarning, match="step_000005 is damaged"):
        assert newest_step(folder) == 4
    save_checkpoint(folder, 6, TENSORS, {"samples": 12, "identity": {}}, keep=1)
    left = {path.name for path in folder.glob("step_??????")}
    assert left == {"step_000006"}
    assert (folder / "step_best").is_dir() and (folder / "step_000250 copy").is_dir()


def test_a_linked_checkpoint_is_pruned_as_a_link(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "step_000002"
    (folder / "step_000002").rename(elsewhere)
    (folder / "step_000002").symlink_to(elsewhere)
    save_checkpoint(folder, 6, TENSORS, {"samples": 12, "identity": {}}, keep=2)
    assert not (folder / "step_000002").exists() and (elsewhere / "state.json").is_file()


def test_a_damaged_future_neither_stays_nor_displaces_what_is_valid(folder):
    """keep=1: the damaged step 4 must not be what is kept when step 3 is written."""
    (folder / "step_000004" / "state.safetensors").write_bytes(b"half")
    save_checkpoint(folder, 3, TENSORS, {"samples": 6, "identity": {}}, keep=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_step(folder) == 3


def test_a_missing_tensor_is_named():
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2)).sum().backward()
    optimizer.step()
    parameters = dict(net.named_parameters())
    tensors = training_tensors(parameters, optimizer)
    restore_training(parameters, optimizer, tensors)
    short = {name: x for name, x in tensors.items() if name != "weight/exp_avg"}
    with pytest.raises(ConfigError, match="lacks a part of the optimiser's state of weight"):
        restore_training(parameters, optimizer, short)
    with pytest.raises(ConfigError, match="not trained here"):
        restore_training(parameters, optimizer, tensors | {"other/value": torch.ones(2)})
    with pytest.raises(ConfigError, match="in the shape"):
        restore_training(parameters, optimizer, tensors | {"bias/value": torch.ones(3)})


def test_broken_lines_of_the_log_do_not_stop_a_resume(tmp_path):
    add_metrics(tmp_path, [{"step": step, "total": 1.0} for step in (1, 2, 3)])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1:1] = [b"{", b"", b"5", b"[]", b"{}", b'{"step": "2"}', b"\xff\xfe", b"null"]
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 4, "tot')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    cut_metrics(tmp_path, 2)
    assert path.read_text().count("\n") == 2


# ----------------------------------------------------------------------------------------- identity


def test_a_moved_root_is_the_same_training_and_an_edited_one_is_not(tiny_faces, tmp_path):
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(tiny_faces, moved)
    config = load_profile("mini", data={"root": str(tiny_faces), "train": 12, "test": 4})
    other = config.replace(data={"root": str(moved)})
    before, now = (training_identity(c) | {"content": training_content(c)} for c in (config, other))
    compare_identities(before, now, tmp_path)

    path = moved / "text" / "0.txt"
    text = path.read_text()
    path.write_text(text.replace("e", "a", 1))  # of equal size
    os.utime(path, ns=(0, 0))
    now = training_identity(other) | {"content": training_content(other)}
    with pytest.raises(ConfigError, match=r"the content of data\.root"):
        compare_identities(before, now, tmp_path)
    del before["content"]  # as former versions wrote it
    with pytest.raises(ConfigError, match=r"data\.root .* -> "):
        compare_identities(before, now, tmp_path)


def test_what_may_change(tmp_path):
    config = load_profile("mini")
    before = training_identity(config)
    free = config.replace(
        trainer={"batch_size": 8, "accumulation": 2, "num_processes": 4, "checkpoint_every": 9},
        data={"cache": "elsewhere", "zero_shot_root": "elsewhere", "test": 5},
        seed=config.seed, profile="other", adapters="elsewhere",
    )  # fmt: skip
    compare_identities(before, training_identity(free), tmp_path)
    former = before | {
        "data.test": 3000,
        "data.zero_shot_root": "x",
        "perception.scoring_clip": "y",
    }
    compare_identities(former, training_identity(free), tmp_path)  # recorded by former versions
    for change in ({"seed": 7}, {"data.size": 128}, {"loss.clip": 1.0}, {"lora.rank": 2}):
        with pytest.raises(ConfigError, match=next(iter(change)).replace(".", r"\.")):
            compare_identities(before, training_identity(config.replace(**change)), tmp_path)
