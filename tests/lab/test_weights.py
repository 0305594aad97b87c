"""Weight files: incomplete, damaged and pickled ones are refused by name."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ec2face_core.perception import WeightsError
from ec2face_lab.prepare import weights

SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"


def test_a_whole_backbone_has_no_problems(flux_folder):
    assert weights.pipeline_problems(flux_folder) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[:-5], "half-downloaded, expected {n} bytes, found {found}"),
        (lambda whole: whole + b"more", "too long, expected {n} bytes, found {found}"),
        (lambda whole: whole[:30], "half-downloaded, expected more than"),
        (lambda whole: b"", "half-downloaded, expected more than 8 bytes, found 0"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (lambda whole: b"\x80\x02}q\x00X\x05\x00\x00\x00", "is no safetensors file"),
        (lambda whole: whole[:8] + b"#" + whole[9:], "header is damaged"),
    ],
)
def test_a_damaged_shard_is_named_with_the_reason(flux_folder, content, message):
    shard = flux_folder / SHARD
    whole = shard.read_bytes()
    damaged = content(whole)
    shard.write_bytes(damaged)
    (problem,) = weights.pipeline_problems(flux_folder)
    assert problem.startswith(f"{shard}: ")
    assert message.format(n=len(whole), found=len(damaged)) in problem


def test_missing_tensors_and_files_are_named(flux_folder):
    shard = flux_folder / SHARD
    save_file({"other": np.ones(8, np.float32)}, shard)
    assert weights.pipeline_problems(flux_folder) == [f"{shard}: lacks 1 tensors, such as layer.1"]
    shard.unlink()
    (flux_folder / "tokenizer_2" / "spiece.model").unlink()
    (flux_folder / "vae" / "config.json").write_text("[")
    report = "\n".join(weights.pipeline_problems(flux_folder))
    for problem in (f"{shard}: missing", "config.json: unreadable", "tokenizer_2: has none of"):
        assert problem in report


def test_pickled_weights_are_refused(flux_folder):
    vae = flux_folder / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "weights.bin")
    no_weights, pickle = weights.pipeline_problems(flux_folder)
    assert "vae: no safetensors" in no_weights
    assert "weights.bin: pickled weights are refused" in pickle


def test_another_pipeline_is_refused(flux_folder):
    (flux_folder / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    (problem,) = weights.pipeline_problems(flux_folder)
    assert "is a FluxFillPipeline" in problem


def test_an_open_clip_folder(tmp_path):
    settings = tmp_path / "open_clip_config.json"
    file = tmp_path / "open_clip_model.safetensors"
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    missing = weights.clip_problems(tmp_path)
    assert [line.split(": ")[-1] for line in missing[:2]] == ["missing", "missing"]
    assert "pickled weights are refused" in missing[2]
    settings.write_text("{}")
    save_file({"w": np.ones(4, np.float32)}, file)
    assert weights.clip_problems(tmp_path) == []


@pytest.mark.parametrize("good", [True, False])
def test_recorded_hashes(tmp_path, good):
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    trunk = tmp_path / f"alexnet-owt-{digest[:8] if good else '7be5be79'}.pth"
    file = tmp_path / "copy" / "vae" / "model.safetensors"
    record = tmp_path / "copy/.cache/huggingface/download/vae/model.safetensors.metadata"
    for path in (trunk, file, record):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    record.write_text(f"commit\n{digest if good else '0' * 64}\n1.5\n")
    for path in (trunk, file):
        problems = weights.problems_of(weights.check_hash, path)
        assert (problems == []) == good
        assert good or "damaged, its SHA-256" in problems[0]


def test_files_without_a_recorded_hash_pass(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"anything")
    weights.check_hash(path)


def test_a_pickle_may_hold_tensors_only(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("code",))

    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    weights.check_tensors(path)
    torch.save({"weight": torch.zeros(1), "more": Harmful()}, path)
    with pytest.raises(WeightsError, match="no mapping of tensors"):
        weights.check_tensors(path)
